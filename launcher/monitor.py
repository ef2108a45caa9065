"""Follows a run and tells its story: lines as things happen, one pass, or data for tools."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.findings import Finding, Severity
from launcher.model import BlindError, CriticalError, GroupState, KitError
from launcher.outlets import Outlets
from launcher.rundir import Outputs, RunDir
from launcher.scheduler import LOCAL, Scheduler, cluster_of, scheduler_of
from launcher.screen import plain
from launcher.sinks import FRESH_SECONDS, Delivery
from launcher.slurm import Slurm
from launcher.snapshot import as_data
from launcher.state import Notice, RunState
from launcher.watcher import ASK_EVERY, Watcher
from launcher.witness import Witness
from launcher.words import clean, clock

#: Seconds between two looks at the logs.
LOOK_EVERY = 0.3
#: Seconds that Slurm may know no live task of a run before the run counts as over.
QUIET_SECONDS = 5.0
#: The same for one who acts: what it wants to do may have to wait for a Slurm that refuses.
ACTING_QUIET = 120.0
#: Seconds of silence after which the monitor says how far training is.
PROGRESS_EVERY = 30.0
#: Seconds for which Slurm may not answer before a run has started; then the monitor gives up.
BLIND_SECONDS = 120.0
#: The job script whose runs the monitor looks for in the queue.
SCRIPT = "llama3.1-8b-pretraining-torchft.sh"


def choose(outputs: Outputs, name: str | None, slurm: Slurm) -> RunDir:
    """The run to look at: the one named, else the newest, which may still be in the queue.

    Raises:
        UsageError: there is none, or none of that name.
    """
    if name is not None:
        number = name.removeprefix("tft-")
        if (
            number.isdecimal()
            and number.isascii()
            and not outputs.run_of_array(int(number)).path.is_dir()
        ):
            with contextlib.suppress(BlindError):
                if any(job.live for job in slurm.jobs(int(number))):
                    return outputs.run_of_array(int(number))
        return outputs.find(name)
    runs = outputs.runs()
    known = {array for run in runs for array in run.arrays()}
    with contextlib.suppress(BlindError):
        for array in reversed(slurm.own_arrays(str(Path.cwd()), SCRIPT)):
            if array not in known:
                return outputs.run_of_array(array)
        queue = slurm.in_queue()
        for run in reversed(runs):
            if _lives(run, queue):
                return run
    return outputs.find(None)


def _lives(run: RunDir, queue: frozenset[int]) -> bool:
    """Whether tasks of a run wait or run; ``queue``: the jobs that Slurm has."""
    try:
        if cluster_of(run) != LOCAL:
            return bool(queue.intersection(run.arrays()))
        return any(job.live for job in scheduler_of(run).jobs(*run.arrays()))
    except KitError:
        return False  # damaged, or of a machine whose daemon is gone


def await_start(run: RunDir, *, say: Callable[[str], None], slurm: Scheduler) -> None:
    """Wait until the first of a run's tasks has started, for as long as Slurm may start one.

    Raises:
        CriticalError: no task is left that could; carries what its error log says.
        BlindError: Slurm could not be asked for ``BLIND_SECONDS``.
    """
    told = ""
    blind_until = time.monotonic() + BLIND_SECONDS
    while not run.manifest_path.is_file():
        try:
            jobs = slurm.jobs(*run.arrays())
        except BlindError as error:
            if time.monotonic() > blind_until:
                raise
            if (text := f"{slurm.name} cannot be asked ({error}): trying again") != told:
                say(line(Notice(time.time(), text)))
                told = text
            time.sleep(ASK_EVERY)
            continue
        blind_until = time.monotonic() + BLIND_SECONDS
        if not any(job.live for job in jobs):
            said = run.last_words()
            raise CriticalError(f"run {run.name} did not start: {said or 'its logs say nothing'}")
        states = sorted({f"{job.state} ({job.reason})" for job in jobs})
        if (text := f"run {run.name} has not started yet: {', '.join(states)}") != told:
            say(line(Notice(time.time(), text)))
            told = text
        time.sleep(1.0)


#: Does for a run what it needs, after each look; returns what there is to tell of it.
Act = Callable[[Watcher], list[Notice]]


def follow(
    run: RunDir,
    *,
    say: Callable[[str], None],
    slurm: Scheduler,
    outlets: Outlets | None = None,
    act: Act | None = None,
) -> None:
    """Print a run's story line by line until it ends, and send it to the ``outlets``.

    Raises:
        UsageError: an outlet cannot be opened.
        CriticalError: the run ended without having finished, or did not start.
        BlindError: at the end, a source could not be read.
    """
    await_start(run, say=say, slurm=slurm)
    with Watcher.of_run(run, slurm) as watcher:
        watcher.eager, watcher.witness = act is not None, Witness(run)
        size = watcher.state.group_size
        say(f"run {run.name}: {size} replica groups, {os.path.relpath(run.path)}")
        spoke = time.monotonic()
        with (outlets or Outlets()).delivering(run, say=say) as delivery:
            for notices in looks(watcher, delivery, act):
                for notice in notices:
                    say(line(notice))
                if notices:
                    spoke = time.monotonic()
                elif time.monotonic() - spoke > PROGRESS_EVERY:
                    say(line(Notice(time.time(), progress(watcher.state))))
                    spoke = time.monotonic()
        for text in plain(watcher, run.name, watcher.present):
            say(text)
        conclude(watcher, run)


def progress(state: RunState) -> str:
    """How far training is, in one line."""
    losses = [g.loss for g in state.groups.values() if g.loss is not None]
    loss = f", loss {losses[0]:.4f}" if losses else ""
    of = f" of {state.steps}" if state.steps is not None else ""
    size = f"{len(state.members)} of {state.size} replica groups"
    return f"… step {state.step}{of}{loss}, {size}"


def looks(
    watcher: Watcher, delivery: Delivery | None = None, act: Act | None = None
) -> Iterator[list[Notice]]:
    """Look again and again until the run has ended, with findings told once as they come."""
    delivery = delivery or Delivery()
    told: dict[str, Finding] = {}
    quiet_since: float | None = None
    lived = False
    while True:
        notices = watcher.look()
        if act is not None:
            notices += act(watcher)
        lived = lived or bool(watcher.live_tasks)
        findings = watcher.findings()
        notices += _news(findings, told)
        blind = bool(watcher.blind)
        yield notices + delivery.deliver(watcher.state, notices, findings, blind=blind)
        if watcher.state.finished:
            break
        if watcher.live_tasks != 0:
            quiet_since = None
        elif quiet_since is None:
            quiet_since = time.monotonic()
        elif time.monotonic() - quiet_since > (QUIET_SECONDS if act is None else ACTING_QUIET):
            break
        time.sleep(LOOK_EVERY)
    notices = watcher.look(final=True)
    findings, blind = watcher.findings(), bool(watcher.blind)
    ended = ""
    # Of a run that was over long before the monitor came, nobody wants an alarm.
    if not watcher.state.finished and (
        lived or time.time() - watcher.state.last_event < FRESH_SECONDS
    ):
        ended = early_end(watcher.state)
        notices.append(Notice(time.time(), ended))
    yield notices + delivery.deliver(watcher.state, notices, findings, blind=blind, ended=ended)


def early_end(state: RunState) -> str:
    """How a run of which no task is left stands, without having finished."""
    of = f" of {state.steps}" if state.steps is not None else ""
    groups = ", ".join(
        f"replica {group.replica} {group.state.value}"
        for group in state.groups.values()
        if group.state is not GroupState.DONE
    )
    return f"the run ENDED EARLY at step {state.step}{of}: {groups[:300]}"


def _news(findings: list[Finding], told: dict[str, Finding]) -> list[Notice]:
    """Findings that were not there at the last look, and those that are gone."""
    now, current = time.time(), {finding.key: finding for finding in findings}
    news = [
        Notice(now, f"{finding.severity.value.upper()} {finding.kind}: {finding.message}")
        for key, finding in current.items()
        if key not in told
    ]
    news += [
        Notice(now, f"no longer: {finding.kind}")
        for key, finding in told.items()
        if key not in current
    ]
    told.clear()
    told.update(current)
    return news


def conclude(watcher: Watcher, run: RunDir) -> None:
    """Say by an error how a run that has ended stands.

    Raises:
        CriticalError: it did not finish.
        BlindError: it cannot be known.
    """
    if watcher.blind:
        raise BlindError("; ".join(f"{name}: {why}" for name, why in watcher.blind.items()))
    if watcher.state.finished:
        return
    raise CriticalError(f"run {run.name} ended before its last step: see the logs in {run.path}")


def once(
    watcher: Watcher,
    *,
    say: Callable[[str], None],
    as_json: bool,
    name: str = "",
    story: bool = True,
) -> int:
    """One pass; returns the exit code: 0 fine, 3 a critical finding, 4 blind.

    Args:
        name: the run's.
        story: whether to tell what happened, and not only how it stands.
    """
    notices = watcher.look(final=True)
    findings = watcher.findings(watcher.present, over=watcher.live_tasks == 0)
    if as_json:
        say(json.dumps(as_data(watcher.state, findings), indent=2, allow_nan=False))
    else:
        for text in [line(notice) for notice in notices] if story else []:
            say(text)
        for text in plain(watcher, name, watcher.present, findings):
            say(text)
    if watcher.blind:
        return BlindError.exit_code
    critical = any(finding.severity is Severity.CRITICAL for finding in findings)
    return CriticalError.exit_code if critical else 0


def line(notice: Notice) -> str:
    return f"{clock(notice.t)}  {clean(notice.text)}"
