"""Gathers a run's logs and Slurm's word, folds them into its state, and tells the story."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from launcher.events import Event, parse_lighthouse_line, parse_replica_event
from launcher.model import BlindError, CriticalError, KitError
from launcher.rundir import RunDir
from launcher.slurm import Slurm
from launcher.state import Notice, RunState
from launcher.tail import Tail

#: Seconds between two looks at the logs, and between two questions to Slurm.
LOOK_EVERY, ASK_EVERY = 0.3, 2.0
#: Seconds that Slurm may know no live task of a run before the run counts as over.
SETTLE = 5.0

#: (tail, parser) of one log.
_Source = tuple[Tail, Callable[[bytes], Event | None]]


class Watcher:
    """Reads one run from its files; every look folds in what is new."""

    def __init__(self, run: RunDir, slurm: Slurm | None = None) -> None:
        manifest = run.manifest()
        self.run = run
        self.manifest = manifest
        self.state = RunState(manifest.group_size, manifest.steps)
        self.events: list[Event] = []
        self.blind = ""
        """Why a source could not be read at the last look; empty when all could."""
        self.live_tasks: int | None = None
        """Array tasks that Slurm may still run; None until it could be asked."""
        self._slurm = slurm
        self._asked = float("-inf")
        lighthouse = [run.lighthouse_log.with_name(run.lighthouse_log.name + ".1")]
        self._sources: list[_Source] = [
            (Tail(path), parse_lighthouse_line) for path in [*lighthouse, run.lighthouse_log]
        ]
        self._sources += [
            (Tail(run.events(replica)), parse_replica_event)
            for replica in range(manifest.group_size)
        ]

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files; a later look opens them again and tells all anew."""
        for tail, _ in self._sources:
            tail.close()

    def look(self) -> list[Notice]:
        """Read what is new; returns its story in order of time."""
        self.blind = ""
        fresh: list[Event] = []
        for tail, parse in self._sources:
            try:
                fresh += [event for _, line in tail.lines() if (event := parse(line)) is not None]
            except OSError as error:
                self.blind = f"{tail.path}: {error.strerror}"
        fresh.sort(key=lambda event: event.t)
        self.events += fresh
        notices = [notice for event in fresh for notice in self.state.apply(event)]
        return notices + self._ask()

    def _ask(self) -> list[Notice]:
        if self._slurm is None or time.monotonic() - self._asked < ASK_EVERY:
            return []
        self._asked = time.monotonic()
        try:
            jobs = self._slurm.jobs(self.manifest.array_job_id)
        except BlindError as error:
            self.blind = str(error)
            return []
        self.live_tasks = sum(job.live for job in jobs)
        return self.state.observe(jobs, time.time())


def follow(
    run: RunDir, *, say: Callable[[str], None], once: bool = False, slurm: Slurm | None = None
) -> None:
    """Print a run's story until it ends (or once, what is known of it).

    Raises:
        CriticalError: the run ended without having finished.
        BlindError: at the end, a source could not be read.
    """
    with Watcher(run, slurm or Slurm()) as watcher:
        _follow(watcher, say, once)


def _follow(watcher: Watcher, say: Callable[[str], None], once: bool) -> None:
    run = watcher.run
    say(
        f"run {run.name}: {watcher.manifest.group_size} replica groups, {os.path.relpath(run.path)}"
    )
    blind, quiet_since = "", None
    while True:
        for notice in watcher.look():
            say(line(notice))
        if watcher.blind != blind:
            blind = watcher.blind
            say(line(Notice(time.time(), f"BLIND: {blind}" if blind else "can see again")))
        if once or watcher.state.finished:
            break
        if watcher.live_tasks == 0:
            quiet_since = quiet_since or time.monotonic()
            if time.monotonic() - quiet_since > SETTLE:
                break
        else:
            quiet_since = None
        time.sleep(LOOK_EVERY)
    for text in table(watcher.state):
        say(text)
    if watcher.state.finished:
        return
    if blind:
        raise BlindError(blind)
    if not once:
        raise CriticalError(
            f"run {run.name} ended before its last step: see the logs in {run.path}"
        )


def line(notice: Notice) -> str:
    return f"{time.strftime('%H:%M:%S', time.localtime(notice.t))}  {notice.text}"


def table(state: RunState) -> list[str]:
    """The replica groups as they stand, a line each."""
    rows = [f"quorum {state.quorum_id}: {len(state.members)} of {state.group_size} replica groups"]
    for group in state.groups.values():
        loss = f"  loss {group.loss:.4f}" if group.loss is not None else ""
        waiting = f"  ({group.waiting})" if group.waiting else ""
        rows.append(
            f"replica {group.replica}  {group.state.value:<8}  step {group.step:>5}  "
            f"attempt {group.attempt}  failed commits {group.failed_commits}  "
            f"{group.host}{loss}{waiting}"
        )
    return rows


def read(run: RunDir) -> tuple[RunState, list[Event]]:
    """State and events of a run from its files alone.

    Raises:
        KitError: a file of it cannot be read.
    """
    with Watcher(run) as watcher:
        watcher.look()
        if watcher.blind:
            raise KitError(watcher.blind)
        return watcher.state, watcher.events
