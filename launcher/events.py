"""What the logs of replica groups say, as events. Pure: bytes in, events out.

Two kinds of log: a group's structured events (``.events.jsonl``), whose fields ``launcher/fields.py``
bounds, and its text logs, whose vocabulary is in ``launcher/patterns.py``. ``docs/events.md`` lists every kind.
Whatever the bytes, nothing is raised: a bad event is no event.
"""

from __future__ import annotations

import calendar
import dataclasses
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.fields import are_sound, is_group, is_time
from launcher.names import Names, split_id
from launcher.patterns import PATTERNS, Pattern


@dataclass(frozen=True, slots=True)
class Source:
    """Where an event was read."""

    file: str
    offset: int
    """Of the line's first byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened."""

    t: float
    """Unix seconds."""
    kind: str
    replica: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    source: Source | None = None
    line: str = ""
    """The line as it was read, at most ``LONGEST_SHOWN`` characters; of kinds that may tell of an end."""

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(name, default)


#: Kinds a replica group writes about itself in its structured events.
REPLICA_KINDS = frozenset(
    [
        "launch",
        "start",
        "ready",
        "quorum",
        "heal",
        "commit",
        "metrics",
        "progress",
        "weights",
        "error",
        "end",
        "exit",
        "gpu",
        "xid",
        "busy",
        "fenced",
        "stand_in",
        "leave",
        "action",
        "resize",
        "queued",
        "node",
    ]
)
#: Kinds that only a text log tells, where there are structured events too.
TEXT_ONLY_KINDS = frozenset(
    [
        "slurm_cancelled",
        "node_failed",
        "kill_request",
        "heartbeat_failed",
        "quorum_failed",
        "out_of_memory",
        "device_error",
        "nccl_error",
        "rank_failed",
        "task_failed",
        "fatal",
        "exception",
    ]
)
#: Kinds whose line is kept: they may tell of an end.
_SHOWN_KINDS = TEXT_ONLY_KINDS | {"error", "exit", "xid", "action"}

#: Characters of a line that are kept of it, and bytes that are looked at.
LONGEST_SHOWN, LONGEST_READ = 500, 4096
#: Events kept of a log that has had no time stamp yet.
MOST_EARLY = 200
#: Lines after its beginning for which a traceback's end is awaited.
LONGEST_TRACEBACK = 500

_COMPILED = [(pattern, re.compile(pattern.regex, re.ASCII)) for pattern in PATTERNS]
#: One pass over a line that tells most lines apart from those worth trying the table on.
_WORTH = re.compile(
    rb"should_commit=|loss: |Training completed|launching replica|\(attempt |reconfiguring for|healing |Loaded state dict|"
    rb"slurmstepd|tft-local|srun: error|kill request|heartbeat to lighthouse|lighthouse quorum |"
    rb"[Oo]ut ?[Oo]f ?[Mm]emory|oom[-_]kill|allocate memory|bad_alloc|memory limit|Xid|CUDA|ECC|"
    rb"fallen off|MEMORY|NCCL|nccl|Watchdog|exitcode|Root Cause|Failures:|rank +: \d|traceback :|Traceback|"
    rb"Fatal|terminate|Segm|Bus err|Abort|Illegal|Error|Exception|Interrupt"
)
#: What ``srun -l``, torchrun and torch put before a line, with its rank.
_PREFIX = re.compile(
    r"^(?:\[[A-Za-z_]*(\d{1,6})\]: ?| *(\d{1,6}): |\[titan\] (?!\d{4}-))", re.ASCII
)
_ANSI = re.compile(r"\x1b\[[0-9;:]*[A-Za-z]")
#: What a logger puts before its message.
_HEAD = re.compile(
    r"^(?:\[titan\] )?\d{4}-\d\d-\d\d[T ][\d:.,]{5,20}\S* (?:- [\w.]+ - [A-Z]+ - |\[\w+\] \[[\w:]+\] - )"
)
_CALM = re.compile(r"(?:^|[\s\[-])(?:INFO|DEBUG)(?:[\]:\s]|$)")
_SUMMARY = re.compile(r"^(?:(Root Cause) \(|Failures:| +rank +: (\d{1,6}) \()", re.ASCII)
_TRACEBACK = "Traceback (most recent call last):"
_RAISED = re.compile(r"^(?P<text>[A-Za-z_][\w.]{0,200}(?::.*)?)$", re.ASCII)
_STAMP = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d):(\d\d)(?:[.,](\d{3})\d{0,6})?(Z|[+-][01]\d:?[0-5]\d)?",
    re.ASCII,
)
_NUMBERS = frozenset(
    ["step", "rank", "attempt", "titan_step", "quorum_id", "max_step", "exit_code", "pid", "xid"]
)


class Clock:
    """Time stamps to Unix seconds, in the zone that they name, or else local time (or UTC). The
    minute is looked up once."""

    def __init__(self, *, utc: bool = False) -> None:
        self._seconds = calendar.timegm if utc else time.mktime
        self._minute = ""
        self._start = 0.0

    def seconds(self, text: str) -> float | None:
        """Unix seconds of the first time stamp in ``text``; None without one."""
        match = _STAMP.search(text)
        if match is None:
            return None
        day, minute, second, ms, zone = match.groups()
        if (key := f"{day} {minute}{zone or ''}") != self._minute:
            try:
                parts = time.strptime(key[:16], "%Y-%m-%d %H:%M")
                start = (calendar.timegm if zone else self._seconds)(parts)
            except (ValueError, OverflowError):
                return None
            if zone and zone != "Z":
                offset = int(zone[1:3]) * 3600 + int(zone[-2:]) * 60
                start -= offset if zone[0] == "+" else -offset
            if not 0 < start < 1e11:
                return None
            self._start, self._minute = start, key
        return self._start + int(second) + (int(ms) / 1000 if ms else 0.0)


class ReplicaLogReader:
    """Events in a replica group's text log (``.out`` or ``.err``)."""

    def __init__(self, file: str, replica: int | None = None, names: Names | None = None) -> None:
        """
        Args:
            replica: which group's log this is; learnt from its lines where they tell it.
            names: numbers of groups whose ids have none, as the lighthouse's log gave them. Such a
                group's lines belong to no group while that is not known.
        """
        self.file = file
        self._replica = replica
        self._names = Names() if names is None else names
        self._clock = Clock()
        self._now = 0.0
        self._known = 0
        """Up to where in the block ``_now`` is known."""
        self._early: list[Event] = []
        """Events before the first time stamp of all: they happened before the next one."""
        self._tracebacks: dict[str, int] = {}
        """Open tracebacks by the prefix of their lines, with the line in which they began."""
        self._root, self._rank = False, -1
        """In torchrun's summary: whether it tells of the root cause, and which rank."""
        self._read = 0
        """Lines read."""
        self.lines = 0
        """The same, without those of torchft's manager: most of these are known to say nothing."""

    def read(self, offset: int, block: bytes) -> Iterator[Event]:
        """Events in ``block`` (whole lines), which starts at ``offset`` of the file."""
        position = self._known = 0
        for raw in block[:-1].split(b"\n"):
            self._read += 1
            self.lines += b"torchft::manager" not in raw[:160]
            if self._early:
                stamp = self._clock.seconds(raw[:80].decode(errors="replace"))
                if stamp is not None:
                    yield from (dataclasses.replace(event, t=stamp) for event in self._early)
                    self._early = []
            if self._tracebacks or _WORTH.search(raw, 0, LONGEST_READ):
                event = self._event(raw[:LONGEST_READ], block, position, offset)
                if event is not None and event.t > 0:
                    yield event
                elif event is not None and len(self._early) < MOST_EARLY:
                    self._early.append(event)
            position += len(raw) + 1
        self._time_before(block, len(block))

    def _time_before(self, block: bytes, position: int) -> float:
        """Time of the nearest stamped line before ``position``: a line without a stamp
        (of a traceback, say) happened with the stamped one before it."""
        end = position
        while end > self._known:
            start = block.rfind(b"\n", 0, end - 1) + 1
            stamp = self._clock.seconds(block[start : start + 80].decode(errors="replace"))
            if stamp is not None:
                self._now = stamp
                break
            end = start
        self._known = position
        return self._now

    def _event(self, raw: bytes, block: bytes, position: int, offset: int) -> Event | None:
        shown = raw.decode(errors="replace").rstrip("\r")
        line, rank = _ANSI.sub("", shown).rpartition("\r")[2], ""
        whole = line
        while prefix := _PREFIX.match(line):
            rank = prefix[1] or prefix[2] or rank
            line = line[prefix.end() :]
        within = self._in_traceback(whole[: len(whole) - len(line)].rstrip(), line)
        if within:
            return None
        if summary := _SUMMARY.match(line):
            self._root, self._rank = (
                (self._root, int(summary[2])) if summary[2] else (bool(summary[1]), -1)
            )
            return None
        pattern, match = _understood(line)
        if match is None and within is None:
            pattern, match = _EXCEPTION, _RAISED.match(line)
        if pattern is None or match is None:
            return None
        fields: dict[str, Any] = {k: v for k, v in match.groupdict().items() if v is not None}
        replica = self._of(fields)
        for name in _NUMBERS & fields.keys():
            fields[name] = int(fields[name])
        if pattern.kind == "commit":
            fields["committed"] = fields["committed"] == "True"
        elif pattern.kind == "exit":
            fields["code"] = 0 if fields["reason"].startswith("finished") else 1
            fields["reason"] = fields["reason"].removeprefix("was ").removeprefix("failed: ")
        elif pattern.kind == "end":
            fields["code"] = 0
        elif pattern.kind == "metrics":
            fields["tokens_per_second"] = float(fields["tokens_per_second"].replace(",", ""))
            try:
                fields["loss"] = float(fields["loss"])
            except ValueError:
                return None
        elif pattern.kind == "rank_failed":
            if "rank" not in fields and self._rank >= 0:
                fields |= {"rank": self._rank, "root": self._root}
        elif rank and pattern.kind in TEXT_ONLY_KINDS:
            fields["rank"] = int(rank)
        text_at = 0
        if pattern.is_text:
            head = _HEAD.match(line)
            text_at = head.end() if head else 0
            fields["text"] = line[text_at:]
        elif "text" in fields:
            text_at = match.start("text")
        if "text" in fields:
            fields["text"] = fields["text"].strip()[:LONGEST_SHOWN]
        # A time in the text of an error is not the line's own.
        stamp = fields.pop("time", "") or ("" if "text" in fields and not text_at else line[:80])
        return Event(
            t=self._clock.seconds(stamp) or self._time_before(block, position),
            kind=pattern.kind,
            replica=replica,
            fields=fields,
            source=Source(self.file, offset + position),
            line=shown[:LONGEST_SHOWN] if pattern.kind in _SHOWN_KINDS else "",
        )

    def _of(self, fields: dict[str, Any]) -> int | None:
        """The group of a line's fields, which lose what tells it; from then on the reader's."""
        if "replica" in fields:
            self._replica = int(fields.pop("replica"))
        elif name := fields.pop("name", ""):
            uuid = split_id(name).uuid
            number = self._names.known(name)
            if uuid:
                fields["uuid"] = uuid
            if uuid or number is not None:
                self._replica = number
        return self._replica

    def _in_traceback(self, prefix: str, line: str) -> bool | None:
        """Whether ``line`` is in a traceback of those with its prefix: source code then; None where
        it ends one, and so names what was raised."""
        began = self._tracebacks.get(prefix)
        if line.endswith(_TRACEBACK):
            self._tracebacks[prefix] = self._read
            return True
        if began is None or self._read - began > LONGEST_TRACEBACK:
            self._tracebacks.pop(prefix, None)
            return False
        if not line or line[0].isspace():
            return True
        del self._tracebacks[prefix]
        return None


_EXCEPTION = next(pattern for pattern in PATTERNS if pattern.kind == "exception")


def _understood(line: str) -> tuple[Pattern | None, re.Match[str] | None]:
    """The first pattern that a line has."""
    calm = _CALM.search(line, 0, 80) is not None
    for pattern, regex in _COMPILED:
        if (pattern.calm or not calm) and (match := regex.search(line)):
            return pattern, match
    return None, None


class ReplicaEventReader:
    """Events that a replica group wrote itself (``.events.jsonl``)."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines = 0

    def read(self, offset: int, block: bytes) -> Iterator[Event]:
        """Events in ``block`` (whole lines), which starts at ``offset`` of the file."""
        for line in block[:-1].split(b"\n"):
            self.lines += 1
            event = parse_replica_event(line, Source(self.file, offset))
            if event is not None:
                yield event
            offset += len(line) + 1


def _parsed(line: bytes) -> Any:
    """The JSON of a line; of two that are run together, as after a writer that was killed, the last."""
    try:
        return json.loads(line)
    except ValueError:
        last = line.rfind(b'{"t":')
        if last <= 0:
            raise
        return json.loads(line[last:])


def parse_replica_event(line: bytes, source: Source | None = None) -> Event | None:
    """An event a replica group wrote (a line of its ``.events.jsonl``); None for another line."""
    try:
        raw = _parsed(line)
        t, kind, replica = raw.pop("t"), raw.pop("kind"), raw.pop("replica")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    # (A spare that is acted upon is no group yet, and a resize is of the whole run.)
    nobody = replica is None and kind in ("action", "resize")
    sound = is_time(t) and (nobody or is_group(replica)) and are_sound(raw)
    if type(kind) is not str or kind not in REPLICA_KINDS or not sound:
        return None
    shown = line[:LONGEST_READ].decode(errors="replace").strip() if kind in _SHOWN_KINDS else ""
    return Event(
        t=float(t),
        kind=kind,
        replica=replica,
        fields=raw,
        source=source,
        line=shown[:LONGEST_SHOWN],
    )
