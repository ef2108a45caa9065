"""Reads the lighthouse's log at the speed of a search, not of a parser.

A quorum line repeats at every step, grows with the number of replica groups, and says
nothing new while its quorum id stays: only the id is looked at then. ``LIGHTHOUSE_PATTERNS`` is the
vocabulary, of torchft since 2024-10.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from launcher.events import Clock, Event, Source
from launcher.names import Names, split_id
from launcher.patterns import Pattern, Sample

_FT, _SOURCE = "torchft-nightly 2026.10.26", "source of torchft, "
_LH = "2026-11-20T14:31:46.888 [INFO] [torchft::lighthouse] - "
_SAMPLE = (
    'QuorumMember { replica_id: "torchtitan_ft_1:3f-a", address: "http://w-1:1", '
    'store_address: "w-1:2", step: 302'
)
_ANNOUNCED = "Quorum! Quorum { quorum_id: 4, participants: ["
#: Of a quorum line, for each member; a newer torchft tells more after the step.
_ONE = (
    r'QuorumMember \{ replica_id: "(?P<name>[^"]{1,300})", address: "(?P<address>[^"]{0,1000})", '
    r'store_address: "[^"]{0,1000}", step: (?P<step>\d{1,15})\b'
)
_ASKS = r" quorum request for replica (?P<name>[^\s\x1b]{1,300})"

#: The vocabulary of the lighthouse's log. ``LighthouseReader`` looks for the same words, faster. The
#: last two are no events: they tell who waits for the next quorum, and why there is none.
LIGHTHOUSE_PATTERNS = (
    Pattern(
        kind="membership",
        regex=r"Quorum! Quorum \{ quorum_id: (?P<quorum_id>\d{1,15}), participants: \[.*" + _ONE,
        samples=(
            Sample(
                f"{_LH}{_ANNOUNCED}{_SAMPLE}, world_size: 8, shrink_only: false, commit_failures: 0, "
                'data: "", reconfigure_handles: ["{}"] }], created: Some(Timestamp { seconds: 1 }) }',
                _FT,
            ),
            Sample(
                f"{_LH}{_ANNOUNCED}{_SAMPLE}, world_size: 8, shrink_only: false, commit_failures: 0, "
                'data: "" }], created: Some(Timestamp { seconds: 1 }) }',
                _SOURCE + "2025-05 to 2025-10",
            ),
            Sample(
                f"[2025-02-01T12:00:00Z INFO torchft::lighthouse] {_ANNOUNCED}{_SAMPLE} "
                "}], created: Some(Timestamp { seconds: 1 }) }",
                _SOURCE + "2024-10",
            ),
        ),
    ),
    Pattern(
        kind="commit_failed",
        regex=r"Detected commit failures in \[(?P<ids>[^\]]*)\]",
        samples=(
            Sample(
                f"{_LH}Detected commit failures in [torchtitan_ft_1:3f-a], bumping quorum_id to 5",
                _FT,
            ),
        ),
    ),
    Pattern(
        kind="listening",
        regex=r"Lighthouse listening on: (?P<address>\S+)",
        samples=(Sample(f"{_LH}Lighthouse listening on: http://login-0:29510", _FT),),
    ),
    Pattern(
        kind="request",
        regex="(?:Received|got)" + _ASKS,
        samples=(
            Sample(f"{_LH}Received quorum request for replica torchtitan_ft_1:3f-a", _FT),
            Sample(
                f"{_LH}got quorum request for replica torchtitan_ft_1"
                "e2bec276-13c7-484c-bd4e-f3442c74af1d",
                _SOURCE + "before 2025-03",
            ),
        ),
    ),
    Pattern(
        kind="status",
        regex=r"(?:Q|Next q)uorum status: (?P<text>.*)",
        samples=(
            Sample(f"{_LH}Quorum status: need at least half of 2 healthy workers", _FT),
            Sample(
                f"{_LH}Next quorum status: need at least half of 2 healthy workers",
                _SOURCE + "2025-01 to 2025-03",
            ),
        ),
    ),
)

_QUORUM = b"Quorum! Quorum { quorum_id: "
#: Where the exclamation mark stands in it. Looking for one rare character runs at memory
#: speed (``memchr``), for a word at a tenth of that.
_MARK = _QUORUM.index(b"!")
_MEMBER = re.compile(_ONE.encode())
_MEMBERS = b"QuorumMember {"
_STEP = re.compile(rb" step: (\d{1,15})[ ,]")
_STATUS = b"uorum status: "
_FAILURES = b"Detected commit failures in ["
_LISTENING = b"Lighthouse listening on: "
#: (A pattern that begins with alternatives would be looked for at a tenth of the speed.)
_REQUEST = re.compile(_ASKS.encode())
_HEARTBEATING = re.compile(rb"\[(\d{1,6}) heartbeating\]")
#: Lines after a change that are read for the first commit of its members: a step in which nobody
#: commits gives another quorum id.
MOST_LINES_AFTER = 64
_BLOCKED = re.compile(rb"need at least half|not participating stragglers")


@dataclass(slots=True)
class Waiting:
    """What happened since the newest quorum: who asked for the next one, and since when."""

    since: float | None = None
    """First request after the newest quorum, Unix seconds."""
    requested: set[int] = field(default_factory=set)
    status: str = ""
    """Newest status that says why there is no quorum; empty when none was said."""
    heartbeating: int | None = None
    """Replica groups whose heartbeats came, as the newest status says; None where none does."""


#: Bytes at the start of a line in which its time stands.
STAMP_BYTES = 60
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
    commit_failed ``ids``, ``replicas``: the lighthouse was told of failed commits
    steps         ``steps``: [(replica, step)] as a quorum line says, and ``in_a_row``: whether no
                  line before it was left out; of the lines around a change
    listening     the lighthouse (re)started; ``last``: time of its last line before, or None
    ============= ==================================================================

    ``step`` and ``waiting`` hold the newest step and what the next quorum waits for. ``lines`` is
    their count while not one was understood, and afterwards only says that there are some. How replica
    groups are numbered: ``launcher/names.py``.
    """

    def __init__(self, file: str, names: Names | None = None) -> None:
        """
        Args:
            names: gets the groups' numbers, for readers of their text logs.
        """
        self.file = file
        self._names = Names() if names is None else names
        self._clock = Clock()
        self._quorum_id = b""
        self._last: float | None = None
        """Time of the last line of the blocks before."""
        self.step = 0
        self.waiting = Waiting()
        self.lines = 0
        self._understood = False
        """Whether any line has been."""
        self._behind: dict[int, int] = {}
        """Steps of members at the last change that they have not got beyond."""
        self._lines_left = 0
        """Further lines in which that is looked for."""
        self._newest: tuple[float | None, bytes, int] | None = None
        """Time, text and offset of the newest quorum line of all blocks so far."""
        self._numbers: dict[bytes, int | None] = {}
        """Groups by the ids with which they asked since the newest change."""

    def read(self, offset: int, block: bytes) -> Iterator[Event]:
        """Events in ``block`` (whole lines), which starts at ``offset`` of the file."""
        if UTC_MARK[:-1] in block[: len(UTC_MARK)]:
            self._clock = Clock(utc=True)
        found: list[tuple[int, Event]] = []
        restarts = [p for p in _positions(block, b"L") if block.startswith(_LISTENING, p)]
        for position in restarts:
            before = self._last_before(block, block.rfind(b"\n", 0, position) + 1)
            self._add(found, block, position, offset, "listening", last=before)
        last = 0
        carried = self.waiting
        at, since = -1, 0  # of the newest quorum line in the block, and of what led to it
        unchanged = _QUORUM + self._quorum_id + b","
        mark = block.find(b"!")
        while mark >= 0:
            position = mark - _MARK
            mark = block.find(b"!", mark + 1)
            if not restarts and block.startswith(unchanged, position):
                at, since, last = position, last, position + 1
                if self._behind:
                    self._advance(found, self._steps(block, at, since, offset, carried), at)
                continue
            if not block.startswith(_QUORUM, position):
                continue
            while restarts and restarts[0] < position:
                # A restarted lighthouse counts from one: the same id is another quorum. And it
                # knows nothing of who had asked the one before.
                self._quorum_id = b""
                last = restarts.pop(0)
            start = position + len(_QUORUM)
            comma = block.find(b",", start, start + 24)
            quorum_id = block[start:comma] if comma > 0 else b""
            if quorum_id != self._quorum_id:
                ahead = self._steps(block, at, since, offset, carried) if at >= 0 else self.newest
                found += [(position - 1, ahead)] if ahead is not None else []
                if last:
                    self.waiting = Waiting()  # what was carried over belongs before ``last``
                self._look_at_waiting(block, last, position)
                self._failures(found, block, last, position, offset)
                members = self._new_quorum(found, block, position, offset, quorum_id)
                if members:
                    self._behind, self._lines_left = members, MOST_LINES_AFTER
                    steps = self._steps(block, position, last, offset, carried)
                    self._advance(found, steps, position - 1)
                unchanged = _QUORUM + self._quorum_id + b","
            elif self._behind:
                self._advance(found, self._steps(block, position, last, offset, carried), position)
            self.waiting = Waiting()
            at, since, last = position, last, position + 1
        if restarts:
            self._quorum_id = b""
            last = restarts[-1]
        if last:
            self.waiting = Waiting()
            match = _STEP.search(block, last)
            self.step = int(match[1]) if match else self.step
        if at >= 0:
            self._keep(block, at, since, offset, carried)
        self._failures(found, block, last, len(block), offset)
        self._look_at_waiting(block, last, len(block))
        self._last = self._last_before(block, len(block))
        self._understood = self._understood or bool(found) or self.waiting.since is not None
        self.lines += 1 if self._understood else block.count(b"\n")
        found.sort(key=lambda pair: pair[0])
        yield from (event for _, event in found)

    def _new_quorum(
        self,
        found: list[tuple[int, Event]],
        block: bytes,
        position: int,
        offset: int,
        quorum_id: bytes,
    ) -> dict[int, int]:
        """Returns the step of each member."""
        if not quorum_id.isdigit() or len(quorum_id) > 15:
            return {}
        self._quorum_id = quorum_id
        self._numbers = {}
        members = self._members(block, position)
        if not members and block.find(_MEMBERS, position, block.find(b"\n", position)) >= 0:
            return {}
        fields = {"quorum_id": int(quorum_id), "members": members, "waited": self.waiting}
        self._add(found, block, position, offset, "membership", **fields)
        return {number: step for number, _, step, _ in members}

    def _members(self, block: bytes, position: int) -> list[tuple[int, str, int, str]]:
        """The members that a quorum line names."""
        end = block.find(b"\n", position)
        parts = [
            [part.decode(errors="replace") for part in match.groups()]
            for match in _MEMBER.finditer(block, position, end)
        ]
        numbers = self._names.of_quorum([full for full, _, _ in parts])
        return [
            (number, split_id(full).uuid, int(step), address)
            for number, (full, address, step) in zip(numbers, parts, strict=True)
            if number is not None
        ]

    def _steps(
        self, block: bytes, position: int, since: int, offset: int, carried: Waiting
    ) -> Event | None:
        """The steps that a quorum line names, at the time at which the first member asked for that
        quorum: it had committed then.

        Args:
            since: where what led to it begins; 0: in a block before, of which ``carried`` tells.
        """
        t = self._asked(block, position, since, carried)
        start = block.rfind(b"\n", max(0, position - 200), position) + 1
        return self._named(t, block, position, offset + start)

    def _asked(self, block: bytes, position: int, since: int, carried: Waiting) -> float | None:
        if not since and carried.since is not None:
            return carried.since
        # (What led to it begins after the line before, which may be a long one.)
        after = block.find(b"\n", since, position) if since else 0
        asked = _REQUEST.search(block, max(after, 0), position)
        return self._time(block, asked.start() if asked else position)

    def _named(self, t: float | None, block: bytes, position: int, offset: int) -> Event | None:
        steps = [(number, step) for number, _, step, _ in self._members(block, position)]
        if t is None or not steps:
            return None
        source = Source(self.file, offset)
        return Event(t=t, kind="steps", fields={"steps": steps}, source=source)

    def _keep(self, block: bytes, position: int, since: int, offset: int, carried: Waiting) -> None:
        start = block.rfind(b"\n", max(0, position - 200), position) + 1
        line = block[start : block.find(b"\n", position) + 1]
        self._newest = self._asked(block, position, since, carried), line, offset + start

    @property
    def newest(self) -> Event | None:
        """The steps in the newest quorum line of all blocks so far."""
        if self._newest is None:
            return None
        t, line, offset = self._newest
        return self._named(t, line, line.find(_QUORUM), offset)

    def _advance(self, found: list[tuple[int, Event]], steps: Event | None, position: int) -> None:
        """Until each member of a new quorum has committed, every line is read for that."""
        self._lines_left -= 1
        if steps is None or not self._lines_left:
            self._behind = {}
            return
        found.append((position, replace(steps, fields={**steps.fields, "in_a_row": True})))
        named = steps.fields["steps"]
        self._behind = {n: self._behind[n] for n, s in named if s <= self._behind.get(n, -1)}

    def _failures(
        self, found: list[tuple[int, Event]], block: bytes, start: int, end: int, offset: int
    ) -> None:
        position = block.find(_FAILURES, start, end)
        if position >= 0:
            ids = _failed_ids(block, position)
            numbers = [number for number in map(self._names.known, ids) if number is not None]
            self._add(found, block, position, offset, "commit_failed", ids=ids, replicas=numbers)

    def _look_at_waiting(self, block: bytes, start: int, end: int) -> None:
        """Take in the requests and the status between two quorums."""
        waiting = self.waiting
        # (After the quorum line with which this begins; it may be a long one.)
        after = max(block.find(b"\n", start, end), 0) if start else 0
        first = _REQUEST.search(block, after, end) if waiting.since is None else None
        if first is not None:
            waiting.since = self._time(block, first.start())
        for name in _REQUEST.findall(block, after, end):
            if name not in self._numbers:
                self._numbers[name] = self._names.known(name.decode(errors="replace"))
            if (number := self._numbers[name]) is not None:  # else it has been in no quorum yet
                waiting.requested.add(number)
        status = block.rfind(_STATUS, start, end)
        if status >= 0:
            text = block[status + len(_STATUS) : block.find(b"\n", status)].rstrip(b"\r")
            waiting.status = text.decode(errors="replace") if _BLOCKED.search(text) else ""
            heartbeating = _HEARTBEATING.search(text)
            waiting.heartbeating = int(heartbeating[1]) if heartbeating else None

    def _last_before(self, block: bytes, end: int) -> float | None:
        """Time of the last line before ``end`` that has one."""
        while end > 0:
            after, end = end, block.rfind(b"\n", 0, end - 1) + 1
            stamp = block[end : min(after, end + STAMP_BYTES)]
            t = self._clock.seconds(stamp.decode(errors="replace"))
            if t is not None:
                return t
        return self._last

    def _time(self, block: bytes, position: int) -> float | None:
        start = block.rfind(b"\n", max(0, position - 200), position) + 1
        return self._clock.seconds(block[start : start + STAMP_BYTES].decode(errors="replace"))

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
        source = Source(self.file, offset + start)
        found.append((position, Event(t=t, kind=kind, fields=fields, source=source)))


def _failed_ids(block: bytes, position: int) -> list[str]:
    end = block.find(b"]", position)
    return block[position + len(_FAILURES) : end].decode(errors="replace").split(", ")


def _positions(block: bytes, needle: bytes) -> Iterator[int]:
    position = block.find(needle)
    while position >= 0:
        yield position
        position = block.find(needle, position + 1)
