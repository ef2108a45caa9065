"""Simulated managers at the least cost: what one lighthouse sees of many replica groups.

A real manager decodes every member of every quorum; a thousand of them on one machine would
measure themselves. These speak just enough HTTP/2 and protobuf to send what a manager sends, on
a connection each (a heartbeat every 100 ms, a quorum request a step), and skip over the answers.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

HEARTBEAT_SECONDS = 0.1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PING, _GOAWAY = 0, 1, 4, 6, 7
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
#: Flow control is not ours to test: windows as large as they may be.
_WINDOW = 2**31 - 1
#: Of the member that a manager describes, one a rank: as long as those of the trainings seen.
_HANDLE = '{"id": "7a9522e6a71e4024b5ce4f14b2191c56", "store": "worker-0:38455"}'
RANKS = 8


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return (
        len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + payload
    )


def _text(name: int, value: str) -> bytes:
    """A string field of a protobuf message."""
    data = value.encode()
    return bytes((name << 3 | 2,)) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _literal(name: str | int, value: str, *, kept: bool = False) -> bytes:
    """A header, in plain letters; ``kept`` ones can be named by a number afterwards."""
    how = 0x40 if kept else 0
    start = bytes((how | name,)) if isinstance(name, int) else (
        bytes((how, len(name))) + name.encode()
    )  # fmt: skip
    return start + bytes((len(value),)) + value.encode()


#: ``:method POST`` and ``:scheme http``; then what the first request of a connection says in full,
#: and the later ones by number, around the path.
_COMMON = b"\x83\x86"
_FIRST = (
    _literal(1, "lighthouse", kept=True),
    _literal("te", "trailers", kept=True) + _literal(31, "application/grpc", kept=True),
)
_AGAIN = (b"\xc0", b"\xbf\xbe")


def _path(method: str) -> bytes:
    return _literal(4, f"/torchft.LighthouseService/{method}")


@dataclass(slots=True)
class Group:
    """One simulated replica group's connection."""

    replica: int
    sock: socket.socket
    heartbeat: bytes
    due: float
    """When its next heartbeat is sent."""
    stream: int = 1
    buffer: bytearray = field(default_factory=bytearray)
    skip: int = 0
    """Bytes of an answer that are still to come and are of no interest."""
    asked: dict[int, float] = field(default_factory=dict)
    """Streams of quorum requests, and when they were sent."""
    unsent: bytearray = field(default_factory=bytearray)

    def send(self, path: bytes, message: bytes, more: bytes = b"") -> int:
        """One request; its stream."""
        stream, self.stream = self.stream, self.stream + 2
        before, after = _FIRST if stream == 1 else _AGAIN
        headers = _COMMON + before + path + after + more
        body = b"\0" + struct.pack(">I", len(message)) + message
        data = _frame(_HEADERS, _END_HEADERS, stream, headers)
        self.push(data + _frame(_DATA, _END_STREAM, stream, body))
        return stream

    def push(self, data: bytes) -> None:
        if self.unsent:
            self.unsent += data
            return
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self.unsent += data[sent:]


class Crowd:
    """Many replica groups at one lighthouse, in one thread."""

    def __init__(
        self, place: tuple[str, int], groups: int, first: tuple[str, int] | None = None
    ) -> None:
        """``first``: where the first of them reaches the lighthouse, when it goes another way."""
        self._poll = select.epoll()
        self._groups: dict[int, Group] = {}
        self._heartbeat, self._quorum = _path("Heartbeat"), _path("Quorum")
        self._timeout = _literal("grpc-timeout", "60000000u")
        self.late = 0.0
        """The most that a heartbeat was sent too late, seconds."""
        self.heartbeats = 0
        self.answer_bytes = 0
        self.answered: list[float] = []
        """Seconds that each quorum took."""
        now = time.perf_counter()
        for replica in range(groups):
            sock = socket.create_connection((first or place) if replica == 0 else place)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)
            settings = struct.pack(">HIHIHI", 2, 0, 4, _WINDOW, 5, 2**24 - 1)
            group = Group(
                replica,
                sock,
                _text(1, self._name(replica)),
                now + replica / groups * HEARTBEAT_SECONDS,
            )
            group.push(_PREFACE + _frame(_SETTINGS, 0, 0, settings))
            group.push(_frame(8, 0, 0, struct.pack(">I", _WINDOW - 65535)))
            self._groups[sock.fileno()] = group
            self._poll.register(sock, select.EPOLLIN)
        self._order = list(self._groups.values())
        self._next = 0

    def close(self) -> None:
        for group in self._groups.values():
            group.sock.close()
        self._poll.close()

    @staticmethod
    def _name(replica: int) -> str:
        return f"torchtitan_ft_{replica}:{replica:08x}-c44d-433e-8c94-5e8f1c3c86cb"

    def ask(self, step: int) -> None:
        """Every group that is not left from the step before asks for a quorum."""
        for group in [each for each in self._order if not each.asked]:
            member = (
                _text(1, self._name(group.replica))
                + _text(2, f"http://worker-{group.replica}:39749")
                + _text(3, f"worker-{group.replica}:45865")
                + b"\x20" + _varint(step) + b"\x28" + _varint(RANKS)
                + _text(9, _HANDLE) * RANKS
            )  # fmt: skip
            message = b"\x0a" + _varint(len(member)) + member
            sent = time.perf_counter()
            group.asked[group.send(self._quorum, message, self._timeout)] = sent
            self._watch_unsent(group)
            self._beat(sent)

    @property
    def waiting(self) -> int:
        """Groups that wait for a quorum."""
        return sum(1 for group in self._order if group.asked)

    def live(self, seconds: float, *, until_answered: bool = False) -> None:
        """Send heartbeats and take answers for so long, or until all have their quorum."""
        end = time.perf_counter() + seconds
        expected = self.waiting
        have = len(self.answered)
        while (now := time.perf_counter()) < end:
            if until_answered and len(self.answered) - have >= expected:
                return
            self._beat(now)
            pause = max(0.0, min(self._order[self._next].due, end) - now)
            for fd, event in self._poll.poll(pause):
                group = self._groups[fd]
                if event & select.EPOLLOUT:
                    self._flush(group)
                if event & ~select.EPOLLOUT:
                    self._take(group)

    def _beat(self, now: float) -> None:
        """Send the heartbeats that are due; they come round in the same order every time."""
        for _ in self._order:  # once round at most: what is behind must also listen
            if (group := self._order[self._next]).due > now:
                return
            self.late = max(self.late, now - group.due)
            group.send(self._heartbeat, group.heartbeat)
            self._watch_unsent(group)
            self.heartbeats += 1
            # A heartbeat that could not be sent is not made up for.
            group.due = max(group.due + HEARTBEAT_SECONDS, now)
            self._next = (self._next + 1) % len(self._order)

    def _watch_unsent(self, group: Group) -> None:
        if group.unsent:
            self._poll.modify(group.sock, select.EPOLLIN | select.EPOLLOUT)

    def _flush(self, group: Group) -> None:
        unsent, group.unsent = bytes(group.unsent), bytearray()
        group.push(unsent)
        if not group.unsent:
            self._poll.modify(group.sock, select.EPOLLIN)

    def _take(self, group: Group) -> None:
        data = group.sock.recv(1 << 20)
        if not data:
            raise SystemExit(f"the lighthouse ended group {group.replica}'s connection")
        if group.skip >= len(data):
            group.skip -= len(data)
            return
        group.buffer += data[group.skip :]
        group.skip = 0
        for kind, flags, stream, payload in self._frames(group):
            if kind == _GOAWAY:
                raise SystemExit(f"the lighthouse refuses group {group.replica}: {payload!r}")
            if kind in (_SETTINGS, _PING) and not flags & _ACK:
                group.push(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
            if kind == _HEADERS and flags & _END_STREAM and stream in group.asked:
                self.answered.append(time.perf_counter() - group.asked.pop(stream))

    def _frames(self, group: Group) -> Iterator[tuple[int, int, int, bytes]]:
        """Whole frames of what has come; the inside of an answer is not waited for."""
        buffer = group.buffer
        at = 0
        while len(buffer) - at >= 9:
            size = int.from_bytes(buffer[at : at + 3], "big")
            kind, flags = buffer[at + 3], buffer[at + 4]
            stream = int.from_bytes(buffer[at + 5 : at + 9], "big")
            end = at + 9 + size
            if kind == _DATA:
                self.answer_bytes += size
                group.skip = max(0, end - len(buffer))
                at = min(end, len(buffer))
                continue
            if end > len(buffer):
                break
            yield kind, flags, stream, bytes(buffer[at + 9 : end])
            at = end
        del buffer[:at]
