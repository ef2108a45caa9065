"""What a run's long-lived processes hold, before and after: memory, files, sockets, children."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from launcher.hands import lighthouses

#: Growth up to which nothing is said: bytes, and files, sockets, threads or processes.
SLACK_BYTES, SLACK_COUNT = 48 << 20, 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one process holds."""

    memory: int
    """Bytes of its own and shared."""
    files: int
    """Open file handles, sockets too."""
    sockets: int
    """TCP connections and ports."""
    threads: int
    processes: int
    """Itself and all its children."""


def measure(supervisor: int) -> dict[str, Held]:
    """What the supervisor of a lighthouse holds, and the lighthouse and the guardian below it."""
    found: dict[str, Held] = {}
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(supervisor)
        _add(found, "supervisor", process)
        for pid in lighthouses(supervisor):
            _add(found, "lighthouse", psutil.Process(pid))
        for child in process.children():
            with contextlib.suppress(psutil.Error):
                if "--act" in child.cmdline():
                    _add(found, "guardian", child)
    return found


def _add(found: dict[str, Held], name: str, process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        found[name] = Held(
            memory=process.memory_info().rss,
            files=process.num_fds(),
            sockets=len(process.net_connections("tcp")),
            threads=process.num_threads(),
            processes=1 + len(process.children(recursive=True)),
        )


def grown(before: Mapping[str, Held], after: Mapping[str, Held]) -> list[str]:
    """What has grown by more than chance, in words; a process that is gone, too."""
    problems = []
    for name, old in before.items():
        new = after.get(name)
        if new is None:
            problems.append(f"{name} is gone")
            continue
        if new.memory - old.memory > SLACK_BYTES:
            problems.append(f"{name}: memory {_mega(old.memory)} to {_mega(new.memory)} MB")
        for part in ("files", "sockets", "threads", "processes"):
            was, now = getattr(old, part), getattr(new, part)
            if now - was > SLACK_COUNT:
                problems.append(f"{name}: {part} {was} to {now}")
    return problems


def lines(before: Mapping[str, Held], after: Mapping[str, Held]) -> list[str]:
    """Both, a line a process."""
    rows = []
    for name, old in before.items():
        new = after.get(name)
        if new is not None:
            counts = [
                f"{part} {getattr(old, part)} to {getattr(new, part)}"
                for part in ("files", "sockets", "threads", "processes")
            ]
            memory = f"memory {_mega(old.memory)} to {_mega(new.memory)} MB"
            rows.append(f"{name}: {', '.join([memory, *counts])}")
    return rows


def as_data(held: Mapping[str, Held]) -> dict[str, Any]:
    return {name: asdict(one) for name, one in held.items()}


def _mega(size: int) -> str:
    return f"{size / 1e6:.0f}"
