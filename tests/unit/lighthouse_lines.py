"""Lines of a lighthouse's log, and what a monitor finds in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.capped_log import older_of, set_aside
from launcher.compaction import first_line
from launcher.lighthouse_log import LighthouseReader
from launcher.tail import Tail

LINE = "2026-11-20T{:02d}:{:02d}:{:02d}.000 {}\n"
#: What is said once. (A quorum that is announced again is news of nothing but its step.)
KINDS = ("membership", "commit_failed", "listening")
MEMBER = (
    'QuorumMember {{ replica_id: "t_{}:u{}", address: "http://w:1", store_address: "w:2", '
    'step: {}, world_size: 8, shrink_only: false, commit_failures: 0, data: "" }}'
)


def line(second: int, text: str) -> bytes:
    text = text if text.startswith("[") else f"[INFO] [torchft::lighthouse] - {text}"
    return LINE.format(second // 3600, second // 60 % 60, second % 60, text).encode()


def at(lines: bytes, second: int) -> bytes:
    """The lines, said from ``second`` on."""
    texts = [text.split(b" ", 1)[1].decode() for text in lines.splitlines()]
    return b"".join(line(second + n, text) for n, text in enumerate(texts))


def quorum(second: int, number: int, groups: int, step: int = 3) -> bytes:
    members = ", ".join(MEMBER.format(group, group, step) for group in range(groups))
    text = f"Quorum! Quorum {{ quorum_id: {number}, participants: [{members}], created: x }}"
    return line(second, text)


def asked(second: int, group: int) -> bytes:
    return line(second, f"Received quorum request for replica t_{group}:u{group}")


def blocked(second: int, joined: int) -> bytes:
    return line(second, f"Quorum status: only {joined}, need at least half of 64 healthy workers")


class Monitor:
    """Reads the log as the monitor does; looks when it is told to."""

    def __init__(self, path: Path) -> None:
        self.tail = Tail(path, older_of(path))
        self.reader = LighthouseReader(path.name)
        self.found: list[tuple[float, str, Any]] = []

    def look(self) -> list[tuple[float, str, Any]]:
        for offset, block in self.tail.blocks():
            events = self.reader.read(offset, block)
            self.found += [(e.t, e.kind, e.fields) for e in events if e.kind in KINDS]
        return self.found

    @classmethod
    def late(cls, path: Path) -> list[tuple[float, str, Any]]:
        monitor = cls(path)
        with monitor.tail:
            return monitor.look()


def said(data: bytes) -> list[tuple[float, str, Any]]:
    events = LighthouseReader("l").read(0, data)
    return [(e.t, e.kind, e.fields) for e in events if e.kind in KINDS]


def append(path: Path, data: bytes, limit: int) -> None:
    """As ``CappedLog`` does it, at once."""
    if not path.exists():
        path.write_bytes(first_line(1))
    with path.open("ab") as file:
        file.write(data)
        full = file.tell() >= limit
    if full:
        assert set_aside(path)
