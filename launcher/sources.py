"""What a run can be read from: its logs, how each is read, and which of them are missing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.events import TEXT_ONLY_KINDS, Event, ReplicaEventReader, ReplicaLogReader
from launcher.lighthouse_log import LighthouseReader
from launcher.names import Names
from launcher.rundir import Manifest, RunDir
from launcher.tail import Tail

#: Bytes of the lighthouse's log read in one go: its lines are long, its events few.
LIGHTHOUSE_CHUNK = 4 << 20
#: Seconds for which a file that was promised or read before may be missing: one that is rotated is
#: for a moment, and a shared file system shows a new one late.
MISSING_SECONDS = 10.0


class Reader(Protocol):
    """Turns blocks of one log into events."""

    file: str
    """Name of the file that the next block is of."""
    lines: int

    def read(self, offset: int, block: bytes) -> Iterator[Event]: ...


@dataclass(slots=True)
class Log:
    """One log that is followed."""

    tail: Tail
    reader: Reader
    wanted: Callable[[Event], bool]
    events: int = 0
    taken: tuple[int, bytes] | None = None
    """A last line without a newline that was read nevertheless, and its offset."""
    promise: Path | None = None
    """A file that says that this log must be there."""
    named: bool = False
    """Whether a person named it: then it must be there."""


def everything(event: Event) -> bool:
    """Wants every event."""
    return True


def only_text(event: Event) -> bool:
    """Wants of a text log what no structured event tells."""
    return event.kind in TEXT_ONLY_KINDS


def of_run(run: RunDir, manifest: Manifest) -> list[Log]:
    """All logs of a run of ours."""
    older = run.lighthouse_log.with_name(run.lighthouse_log.name + ".1")
    names = Names()
    logs = [_lighthouse(run.lighthouse_log, names, older)]
    for replica in range(manifest.group_size):
        for node in range(manifest.nodes_per_group):
            # Whoever runs the group takes its lease first.
            promise = run.lease(replica) if node == 0 else None
            logs.append(_structured(run.events(replica, node), promise))
        # The text logs tell again what the structured events say: only the rest is news.
        logs += [
            _text(run.log(replica, stream), names, replica, only_text) for stream in ("out", "err")
        ]
    for spare in range(manifest.group_size, manifest.group_size + manifest.spares):
        # Whatever group it has become says its log.
        logs += [_text(run.log(spare, stream), names, None, only_text) for stream in ("out", "err")]
    return [*logs, _structured(run.guardian_events), _structured(run.observed)]


def of_files(lighthouse_log: Path | None, replica_logs: Sequence[Path]) -> list[Log]:
    """Bare log files, of a run of anybody's; one that is named twice is read once."""
    replica_logs = list({path.resolve(): path for path in replica_logs}.values())
    names = Names()
    logs = [_lighthouse(lighthouse_log, names)] if lighthouse_log is not None else []
    structured = [path for path in replica_logs if path.suffix == ".jsonl"]
    told = {_replica_by_name(path.with_suffix("")) for path in structured} - {None}
    for path in replica_logs:
        if path in structured:
            logs.append(_structured(path))
            continue
        replica = _replica_by_name(path)
        # What a group's structured events tell is not told again by its text log.
        logs.append(_text(path, names, replica, only_text if replica in told else everything))
    for log in logs:
        log.named = True
    return logs


class Missing:
    """Finds logs that ought to be there and are not: they are never read as "nothing happened"."""

    def __init__(self, run: RunDir | None) -> None:
        self._run = run
        self._since: dict[Path, float] = {}
        """Since when each was missing, monotonic seconds."""

    def look(self, logs: Sequence[Log], *, final: bool, committed: bool) -> dict[str, str]:
        """Missing logs, with why they ought to be there.

        Args:
            final: nobody looks again: a moment is not waited for.
            committed: whether replica groups have committed, and so met in a quorum.
        """
        if self._run is not None and not self._run.path.is_dir():
            return {str(self._run.path): "the run's folder is gone"}
        missing = {}
        now = time.monotonic()
        for log in logs:
            path = log.tail.path
            why = "" if log.tail.exists() else self._why(log, committed=committed)
            if not why:
                self._since.pop(path, None)
            elif now - self._since.setdefault(path, now) >= MISSING_SECONDS or final:
                missing[str(path)] = why
        return missing

    def _why(self, log: Log, *, committed: bool) -> str:
        """Why a log that is not there ought to be; empty when it need not."""
        if log.named:
            return "there is no such file"
        if log.events:
            return "it is gone: it was read before"
        if log.promise is not None and log.promise.exists():
            return f"it is missing, though {log.promise.name} says that the group has started"
        if not committed or self._run is None or not isinstance(log.reader, LighthouseReader):
            return ""
        ours = self._run.manifest().lighthouse_name
        return "it is missing, though replica groups have met in a quorum" if ours else ""


def _structured(path: Path, promise: Path | None = None) -> Log:
    return Log(Tail(path), ReplicaEventReader(path.name), everything, promise=promise)


def _lighthouse(path: Path, names: Names, older: Path | None = None) -> Log:
    tail = Tail(path, older, LIGHTHOUSE_CHUNK)
    return Log(tail, LighthouseReader(path.name, names), everything)


def _text(path: Path, names: Names, replica: int | None, wanted: Callable[[Event], bool]) -> Log:
    return Log(Tail(path), ReplicaLogReader(path.name, replica, names), wanted)


def _replica_by_name(path: Path) -> int | None:
    """Logs of array tasks end in the task's index, as in ``tft-12_3.err``."""
    match = re.search(r"_(\d+)\.\w+$", path.name)
    return int(match[1]) if match else None
