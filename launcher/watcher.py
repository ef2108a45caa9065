"""Gathers what there is to see of a run: its logs, its events, and Slurm's word."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.events import TEXT_ONLY_KINDS, Event, ReplicaEventReader, ReplicaLogReader
from launcher.findings import Finding, Snapshot, judge
from launcher.lighthouse_log import LighthouseReader, Waiting
from launcher.model import BlindError, GroupState
from launcher.rundir import RunDir
from launcher.scheduler import Scheduler
from launcher.slurm import Job, Node
from launcher.state import Notice, RunState
from launcher.tail import Tail

#: Seconds between two questions to Slurm.
ASK_EVERY = 2.0
#: The same while somebody acts on the answer and a group is away.
ASK_EAGERLY = 0.5
#: Seconds between two questions about nodes; while a group is lost, they are asked about with
#: the jobs: a node may fall silent for some seconds only.
ASK_NODES_EVERY = 10.0
#: Bytes of the lighthouse's log read in one go: its lines are long, its events few.
LIGHTHOUSE_CHUNK = 4 << 20
#: Seconds for which a fresh event is held back, so that events of several files are folded
#: in the order in which they happened.
SETTLE = 0.4


#: States of a group that is not training, and might be with some help.
AWAY = frozenset({GroupState.PENDING, GroupState.REQUEUED, GroupState.LOST})


class Reader(Protocol):
    """Turns blocks of one log into events."""

    lines: int

    def read(self, offset: int, block: bytes) -> Iterator[Event]: ...


@dataclass(slots=True)
class Log:
    """One log that is followed."""

    tail: Tail
    reader: Reader
    wanted: Callable[[Event], bool]
    events: int = 0


class Watcher:
    """Reads one run; every look folds in what is new."""

    def __init__(
        self, logs: list[Log], state: RunState, *, run: RunDir | None, slurm: Scheduler | None
    ) -> None:
        self.state = state
        self.blind: dict[str, str] = {}
        """Sources that could not be read at the last look, with why."""
        self.live_tasks: int | None = None
        """Array tasks that Slurm may still run; None until it could be asked."""
        self._logs = logs
        self._run = run
        self._slurm = slurm
        if slurm is not None:
            state.scheduler = slurm.name
        self.jobs: list[Job] = []
        """The run's array tasks, as last asked."""
        self.jobs_asked = float("-inf")
        """When that question was put, monotonic seconds."""
        self.eager = False
        """Whether Slurm is asked often while a group is away: somebody acts on the answer."""
        self.nodes: dict[str, Node] = {}
        """Slurm's nodes by name, as last asked."""
        self._asked = self._nodes_asked = float("-inf")
        self._side = ThreadPoolExecutor(1, thread_name_prefix="slurm")
        self._answer: Future[list[Job]] | None = None
        self._slurm_problem = ""
        self._held: list[tuple[float, int, Event]] = []
        self._numbers = itertools.count()
        self.on_event: Callable[[RunState, Event], None] = lambda state, event: None
        """Called after each event has been folded in (a history, for example)."""

    @classmethod
    def of_run(cls, run: RunDir, slurm: Scheduler | None = None) -> Watcher:
        """Watch a run of ours by everything in its directory."""
        manifest = run.manifest()
        older = run.lighthouse_log.with_name(run.lighthouse_log.name + ".1")
        logs = [_lighthouse(run.lighthouse_log, older)]
        for replica in range(manifest.group_size):
            for node in range(manifest.nodes_per_group):
                path = run.events(replica, node)
                logs.append(Log(Tail(path), ReplicaEventReader(path.name), lambda event: True))
            # The text logs tell again what the structured events say: only the rest is news.
            logs += [
                _text(run.log(replica, stream), replica, lambda e: e.kind in TEXT_ONLY_KINDS)
                for stream in ("out", "err")
            ]
        for spare in range(manifest.group_size, manifest.group_size + manifest.spares):
            # Whatever group it has become says its log.
            logs += [
                _text(run.log(spare, stream), None, lambda e: e.kind in TEXT_ONLY_KINDS)
                for stream in ("out", "err")
            ]
        acts = run.guardian_events
        logs.append(Log(Tail(acts), ReplicaEventReader(acts.name), lambda event: True))
        state = RunState(
            manifest.replicas or manifest.group_size,
            manifest.steps,
            nodes_per_group=manifest.nodes_per_group,
            sync_every=manifest.sync_every,
        )
        return cls(logs, state, run=run, slurm=slurm)

    @classmethod
    def of_files(cls, lighthouse_log: Path | None, replica_logs: Sequence[Path]) -> Watcher:
        """Watch bare log files, of a run of anybody's."""
        logs = [_lighthouse(lighthouse_log)] if lighthouse_log is not None else []
        structured = [path for path in replica_logs if path.suffix == ".jsonl"]
        told = {_replica_by_name(path.with_suffix("")) for path in structured} - {None}
        for path in replica_logs:
            if path in structured:
                logs.append(Log(Tail(path), ReplicaEventReader(path.name), lambda event: True))
                continue
            replica = _replica_by_name(path)
            # What a group's structured events tell is not told again by its text log.
            news = (lambda e: e.kind in TEXT_ONLY_KINDS) if replica in told else (lambda e: True)
            logs.append(_text(path, replica, news))
        return cls(logs, RunState(0), run=None, slurm=None)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._side.shutdown(wait=False, cancel_futures=True)
        for log in self._logs:
            log.tail.close()

    def look(self, *, final: bool = False) -> list[Notice]:
        """Read what is new; returns its story in order of time.

        Args:
            final: hold nothing back for late lines of other files.
        """
        self.blind = {}
        notices = []
        # A long past is read in step, always going on with the log that is behind: only what
        # lies between the foremost and the hindmost is ever held.
        unread = {id(log): (log, log.tail.blocks()) for log in self._logs}
        reached = dict.fromkeys(unread, float("-inf"))
        while unread:
            behind = min(unread, key=lambda key: reached[key])
            log, blocks = unread[behind]
            try:
                offset, block = next(blocks)
            except StopIteration:
                del unread[behind]
                continue
            except OSError as error:
                self.blind[str(log.tail.path)] = error.strerror or str(error)
                del unread[behind]
                continue
            reached[behind] = max(reached[behind], self._hold(log, offset, block))
            notices += self._fold(min(reached[key] for key in unread))
        notices += self._fold(float("inf") if final else time.time() - SETTLE)
        notices += self._ask(wait=final)
        self.state.observe_waiting(self.waiting, self.present if final else time.time())
        return notices

    def _hold(self, log: Log, offset: int, block: bytes) -> float:
        """Put the events of a block in line, in order of time; returns the latest time."""
        latest = float("-inf")
        for event in log.reader.read(offset, block):
            log.events += 1
            latest = max(latest, event.t)
            if log.wanted(event):
                heapq.heappush(self._held, (event.t, next(self._numbers), event))
        return latest

    def _fold(self, until: float) -> list[Notice]:
        """Fold in what is in line from before ``until``."""
        notices = []
        while self._held and self._held[0][0] < until:
            event = heapq.heappop(self._held)[2]
            notices += self.state.apply(event)
            self.on_event(self.state, event)
        return notices

    def findings(self, now: float | None = None) -> list[Finding]:
        """What is wrong; ``now`` defaults to the present."""
        return judge(
            Snapshot(
                state=self.state,
                now=time.time() if now is None else now,
                waiting=self.waiting,
                blind=self.blind,
                lines={str(log.tail.path): (log.reader.lines, log.events) for log in self._logs},
                job=str(self._run.number) if self._run else "<job>",
            )
        )

    @property
    def present(self) -> float:
        """Time as of which a run is judged: a log of the past as of its own end."""
        return time.time() if self.live_tasks else self.state.last_event

    @property
    def asks(self) -> bool:
        """Whether there is a scheduler to ask."""
        return self._slurm is not None

    @property
    def waiting(self) -> Waiting:
        """What the lighthouse's next quorum waits for."""
        for log in reversed(self._logs):
            if isinstance(log.reader, LighthouseReader) and log.reader.lines:
                return log.reader.waiting
        return Waiting()

    def _ask_jobs_and_nodes(self, slurm: Scheduler, run: RunDir, every: float) -> list[Job]:
        jobs = slurm.jobs(*run.arrays())
        if time.monotonic() - self._nodes_asked >= every:
            self._nodes_asked = time.monotonic()
            with contextlib.suppress(BlindError):
                self.nodes = {node.name: node for node in slurm.nodes()}
        return jobs

    def _ask(self, *, wait: bool) -> list[Notice]:
        """Slurm's word, asked for on the side: a slow controller must not hold up the logs."""
        if self._slurm is None or self._run is None or self.state.finished:
            return []
        away = self.eager and any(g.state in AWAY for g in self.state.groups.values())
        every = ASK_EAGERLY if away else ASK_EVERY
        if self._answer is None and time.monotonic() - self._asked >= every:
            self._asked = time.monotonic()
            lost = any(i.where and i.recovered_at is None for i in self.state.incidents)
            every = 0.0 if lost else ASK_NODES_EVERY
            self._answer = self._side.submit(
                self._ask_jobs_and_nodes, self._slurm, self._run, every
            )
        notices = []
        if self._answer is not None and (wait or self._answer.done()):
            answer, self._answer = self._answer, None
            try:
                jobs = answer.result()
            except BlindError as error:
                self._slurm_problem, self.live_tasks = str(error), None
            else:
                self._slurm_problem, self.live_tasks = "", sum(job.live for job in jobs)
                self.jobs, self.jobs_asked, now = jobs, self._asked, time.time()
                notices = self.state.observe(jobs, now)
                notices += self.state.observe_nodes(self.nodes.values(), now)
        if self._slurm_problem:
            self.blind[self.state.scheduler] = self._slurm_problem
        return notices


def _lighthouse(path: Path, older: Path | None = None) -> Log:
    return Log(Tail(path, older, LIGHTHOUSE_CHUNK), LighthouseReader(path.name), lambda event: True)


def _replica_by_name(path: Path) -> int | None:
    """Logs of array tasks end in the task's index, as in ``tft-12_3.err``."""
    match = re.search(r"_(\d+)\.\w+$", path.name)
    return int(match[1]) if match else None


def _text(path: Path, replica: int | None, wanted: Callable[[Event], bool]) -> Log:
    return Log(Tail(path), ReplicaLogReader(path.name, replica), wanted)
