"""Reads the lighthouse's log at the speed of a search, not of a parser.

A quorum line repeats at every step, grows with the number of replica groups, and says
nothing new while its quorum id stays: only the id is looked at then. Formats of torchft since
2025 are understood (older lines lack ``reconfigure_handles``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from launcher.events import Clock, Event, Source

_QUORUM = b"Quorum! Quorum { quorum_id: "
#: Where the exclamation mark stands in it. Looking for one rare character runs at memory
#: speed (``memchr``), for a word at a tenth of that.
_MARK = _QUORUM.index(b"!")
_MEMBER = re.compile(
    rb'QuorumMember \{ replica_id: "(?:[^":]*?)(\d+):([^"]*)", address: "([^"]*)", '
    rb'store_address: "[^"]*", step: (\d+), world_size: (\d+)'
)
_STEP = re.compile(rb" step: (\d+), ")
_STATUS = b"Quorum status: "
_FAILURES = b"Detected commit failures in ["
_LISTENING = b"Lighthouse listening on: "
_REQUEST = re.compile(rb"Received quorum request for replica \w*?(\d+):(\S+)")


_BLOCKED = re.compile(rb"need at least half|not participating stragglers")


@dataclass(slots=True)
class Waiting:
    """What happened since the newest quorum: who asked for the next one, and since when."""

    since: float | None = None
    """First request after the newest quorum, Unix seconds."""
    requested: set[int] = field(default_factory=set)
    status: str = ""
    """Newest status that says why there is no quorum; empty when none was said."""


#: Line at the start of a log whose times are UTC. Without it they are local times, and a
#: reader in another time zone than the lighthouse would place them wrongly.
UTC_MARK = b"[supervisor] times are in UTC\n"


class LighthouseReader:
    """Events in the lighthouse's log; the same ones however the log is cut into blocks.

    ============= ==================================================================
    kind          fields
    ============= ==================================================================
    membership    ``quorum_id``, ``members``: [(replica, uuid, step, address)], and
                  ``waited``: a ``Waiting`` of the time before; when the id changes
    commit_failed ``ids``: the lighthouse was told of failed commits
    listening     the lighthouse (re)started; ``last``: time of its last line before, or None
    ============= ==================================================================

    ``step`` and ``waiting`` hold the newest step and what the next quorum waits for.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._clock = Clock()
        self._quorum_id = b""
        self._last: float | None = None
        """Time of the last line of the blocks before."""
        self.step = 0
        self.waiting = Waiting()
        self.lines = 0

    def read(self, offset: int, block: bytes) -> Iterator[Event]:
        """Events in ``block`` (whole lines), which starts at ``offset`` of the file."""
        self.lines += 1
        if UTC_MARK[:-1] in block[: len(UTC_MARK)]:
            self._clock = Clock(utc=True)
        found: list[tuple[int, Event]] = []
        restarts = [p for p in _positions(block, b"L") if block.startswith(_LISTENING, p)]
        for position in restarts:
            before = self._last_before(block, block.rfind(b"\n", 0, position) + 1)
            self._add(found, block, position, offset, "listening", last=before)
        last = 0
        unchanged = _QUORUM + self._quorum_id + b","
        mark = block.find(b"!")
        while mark >= 0:
            position = mark - _MARK
            mark = block.find(b"!", mark + 1)
            if not restarts and block.startswith(unchanged, position):
                last = position + 1
                continue
            if not block.startswith(_QUORUM, position):
                continue
            while restarts and restarts[0] < position:
                # A restarted lighthouse counts from one: the same id is another quorum. And it
                # knows nothing of who had asked the one before.
                self._quorum_id = b""
                last = restarts.pop(0)
            start = position + len(_QUORUM)
            quorum_id = block[start : block.find(b",", start, start + 24)]
            if quorum_id != self._quorum_id:
                if last:
                    self.waiting = Waiting()  # what was carried over belongs before ``last``
                self._look_at_waiting(block, last, position)
                failures = block.find(_FAILURES, last, position)
                if failures >= 0:
                    ids = _failed_ids(block, failures)
                    self._add(found, block, failures, offset, "commit_failed", ids=ids)
                self._new_quorum(found, block, position, offset, quorum_id)
                unchanged = _QUORUM + self._quorum_id + b","
            self.waiting = Waiting()
            last = position + 1
        if restarts:
            self._quorum_id = b""
            last = restarts[-1]
        if last:
            self.waiting = Waiting()
            match = _STEP.search(block, last)
            self.step = int(match[1]) if match else self.step
        self._look_at_waiting(block, last, len(block))
        self._last = self._last_before(block, len(block))
        found.sort(key=lambda pair: pair[0])
        yield from (event for _, event in found)

    def _new_quorum(
        self,
        found: list[tuple[int, Event]],
        block: bytes,
        position: int,
        offset: int,
        quorum_id: bytes,
    ) -> None:
        if not quorum_id.isdigit():
            return
        self._quorum_id = quorum_id
        end = block.find(b"\n", position)
        members = [
            (int(m[1]), m[2].decode(errors="replace"), int(m[4]), m[3].decode(errors="replace"))
            for m in _MEMBER.finditer(block, position, end)
        ]
        fields = {"quorum_id": int(quorum_id), "members": members, "waited": self.waiting}
        self._add(found, block, position, offset, "membership", **fields)

    def _look_at_waiting(self, block: bytes, start: int, end: int) -> None:
        """Take in the requests and the status between two quorums."""
        waiting = self.waiting
        for match in _REQUEST.finditer(block, start, end):
            if waiting.since is None:
                waiting.since = self._time(block, match.start())
            waiting.requested.add(int(match[1]))
        status = block.rfind(_STATUS, start, end)
        if status >= 0:
            text = block[status + len(_STATUS) : block.find(b"\n", status)]
            waiting.status = text.decode(errors="replace") if _BLOCKED.search(text) else ""

    def _last_before(self, block: bytes, end: int) -> float | None:
        """Time of the last line before ``end`` that has one."""
        while end > 0:
            end = block.rfind(b"\n", 0, end - 1) + 1
            t = self._clock.seconds(block[end : end + 30].decode(errors="replace"))
            if t is not None:
                return t
        return self._last

    def _time(self, block: bytes, position: int) -> float | None:
        start = block.rfind(b"\n", max(0, position - 200), position) + 1
        return self._clock.seconds(block[start : start + 30].decode(errors="replace"))

    def _add(
        self,
        found: list[tuple[int, Event]],
        block: bytes,
        position: int,
        offset: int,
        kind: str,
        **fields: object,
    ) -> None:
        t = self._time(block, position)
        if t is None:
            return
        start = block.rfind(b"\n", max(0, position - 200), position) + 1
        source = Source(self._file, offset + start)
        found.append((position, Event(t=t, kind=kind, fields=fields, source=source)))


def compact(log: bytes) -> bytes:
    """What of a lighthouse's log (whole lines) says something new.

    That is a small part: a quorum is announced at every step, and changes with a loss or a
    return. A ``LighthouseReader`` finds the same events in it, whatever follows.
    """
    kept = [UTC_MARK] if log.startswith(UTC_MARK) else []
    quorum_id, after, position, kept_to = b"", 0, 0, 0
    for position in _positions(log, b"!"):
        if not log.startswith(_QUORUM, position - _MARK):
            continue
        start = position - _MARK + len(_QUORUM)
        end = log.find(b"\n", start) + 1
        found = log[start : log.find(b",", start, start + 24)]
        restarted = log.rfind(_LISTENING, after, position)
        if found != quorum_id or restarted >= 0:
            if restarted >= 0 and kept_to < after:
                # The last line before a restart tells how long the lighthouse was there.
                kept.append(log[log.rfind(b"\n", 0, after - 1) + 1 : after])
            kept.append(log[after:end])  # and what led to it: requests, statuses, failures
            kept_to = end
        quorum_id, after = found, end
    # The newest quorum, and what has happened since: the next file goes on from there.
    newest = log.rfind(b"\n", 0, max(0, after - 1)) + 1
    if after and not (kept and kept[-1].endswith(log[newest:after])):
        kept.append(log[newest:after])
    kept.append(log[after:])
    return b"".join(kept)


def _failed_ids(block: bytes, position: int) -> list[str]:
    end = block.find(b"]", position)
    return block[position + len(_FAILURES) : end].decode(errors="replace").split(", ")


def _positions(block: bytes, needle: bytes) -> Iterator[int]:
    position = block.find(needle)
    while position >= 0:
        yield position
        position = block.find(needle, position + 1)
