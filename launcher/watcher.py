"""Gathers what there is to see of a run: its logs, its events, and Slurm's word."""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from launcher import sources
from launcher.events import Event
from launcher.findings import Finding, Snapshot, judge
from launcher.folding import Fold
from launcher.lighthouse_log import LighthouseReader, Waiting
from launcher.model import BlindError, GroupState, UsageError
from launcher.rundir import RunDir
from launcher.scheduler import Scheduler
from launcher.slurm import Job, Node
from launcher.sources import Log, Missing
from launcher.state import Notice, RunState
from launcher.witness import Witness

#: Seconds between two questions to Slurm.
ASK_EVERY = 2.0
#: The same while somebody acts on the answer and a group is away.
ASK_EAGERLY = 0.5
#: Seconds between two questions about nodes; while a group is lost, they are asked about with
#: the jobs: a node may fall silent for some seconds only.
ASK_NODES_EVERY = 10.0
#: Seconds for which a fresh event is held back, so that events of several files are folded
#: in the order in which they happened. (What comes later than that is put right afterwards.)
SETTLE = 0.4
#: Reading all logs again takes at most this part of the time.
READ_AGAIN = 0.01


#: States of a group that is not training, and might be with some help.
AWAY = frozenset({GroupState.PENDING, GroupState.REQUEUED, GroupState.LOST})


class Watcher:
    """Reads one run; every look folds in what is new."""

    def __init__(
        self,
        logs: Callable[[], list[Log]],
        state: Callable[[], RunState],
        *,
        run: RunDir | None = None,
        slurm: Scheduler | None = None,
    ) -> None:
        """Watch what ``logs`` opens, from the first byte, from what ``state`` begins with."""
        self.blind: dict[str, str] = {}
        """Sources that could not be read at the last look, with why."""
        self.live_tasks: int | None = None
        """Array tasks that Slurm may still run; None until it could be asked."""
        self._open, self._new = logs, state
        self._run = run
        self._slurm = slurm
        self._logs = logs()
        self._fold = Fold(self._beginning())
        self._missing = Missing(run)
        self.jobs: list[Job] = []
        """The run's array tasks, as last asked."""
        self.jobs_asked = float("-inf")
        """When that question was put, monotonic seconds."""
        self.eager = False
        """Whether Slurm is asked often while a group is away: somebody acts on the answer."""
        self.nodes: dict[str, Node] = {}
        """Slurm's nodes by name, as last asked."""
        self.witness: Witness | None = None
        """Who records what Slurm says, if anybody here does."""
        self._asked = self._nodes_asked = float("-inf")
        self._asked_at = 0.0
        """When Slurm was asked last, Unix seconds."""
        self._side = ThreadPoolExecutor(1, thread_name_prefix="slurm")
        self._answer: Future[list[Job]] | None = None
        self._slurm_problem = self._nodes_problem = ""
        self._held: list[tuple[float, int, Event]] = []
        self._final = False
        """Whether the present look is the last one."""
        self._numbers = itertools.count()
        self._read_again_after = float("-inf")
        self.on_event: Callable[[RunState, Event], None] = lambda state, event: None
        """Called after each event has been folded in (a history, for example)."""

    @classmethod
    def of_run(cls, run: RunDir, slurm: Scheduler | None = None) -> Watcher:
        """Watch a run of ours by everything in its directory.

        Raises:
            UsageError: it has not started, or its folder was renamed.
        """
        manifest = run.manifest()
        if manifest.run != run.name:
            raise UsageError(
                f"{run.path} holds the run {manifest.run}, whose files have its name: give the folder "
                "that name again"
            )

        def state() -> RunState:
            return RunState(
                manifest.replicas or manifest.group_size,
                manifest.steps,
                nodes_per_group=manifest.nodes_per_group,
                sync_every=manifest.sync_every,
            )

        return cls(lambda: sources.of_run(run, manifest), state, run=run, slurm=slurm)

    @classmethod
    def of_files(cls, lighthouse_log: Path | None, replica_logs: Sequence[Path]) -> Watcher:
        """Watch bare log files, of a run of anybody's."""
        return cls(lambda: sources.of_files(lighthouse_log, replica_logs), lambda: RunState(0))

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._side.shutdown(wait=False, cancel_futures=True)
        if self.witness is not None:
            self.witness.close()
        self._close_logs()

    @property
    def state(self) -> RunState:
        """Where the run stands; always the same object."""
        return self._fold.state

    def look(self, *, final: bool = False) -> list[Notice]:
        """Read what is new; returns its story in order of time.

        Args:
            final: hold nothing back for late lines of other files.
        """
        self.blind = {}
        self._final = final
        began = time.monotonic()
        notices = self._read(final=final)
        if self._fold.forgot and (final or began > self._read_again_after):
            notices += self._read_all_again(final=final)
            now = time.monotonic()
            self._read_again_after = now + (now - began) / READ_AGAIN
        notices += self._ask(wait=final)
        if final:
            notices += self._read(final=True)  # what Slurm has just said
        notices += self._fold.correct(now=final)
        committed = any(group.commits for group in self.state.groups.values())
        self.blind |= self._missing.look(self._logs, final=final, committed=committed)
        self.state.observe_waiting(self.waiting, self.present if final else time.time())
        return notices

    def _read(self, *, final: bool) -> list[Notice]:
        """Read what is new in the logs, and fold in what has settled."""
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
            notices += self._fold_until(min(reached[key] for key in unread))
        for log in self._logs if final else ():
            self._hold_rest(log)
        for log in self._logs if final else ():
            newest = log.reader.newest if isinstance(log.reader, LighthouseReader) else None
            if newest is not None and self._is_news(newest):
                self._put_in_line(newest)
        return notices + self._fold_until(float("inf") if final else time.time() - SETTLE)

    def _read_all_again(self, *, final: bool) -> list[Notice]:
        """Begin anew with the first byte of every log; what was told is not told again."""
        self._close_logs()
        self._logs, self._held = self._open(), []
        self._fold.begin_again(self._beginning())
        told, self.on_event, before = (
            self.state.last_event,
            lambda state, event: None,
            self.on_event,
        )
        try:
            return [notice for notice in self._read(final=final) if notice.t > told]
        finally:
            self.on_event = before

    def _beginning(self) -> RunState:
        state = self._new()
        if self._slurm is not None:
            state.scheduler = self._slurm.name
        return state

    def _close_logs(self) -> None:
        for log in self._logs:
            log.tail.close()

    def _hold(self, log: Log, offset: int, block: bytes) -> float:
        """Put the events of a block in line, in order of time; returns the latest time."""
        latest = float("-inf")
        if log.taken is not None and log.taken[0] == offset:
            block = block.removeprefix(log.taken[1] + b"\n")  # its first line is read already
            offset += len(log.taken[1]) + 1
            log.taken = None
        log.reader.file = log.tail.current
        for event in log.reader.read(offset, block):
            log.events += 1
            latest = max(latest, event.t)
            if log.wanted(event) and self._is_news(event):
                self._put_in_line(event)
        return latest

    def _is_news(self, event: Event) -> bool:
        """Whether it may change anything: not the steps of groups that tell of them."""
        if event.kind != "steps":
            return True
        groups = self.state.groups
        return any(r not in groups or not groups[r].tells for r, _ in event.fields["steps"])

    def _hold_rest(self, log: Log) -> None:
        """Take a last line without a newline, if it is whole: its writer was killed."""
        rest = log.tail.rest()
        if rest is None or rest == log.taken:
            return
        offset, line = rest
        cut_off = b"Quorum! " in line and b"created: " not in line
        if not (isinstance(log.reader, LighthouseReader) and cut_off):
            self._hold(log, offset, line + b"\n")
            log.taken = rest

    def _put_in_line(self, event: Event) -> None:
        # While others come, one from a clock that is ahead does not wait until then.
        t = event.t if self._final else min(event.t, time.time())
        heapq.heappush(self._held, (t, next(self._numbers), event))

    def _fold_until(self, until: float) -> list[Notice]:
        """Fold in what is in line from before ``until``."""
        notices = []
        while self._held and self._held[0][0] < until:
            event = heapq.heappop(self._held)[2]
            notices += self._fold.take(event)
            self.on_event(self.state, event)
        return notices

    def findings(self, now: float | None = None, *, over: bool = False) -> list[Finding]:
        """What is wrong; ``now`` defaults to the present.

        Args:
            over: whether that Slurm has no task left counts as the run's end. (A moment later a
                follower would know.)
        """
        return judge(
            Snapshot(
                state=self.state,
                now=time.time() if now is None else now,
                waiting=self.waiting,
                blind=self.blind,
                lines={str(log.tail.path): (log.reader.lines, log.events) for log in self._logs},
                job=str(self._run.number) if self._run else "<job>",
                over=over,
                tasks={job.task: job.name for job in self.jobs if job.task is not None},
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
            try:
                self.nodes = {node.name: node for node in slurm.nodes()}
                self._nodes_problem = ""
            except BlindError as error:
                self._nodes_problem = str(error)
        return jobs

    def _ask(self, *, wait: bool) -> list[Notice]:
        """Slurm's word, asked for on the side: a slow controller must not hold up the logs."""
        if self._slurm is None or self._run is None or self.state.finished:
            return []
        away = self.eager and any(g.state in AWAY for g in self.state.groups.values())
        every = ASK_EAGERLY if away else ASK_EVERY
        if self._answer is None and time.monotonic() - self._asked >= every:
            self._asked, self._asked_at = time.monotonic(), round(time.time(), 3)
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
                self.jobs, self.jobs_asked = jobs, self._asked
                notices = self._note(jobs)
        name = self.state.scheduler
        if self._slurm_problem or self._nodes_problem:
            self.blind[name] = self._slurm_problem or f"its nodes: {self._nodes_problem}"
        return notices

    def _note(self, jobs: list[Job]) -> list[Notice]:
        """Take in what belongs to the story of what Slurm has just said.

        At once: who acts on it must know that a group is requeued before he sees it in the queue.
        Where somebody else records it, what is read in his record counts.
        """
        events = self.state.observe(jobs, self._asked_at)
        events += self.state.observe_nodes(self.nodes.values(), self._asked_at)
        mine = not events or self.witness is None or self.witness.record(events)
        notices = []
        for event in events if mine or self.eager else ():
            notices += self._fold.take(event)
            self.on_event(self.state, event)
        return notices
