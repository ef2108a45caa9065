"""Runs as a whole: which there are, ending one, and giving one more or fewer replica groups."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher import lease, local_run, orders, process
from launcher.files import read_json
from launcher.lighthouse import LighthouseDir
from launcher.lock import acquire
from launcher.model import BlindError, GroupState, KitError, UsageError
from launcher.opening import SCRIPT_JOB, TORCHTITAN_JOB
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.scheduler import LOCAL, Scheduler, cluster_of, scheduler_of
from launcher.slurm import Job, Slurm
from launcher.state import RunState
from launcher.supervisor import stop
from launcher.watcher import Watcher

#: Seconds that a run gets to end, and a replica group to leave.
END_SECONDS, LEAVE_SECONDS = 60.0, 60.0
LOOK_EVERY = 0.5
#: State of a run in a list, when the scheduler cannot be asked about it.
UNSEEN = "cannot be seen"


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One run in a list."""

    run: str
    started: float
    """Unix seconds; 0 when it has not."""
    state: str
    groups: str
    """How many replica groups train, of how many."""
    step: str


def listed(outputs: Outputs, slurm: Slurm, *, every: bool = False) -> Iterator[Summary]:
    """Runs, newest first; those that have ended only with ``every``, and those of which that
    cannot be known always."""
    try:
        in_queue = slurm.in_queue()
    except BlindError:
        in_queue = None
    for run in reversed(outputs.runs()):
        try:
            scheduler = scheduler_of(run, slurm)
        except KitError:
            scheduler = slurm
        live: list[Job] = []
        try:
            if scheduler is not slurm or _is_queued(run, in_queue):
                live = [job for job in scheduler.jobs(*run.arrays()) if job.live]
        except BlindError:
            if scheduler is slurm and not run.finished.exists():
                yield _unseen(run)
                continue
            # Else the daemon of a run of one machine is gone, and its tasks with it.
        if live or every:
            try:
                yield _summary(run, live)
            except (KitError, TypeError, ValueError, AttributeError) as error:
                why = f"damaged: {error}"
                yield Summary(run=run.name, started=0.0, state=why, groups="-", step="-")


def _is_queued(run: RunDir, in_queue: frozenset[int] | None) -> bool:
    """Whether Slurm has tasks of a run. Asked once for all: there may be hundreds of old runs."""
    if in_queue is None:
        raise BlindError("Slurm could not be asked")
    return bool(in_queue.intersection(run.arrays()))


def _unseen(run: RunDir) -> Summary:
    """A run of which it is not known whether it lives."""
    return Summary(run=run.name, started=0.0, state=UNSEEN, groups="-", step="-")


def _summary(run: RunDir, live: list[Job]) -> Summary:
    try:
        manifest = run.manifest()
    except KitError:
        state = "waiting" if live else "did not start"
        return Summary(run=run.name, started=0.0, state=state, groups="-", step="-")
    with Watcher.of_run(run) as watcher:
        watcher.look(final=True)
    known = watcher.state
    training = sum(group.state is GroupState.TRAINING for group in known.groups.values())
    word = "finished" if run.finished.exists() else "ended early"
    if live:
        word = "runs" if any(job.state == "RUNNING" for job in live) else "waiting"
    return Summary(
        run=run.name,
        started=manifest.created,
        state=word,
        groups=f"{training if live else 0}/{known.size}",
        step=f"{known.step}" + (f"/{known.steps}" if known.steps is not None else ""),
    )


# -- cancel ------------------------------------------------------------------------------


def cancel(run: RunDir, slurm: Scheduler, say: Callable[[str], None]) -> None:
    """End every task of a run, and the lighthouse that was started for it.

    Raises:
        KitError: Slurm refused, or the tasks did not end in time.
        BlindError: Slurm cannot be asked.
    """
    if cluster_of(run) == LOCAL:
        local_run.down(run, say)
        return
    arrays = run.arrays()
    # Each by itself: of two tasks of one index a common answer has the newer one only.
    live = [array for array in arrays if any(job.live for job in slurm.jobs(array))]
    for array in live:
        slurm.cancel(array)
    say(f"run {run.name}: {'cancelled' if live else 'nothing of it is in the queue'}")
    deadline = time.monotonic() + END_SECONDS
    while any(job.live for array in live for job in slurm.jobs(array)):
        if time.monotonic() > deadline:
            raise KitError(f"tasks of {run.name} still end after {END_SECONDS:g} s: squeue tells")
        time.sleep(LOOK_EVERY)
    if not run.submission.exists():
        return  # its lighthouse was not started for it
    with contextlib.suppress(BlindError):
        folder = LighthouseDir.of_run(run, run.manifest())
        address = folder.address()
        ours = address is not None and folder.claimed_by() == run.number
        if ours and _was_started_for_a_run(folder) and stop(folder, say):
            say(f"its lighthouse {folder.label} is ended")


def _was_started_for_a_run(folder: LighthouseDir) -> bool:
    address = folder.address()
    if address is None:
        return False
    with contextlib.suppress(OSError):
        return b"\0--with-run\0" in Path(f"/proc/{address.pid}/cmdline").read_bytes()
    return False


def requeue(run: RunDir, replica: int, slurm: Scheduler) -> None:
    """End a replica group's task if it runs, and start it again.

    Raises:
        UsageError: the run has no such group.
        KitError: the scheduler refused, or could not be asked.
    """
    manifest = run.manifest()
    if not 0 <= replica < manifest.group_size:
        raise UsageError(f"{run.name} has replica groups 0 to {manifest.group_size - 1}")
    task = task_of(run, replica)
    jobs = [job for job in slurm.jobs(*run.arrays()) if job.task == task]
    if not jobs:
        raise UsageError(f"replica {replica} of {run.name} has no task that is known any more")
    slurm.requeue(jobs[0].name)


def task_of(run: RunDir, replica: int) -> int:
    """Index of the array task that runs a replica group, or ran it last."""
    held = lease.current(run.lease(replica))
    return replica if held is None else held.task


# -- scale -------------------------------------------------------------------------------


def scale(
    run: RunDir,
    replicas: int,
    slurm: Scheduler,
    env: Mapping[str, str],
    *,
    say: Callable[[str], None],
    slurm_with: Callable[[Mapping[str, str]], Slurm] = lambda env: Slurm(
        partial(process.run, env=env)
    ),
) -> None:
    """Give a live run another number of replica groups: more join and heal, the highest leave.

    Raises:
        UsageError: the run cannot have as many, or has ended.
        KitError: a step failed.
    """
    manifest = run.manifest()
    if manifest.cluster == LOCAL:
        raise UsageError(f"{run.name} is a run of one machine: its size is fixed")
    if not 1 <= replicas <= manifest.group_size:
        raise UsageError(
            f"{run.name} can have 1 to {manifest.group_size} replica groups: its data is split by the "
            "latter, for good (--max-replicas when it is submitted)"
        )
    if run.finished.exists():
        raise UsageError(f"{run.name} has finished")
    jobs = slurm.jobs(*run.arrays())
    if not any(job.live for job in jobs):
        raise UsageError(f"{run.name} has ended: nothing of it is in the queue")
    with _alone(run), Watcher.of_run(run, slurm) as watcher:
        watcher.look(final=True)
        if watcher.blind:
            blind = "; ".join(f"{name}: {why}" for name, why in watcher.blind.items())
            raise BlindError(f"who trains in {run.name} cannot be seen: {blind}")
        missing, surplus = _differences(watcher, replicas, jobs)
        before = _size(run, manifest)
        if replicas != before:
            _note(run, replicas)
        if missing:
            try:
                _grow(run, manifest, missing, env, slurm_with, say)
            except BaseException:
                if replicas != before:
                    _note(run, before)
                raise
        if surplus:
            _shrink(run, watcher, surplus, replicas, slurm, say)
    if not missing and not surplus:
        say(f"{run.name} has {replicas} replica groups, or their tasks are in the queue")


@contextlib.contextmanager
def _alone(run: RunDir) -> Iterator[None]:
    """Two at once would submit the same tasks twice."""
    held = acquire(run.path / ".scale.lock")
    if held is None:
        raise UsageError(f"{run.name} is being scaled by another command: wait for its end")
    with held:
        yield


def _differences(watcher: Watcher, replicas: int, jobs: list[Job]) -> tuple[list[int], list[int]]:
    """Replica groups that have no task and should have one, and those that should have none."""
    state = watcher.state
    queued = {job.task for job in jobs if job.live and job.state != "COMPLETING"}

    def there(replica: int) -> bool:
        group = state.groups.get(replica)
        task = replica if group is None else group.task_index
        return task in queued or _trains(state, replica)

    missing = [replica for replica in range(replicas) if not there(replica)]
    return missing, [r for r in sorted(state.groups) if r >= replicas and there(r)]


def _size(run: RunDir, manifest: Manifest) -> int:
    """Replica groups that the run is to have now."""
    size = manifest.replicas or manifest.group_size
    with contextlib.suppress(OSError), run.guardian_events.open(encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                if event["kind"] == "resize":
                    size = int(event["replicas"])
    return size


def _note(run: RunDir, replicas: int) -> None:
    event = {"t": round(time.time(), 3), "kind": "resize", "replica": None, "replicas": replicas}
    try:
        with run.guardian_events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, separators=(",", ":")) + "\n")
    except OSError as error:
        raise KitError(f"cannot write {run.guardian_events}: {error.strerror}") from error


def _trains(state: RunState, replica: int) -> bool:
    """Whether a replica group is there, as far as quorum or its own words say."""
    group = state.groups.get(replica)
    if group is None or group.ended:
        return False
    own = (GroupState.TRAINING, GroupState.HEALING, GroupState.STALLED)
    return replica in state.members or group.state in own


def _grow(
    run: RunDir,
    manifest: Manifest,
    missing: list[int],
    env: Mapping[str, str],
    slurm_with: Callable[[Mapping[str, str]], Slurm],
    say: Callable[[str], None],
) -> None:
    flags, job, handed = _record(run, manifest)
    flags = [f for f in flags if not f.startswith(("--array=", "--dependency="))]
    logs = str(run.path / run.name).replace("%", "%%")
    # A group that a spare had taken over is that task's: nobody else would be given it.
    tasks = [task_of(run, replica) for replica in missing]
    flags += [f"--array={','.join(map(str, tasks))}"]
    flags += [f"--output={logs}_%a.out", f"--error={logs}_%a.err"]
    # A task that joins is no part of the array that counted its spares.
    handed = {**handed, "TFT_RUN": run.name}
    handed.pop("TORCHFT_LIGHTHOUSE", None)  # the run's own, wherever it is now
    base = {key: value for key, value in env.items() if key != "TORCHFT_LIGHTHOUSE"}
    array = slurm_with({**base, **handed}).submit(flags, job[0], job[1:])
    run.join(array)
    say(f"{run.name}: job {array} brings replicas {', '.join(map(str, missing))}")


def _record(run: RunDir, manifest: Manifest) -> tuple[list[str], list[str], dict[str, str]]:
    """sbatch's flags, script and arguments, and the environment, of the run's submission."""
    known = _read(run.submission)
    if known:
        return list(known["flags"]), list(known["job"]), dict(known["environment"])
    # By hand: what the manifest says; the rest is this shell's.
    job = [TORCHTITAN_JOB]
    if manifest.script:
        job = [SCRIPT_JOB, manifest.script, *manifest.script_args]
    flags = ["--export=ALL", f"--nodes={manifest.nodes_per_group}"]
    return (
        flags,
        job,
        {
            "TFT_CONFIG": manifest.config,
            "TFT_EXTRA_ARGS": shlex.join(manifest.extra_args),
            "TFT_RANKS_PER_NODE": str(manifest.ranks_per_node),
            "TFT_OUTPUTS": os.path.relpath(run.path.parent.parent),
        },
    )


def _read(path: Path) -> dict[str, Any]:
    raw = read_json(path) or {}
    parts = [raw.get(key) for key in ("flags", "job", "environment")]
    if raw and [type(part) for part in parts] != [list, list, dict]:
        raise KitError(f"{path} is not a record of a submission")
    return raw


def _shrink(
    run: RunDir,
    watcher: Watcher,
    surplus: list[int],
    replicas: int,
    slurm: Scheduler,
    say: Callable[[str], None],
) -> None:
    """Tell replica groups to leave; those that do not in time are cancelled."""
    state, leaving, told = watcher.state, set(surplus), set[int]()
    patience = LEAVE_SECONDS + 4 * max(g.step_seconds or 0.0 for g in state.groups.values())
    deadline = time.monotonic() + patience
    while leaving and time.monotonic() < deadline:
        for replica in sorted(leaving):
            group = state.groups[replica]
            if replica in told:
                if group.ended and group.ended_ok:
                    say(f"replica {replica} left at step {group.step}")
                    leaving.discard(replica)
            elif not _trains(state, replica):
                _end(run, group.task_index, slurm)
                say(f"replica {replica} was not training; its task is cancelled")
                leaving.discard(replica)
            else:
                why = f"the run is scaled to {replicas}"
                orders.give(run.orders, "leave", replica=replica, attempt=group.attempt, why=why)
                told.add(replica)
        time.sleep(LOOK_EVERY)
        watcher.look()
    for replica in sorted(leaving):
        _end(run, state.groups[replica].task_index, slurm)
        say(f"replica {replica} did not leave in {patience:.0f} s; its task is cancelled")


def _end(run: RunDir, task: int, slurm: Scheduler) -> None:
    for array in run.arrays():
        for job in slurm.jobs(array):
            if job.task == task and job.live:
                slurm.cancel(job.name)
