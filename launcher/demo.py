"""The README's steps on one machine: lose a node, train on, come back, and a verdict."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from launcher.history import History
from launcher.interrupts import signals_ignored, stop_on_signals
from launcher.model import CriticalError, KitError, ReportFormat, UsageError
from launcher.monitor import line
from launcher.publish import write
from launcher.rundir import Outputs
from launcher.scheduler import LOCAL, SLURM
from launcher.stages import REPLICAS, LocalStage, SandboxStage, Stage, no_slurm
from launcher.state import Notice
from launcher.verdict import judge
from launcher.watcher import Watcher

LOST = 1
#: Steps that both replica groups train before the node is lost.
STEPS_BEFORE = 10
#: Seconds each stage may take before the demo gives up (imports dominate on two cores).
DEADLINES = {"submit": 60, "train": 180, "survive": 60, "requeue": 45, "recover": 150, "end": 300}
#: Seconds of silence after which the demo says how far training is.
QUIET = 5.0


class Demo:
    """One pass; ``say`` gets every line."""

    def __init__(
        self,
        outputs: Outputs,
        stage: Stage,
        say: Callable[[str], None],
        otherwise: Callable[[str], Stage] | None = None,
    ) -> None:
        """``otherwise``: where to play if that stage cannot be made, given why."""
        self._outputs = outputs
        self._stage = stage
        self._otherwise = otherwise
        self._say = say
        self._watcher: Watcher | None = None
        self._spoke = time.monotonic()
        self._resources = contextlib.ExitStack()

    def run(self) -> bool:
        """The whole story; True when the run recovered. Leaves nothing behind."""
        try:
            with stop_on_signals():
                return self._run()
        finally:
            with signals_ignored(), self._resources:
                self._stage.clean_up()

    def _run(self) -> bool:
        stage = self._set_up()

        self._title("The lighthouse, then two replica groups")
        run = stage.start(self._tell)
        self._wait("submit", run.manifest_path.is_file)
        watcher = self._watcher = self._resources.enter_context(
            Watcher.of_run(run, stage.scheduler(run))
        )
        state, history = watcher.state, History()
        watcher.on_event = history.note
        self._wait(
            "train",
            lambda: (
                len(state.members) == REPLICAS
                and all(group.step >= STEPS_BEFORE for group in state.groups.values())
            ),
        )

        attempt = state.groups[LOST].attempt
        self._title(stage.loss(state.groups[LOST]))
        stage.lose(run, state.groups[LOST], self._tell)
        survivor = state.groups[1 - LOST]
        at = survivor.step
        self._wait("survive", lambda: LOST not in state.members and survivor.step > at + 2)
        self._tell(f"replica {1 - LOST} trains on alone (step {survivor.step})")
        self._wait(
            "requeue",
            lambda: bool(state.groups[LOST].waiting) or state.groups[LOST].attempt > attempt,
        )
        stage.mend(self._tell)
        self._wait(
            "recover",
            lambda: (
                state.groups[LOST].attempt > attempt
                and any(i.replica == LOST and i.recovered_at is not None for i in state.incidents)
            ),
        )

        self._title("Both train to the last step")
        self._wait("end", lambda: state.finished)
        watcher.look(final=True)
        verdict = judge(state, LOST)
        self._say("")
        for text in verdict.lines():
            self._say(text)
        self._say(f"logs and events: {os.path.relpath(run.path)}")
        page = write(run, watcher, history, ReportFormat.HTML)
        self._say(f"report: {os.path.relpath(page)}")
        return verdict.recovered

    def _set_up(self) -> Stage:
        self._title(self._stage.title)
        try:
            self._stage.set_up(self._tell)
        except KitError as error:
            if self._otherwise is None:
                raise
            self._stage.clean_up()
            self._stage, self._otherwise = self._otherwise(f"it does not come up: {error}"), None
            return self._set_up()
        return self._stage

    def _wait(self, stage: str, condition: Callable[[], bool]) -> None:
        """Watch the run, telling its story, until ``condition``.

        Raises:
            CriticalError: it did not come true in time, or a task failed.
        """
        deadline = time.monotonic() + DEADLINES[stage]
        while not condition():
            watcher = self._watcher
            if watcher is not None:
                for notice in watcher.look():
                    self._tell(notice.text, notice.t)
                self._say_progress(watcher)
                if watcher.live_tasks == 0:
                    # Slurm may know of the end before its last lines have been read.
                    time.sleep(1.0)
                    for notice in watcher.look(final=True):
                        self._tell(notice.text, notice.t)
                    if not condition():
                        raise CriticalError(
                            f"{watcher.state.scheduler} has no task left (waiting for: {stage}); see the "
                            f"logs in {self._outputs.torchft}"
                        )
            if time.monotonic() > deadline:
                where = self._outputs.torchft
                raise CriticalError(
                    f"not within {DEADLINES[stage]} s (waiting for: {stage}); logs: {where}"
                )
            time.sleep(0.2)

    def _say_progress(self, watcher: Watcher) -> None:
        if time.monotonic() - self._spoke < QUIET:
            return
        groups = watcher.state.groups.values()
        parts = [f"replica {g.replica} {g.state.value.lower()} step {g.step}" for g in groups]
        losses = [f"loss {g.loss:.3f}" for g in groups if g.loss is not None][:1]
        self._tell("… " + ", ".join([*parts, *losses]))

    def _title(self, text: str) -> None:
        self._say("")
        self._say(f"== {text}")

    def _tell(self, text: str, t: float | None = None) -> None:
        self._spoke = time.monotonic()
        self._say(line(Notice(t if t is not None else time.time(), text)))


def run_demo(
    outputs: Path,
    folder: Path | None,
    steps: int,
    *,
    cluster: str = "",
    say: Callable[[str], None],
) -> int:
    """Run the demo; its exit code.

    Args:
        folder: of the sandbox; None: one of the demo's own.
        cluster: ``slurm`` or ``local``; empty: Slurm, where that can be had (or ``folder`` is
            given).

    Raises:
        CriticalError: the run did not recover.
        UsageError: there is no such cluster.
    """
    if cluster not in ("", SLURM, LOCAL):
        raise UsageError(f"--cluster must be {SLURM} or {LOCAL}, not {cluster!r}")
    started = time.monotonic()
    place = Outputs(outputs.absolute())
    free = not cluster and folder is None
    why = "as asked for" if cluster == LOCAL else no_slurm() if free else ""
    local = partial(LocalStage, place, steps)
    stage: Stage = local(why) if why else SandboxStage(place, folder, steps)
    try:
        recovered = Demo(place, stage, say, local if free else None).run()
    except KeyboardInterrupt:
        say("interrupted: everything that was started is ended")
        return 130
    say(f"demo took {time.monotonic() - started:.0f} s")
    if not recovered:
        raise CriticalError("the run did not recover: see the verdict")
    return 0
