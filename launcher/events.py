"""What the logs say, as events. Pure: bytes in, events out.

Three kinds of log: the lighthouse's, a replica group's structured events
(``.events.jsonl``), and a replica group's text logs. ``PATTERNS`` is the whole vocabulary of
the text logs, each with a line as it was really printed. ``docs/events.md`` lists every kind.
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
    ]
)

#: Kinds that only a text log tells, where there are structured events too.
TEXT_ONLY_KINDS = frozenset(
    [
        "slurm_cancelled",
        "kill_request",
        "heartbeat_failed",
        "quorum_failed",
        "out_of_memory",
        "device_error",
        "rank_failed",
        "exception",
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """One line of a text log that means something."""

    kind: str
    regex: str
    """Named groups become fields; ``replica`` names the replica group, ``time`` the time."""
    sample: str
    seen: str
    """Version of the program that printed the sample."""


_ID = r"\[\w*?(?P<replica>\d+):(?P<uuid>[^/\]]*)/(?P<rank>\d+) - step (?P<step>\d+)\] "

#: The vocabulary of replica groups' text logs, in the order in which it is tried.
PATTERNS = (
    Pattern(
        kind="commit",
        regex=_ID + r"should_commit=(?P<committed>True|False) enough_replicas=",
        sample="[titan] 2026-11-20 14:31:46,890 - torchft.manager - INFO - [torchtitan_ft_0:99-c/0 "
        "- step 10] should_commit=False enough_replicas=True, errored=Read error",
        seen="torchft-nightly 2026.10.26",
    ),
    Pattern(
        kind="metrics",
        regex=r"- INFO - .*?step: +(?P<titan_step>\d+) +.*?loss: +(?P<loss>[-\d.einfa]+).*?"
        r"tps: (?P<tokens_per_second>[\d,]+)",
        sample="[titan] 2026-11-20 13:59:24,073 - root - INFO - step: 36  loss:  6.04175  "
        "grad_norm:  0.8876  memory: -0.00GiB(-0.00%)  tps: 609  tflops: 0.02  mfu: 0.01%",
        seen="torchtitan 0.2.2",
    ),
    Pattern(
        kind="launch",
        regex=r"^\[[-\d]+ [:\d]+\] launching replica (?P<replica>\d+) \(attempt (?P<attempt>\d+)\) "
        r"on (?P<host>\S+)",
        sample="[2026-11-20 14:31:20] launching replica 0 (attempt 1) on worker-0",
        seen="this kit 0.1",
    ),
    Pattern(
        kind="exit",
        regex=r"^\[[-\d]+ [:\d]+\] replica (?P<replica>\d+) \(attempt (?P<attempt>\d+)\) on "
        r"(?P<host>\S+) (?P<reason>(?:failed: |was stopped by |finished).*?)"
        r"(?:; every rank's output.*| \(node down.*)?$",
        sample="[2026-11-20 14:31:47] replica 1 (attempt 1) on worker-1 was stopped by SIGTERM "
        "(node down, requeue, time limit or cancel)",
        seen="this kit 0.1",
    ),
    Pattern(
        kind="quorum",
        regex=_ID + r"reconfiguring for quorum_id=(?P<quorum_id>\d+)",
        sample="[titan] 2026-11-20 14:31:48,802 - torchft.manager - INFO - [torchtitan_ft_0:99-c/0 "
        "- step 10] reconfiguring for quorum_id=2",
        seen="torchft-nightly 2026.10.26",
    ),
    Pattern(
        kind="healing",
        regex=_ID
        + r"healing required, fetching checkpoint metadata from .*max_step=(?P<max_step>\d+)",
        sample="[titan] 2026-11-20 14:32:04,220 - torchft.manager - INFO - [torchtitan_ft_1:7a-1/0 "
        "- step 0] healing required, fetching checkpoint metadata from "
        "recover_src_manager_address='http://worker-0:40989' max_step=34",
        seen="torchft-nightly 2026.10.26",
    ),
    Pattern(
        kind="healed",
        regex=_ID + r"Loaded state dict\.",
        sample="[titan] 2026-11-20 14:32:05,001 - torchft.manager - INFO - [torchtitan_ft_1:7a-1/0 "
        "- step 34] Loaded state dict.",
        seen="torchft-nightly 2026.10.26",
    ),
    Pattern(
        kind="slurm_cancelled",
        # A step that is cancelled for no reason is one whose srun our own launcher has killed.
        regex=r"(?:slurmstepd|tft-local)\S*: error: \*\*\* (?:JOB|STEP(?=.* DUE TO )) \S+ ON (?P<host>\S+) CANCELLED AT "
        r"(?P<time>[-\dT:]+)(?: DUE TO (?P<due>[A-Z ]+?))?(?:,.*)? \*\*\*",
        sample="slurmstepd-worker-1: error: *** JOB 5185080 ON worker-1 CANCELLED AT "
        "2026-11-20T14:31:46 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***",
        seen="Slurm 22.05.8",
    ),
    Pattern(
        kind="kill_request",
        regex=r"got kill request: (?P<text>.*)",
        sample="2026-11-20T14:31:46.888 [WARN] [torchft::manager] - [Replica torchtitan_ft_1] got "
        "kill request: killed from dashboard",
        seen="torchft-nightly 2026.10.26",
    ),
    Pattern(
        kind="heartbeat_failed",
        regex=r"Failed to send heartbeat to lighthouse: (?P<text>.*)",
        sample="2026-11-20T14:31:46.888 [WARN] [torchft::manager] - [Replica torchtitan_ft_1] Failed "
        "to send heartbeat to lighthouse: transport error",
        seen="torchft-nightly 2026.10.26",
    ),
    Pattern(
        kind="quorum_failed",
        regex=r"lighthouse quorum failed\. error: (?P<text>.*)",
        sample="2026-11-20T14:31:46.888 [WARN] [torchft::manager] - [Replica torchtitan_ft_1] "
        "lighthouse quorum failed. error: status: Unavailable",
        seen="torchft-nightly 2026.10.26",
    ),
    Pattern(
        kind="out_of_memory",
        regex=r"(?P<text>(?:torch\.)?OutOfMemoryError.*|CUDA out of memory.*|.*oom[-_]kill.*|"
        r"Out Of Memory.*|.*(?:Cannot|can't) allocate memory.*|MemoryError.*|.*std::bad_alloc.*)",
        sample="torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        seen="torch 2.13.0",
    ),
    Pattern(
        kind="device_error",
        regex=r"(?P<text>(?:.*NVRM: )?Xid.*|.*CUDA error: .*|.*ncclUnhandledCudaError.*|"
        r".*NCCL error.*|.*uncorrectable ECC.*)",
        sample="RuntimeError: CUDA error: an illegal memory access was encountered",
        seen="torch 2.13.0",
    ),
    Pattern(
        kind="rank_failed",
        regex=r"exitcode +: (?P<exit_code>-?\d+) +\(pid: (?P<pid>\d+)\)",
        sample="  exitcode  : -9 (pid: 7144)  (SIGKILL)",
        seen="torch 2.13.0",
    ),
    Pattern(
        kind="exception",
        regex=r"^(?P<text>[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b(?:: .*)?)$",
        sample="RuntimeError: [pair.cc:537] Read error [127.0.0.1]:57561: Connection reset by peer.",
        seen="Python 3.11",
    ),
)

#: Lines looked back over for a time stamp.
FARTHEST_STAMP = 500
#: Events kept of a log that has had no time stamp yet.
MOST_EARLY = 200

_COMPILED = [(pattern.kind, re.compile(pattern.regex)) for pattern in PATTERNS]
#: One pass over a line that tells most lines apart from those worth trying the table on.
_WORTH = re.compile(
    rb"should_commit=|step: |launching replica|^\[\d|reconfiguring for|healing required|"
    rb"Loaded state dict|slurmstepd|tft-local|kill request|heartbeat to lighthouse|quorum failed|"
    rb"[Oo]ut ?[Oo]f ?[Mm]emory|oom[-_]kill|allocate memory|MemoryError|bad_alloc|Xid|CUDA error|NCCL|nccl|ECC|exitcode|"
    rb"Error|Exception|Interrupt"
)
_DECORATION = re.compile(r"^(?:\[[a-z]*\d+\]: ?)+|\x1b\[[0-9;]*m")
_STAMP = re.compile(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d):(\d\d)(?:[.,](\d{3}))?")
_NUMBERS = {"step", "rank", "attempt", "titan_step", "quorum_id", "max_step", "exit_code", "pid"}


class Clock:
    """Local (or UTC) time stamps to Unix seconds; the minute is looked up once."""

    def __init__(self, *, utc: bool = False) -> None:
        self._seconds = calendar.timegm if utc else time.mktime
        self._minute = ""
        self._start = 0.0

    def seconds(self, text: str) -> float | None:
        """Unix seconds of the first time stamp in ``text``; None without one."""
        match = _STAMP.search(text)
        if match is None:
            return None
        day, minute, second, ms = match.groups()
        if (key := f"{day} {minute}") != self._minute:
            try:
                self._start = self._seconds(time.strptime(key, "%Y-%m-%d %H:%M"))
            except (ValueError, OverflowError):
                return None
            self._minute = key
        return self._start + int(second) + (int(ms) / 1000 if ms else 0.0)


class ReplicaLogReader:
    """Events in a replica group's text log (``.out`` or ``.err``)."""

    def __init__(self, file: str, replica: int | None = None) -> None:
        self._file = file
        self._replica = replica
        """Which group's log this is; learnt from its lines when not given."""
        self._clock = Clock()
        self._now = 0.0
        self._early: list[Event] = []
        """Events before the first time stamp of all: they happened before the next one."""
        self.lines = 0

    def read(self, offset: int, block: bytes) -> Iterator[Event]:
        """Events in ``block`` (whole lines), which starts at ``offset`` of the file."""
        position = 0
        for raw in block[:-1].split(b"\n"):
            self.lines += 1
            if self._early:
                stamp = self._clock.seconds(raw[:80].decode(errors="replace"))
                if stamp is not None:
                    yield from (dataclasses.replace(event, t=stamp) for event in self._early)
                    self._early = []
            if _WORTH.search(raw):
                line = _DECORATION.sub("", raw.decode(errors="replace"))
                t = self._clock.seconds(line) or self._time_before(block, position)
                event = self._event(line, t, offset + position)
                if event is not None and t > 0:
                    yield event
                elif event is not None and len(self._early) < MOST_EARLY:
                    self._early.append(event)
            position += len(raw) + 1
        self._now = self._time_before(block, len(block))

    def _time_before(self, block: bytes, position: int) -> float:
        """Time of the nearest stamped line before ``position``: a line without a stamp
        (of a traceback, say) happened with the stamped one before it."""
        for _ in range(FARTHEST_STAMP):
            if position <= 0:
                break
            start = block.rfind(b"\n", 0, position - 1) + 1
            stamp = self._clock.seconds(block[start : start + 80].decode(errors="replace"))
            if stamp is not None:
                return stamp
            position = start
        return self._now

    def _event(self, line: str, t: float, offset: int) -> Event | None:
        for kind, regex in _COMPILED:
            match = regex.search(line)
            if match is None:
                continue
            fields: dict[str, Any] = {k: v for k, v in match.groupdict().items() if v is not None}
            fields.pop("time", None)
            if "replica" in fields:
                self._replica = int(fields.pop("replica"))
            for name in _NUMBERS & fields.keys():
                fields[name] = int(fields[name])
            if kind == "commit":
                fields["committed"] = fields["committed"] == "True"
            if kind == "exit":
                fields["code"] = 0 if fields["reason"].startswith("finished") else 1
                fields["reason"] = fields["reason"].removeprefix("was ").removeprefix("failed: ")
            if kind == "metrics":
                fields["tokens_per_second"] = float(fields["tokens_per_second"].replace(",", ""))
                try:
                    fields["loss"] = float(fields["loss"])
                except ValueError:
                    return None
            if "text" in fields:
                fields["text"] = fields["text"].strip()[:500]
            return Event(
                t=t,
                kind=kind,
                replica=self._replica,
                fields=fields,
                source=Source(self._file, offset),
            )
        return None


class ReplicaEventReader:
    """Events that a replica group wrote itself (``.events.jsonl``)."""

    def __init__(self, file: str) -> None:
        self._file = file
        self.lines = 0

    def read(self, offset: int, block: bytes) -> Iterator[Event]:
        """Events in ``block`` (whole lines), which starts at ``offset`` of the file."""
        for line in block[:-1].split(b"\n"):
            self.lines += 1
            event = parse_replica_event(line, Source(self._file, offset))
            if event is not None:
                yield event
            offset += len(line) + 1


def parse_replica_event(line: bytes, source: Source | None = None) -> Event | None:
    """An event a replica group wrote (a line of its ``.events.jsonl``); None for another line."""
    try:
        raw = json.loads(line)
        t, kind = float(raw.pop("t")), str(raw.pop("kind"))
        replica = raw.pop("replica")
        # (A spare that is acted upon is no group yet, and a resize is of the whole run.)
        if replica is not None or kind not in ("action", "resize"):
            replica = int(replica)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if kind not in REPLICA_KINDS or not 0 <= t < 1e11:
        return None
    return Event(t=t, kind=kind, replica=replica, fields=raw, source=source)
