"""Which run an array task belongs to, and what that run is: from Slurm's variables to its manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import lighthouse, preflight, reach
from launcher.config import Site
from launcher.environment import Task
from launcher.lighthouse import LighthouseDir
from launcher.methods import lighthouse_problem
from launcher.model import UsageError
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.scheduler import Scheduler, cluster_of, scheduler_of
from launcher.terms import Terms

_ARRAY = ("JOB_ID", "TASK_ID", "TASK_COUNT", "TASK_MIN", "TASK_MAX")
_PACKAGES = ("torch", "torchft-nightly", "torchtitan")
#: Job script of the groups that torchtitan trains, and of those that a script of the user's does.
TORCHTITAN_JOB, SCRIPT_JOB = "llama3.1-8b-pretraining-torchft.sh", "slurm/replica-group.sbatch"
#: Seconds that a lighthouse may be away while a replica group starts (a restart of it), and between
#: two looks at it.
LIGHTHOUSE_PATIENCE, LIGHTHOUSE_EVERY = 3.0, 0.2


@dataclass(frozen=True, slots=True)
class ArrayTask:
    """One task of a Slurm array, as Slurm's variables have it."""

    array: int
    """The array's job id."""
    task: Task
    count: int
    """Tasks of the array."""

    @property
    def name(self) -> str:
        """As Slurm's commands take it."""
        return f"{self.array}_{self.task.index}"


@dataclass(frozen=True, slots=True)
class Opening:
    """What a task finds when it starts."""

    run: RunDir
    manifest: Manifest
    scheduler: Scheduler
    mine: ArrayTask
    training: preflight.Training


def enter(site: Site, env: Mapping[str, str], slurm: Scheduler, script: Sequence[str]) -> Opening:
    """The run that this task is to train in: one that is there, or its array's own.

    Args:
        script: the user's own training script and its arguments; empty: torchtitan trains.

    Raises:
        KitError: something is missing or does not fit; nothing was started.
    """
    job = f"{SCRIPT_JOB} my_train.py" if script else TORCHTITAN_JOB
    mine = _array_task(env, slurm, job, any_index=bool(site.run or site.max_replicas))
    if site.spares >= mine.count and not site.run:
        raise UsageError(
            f"TFT_SPARES={site.spares} of {mine.count} array tasks leaves no replica group: submit "
            "--array=0-N with one task for each group and one for each spare"
        )
    outputs = Outputs(site.outputs.absolute())
    run = outputs.find(site.run) if site.run else outputs.run_of_array(mine.array)
    replicas, nodes = mine.count - site.spares, max(1, len(mine.task.nodes))
    groups = site.max_replicas or replicas
    if site.run:
        known = run.manifest()
        site, groups = _as_it_began(site, known), known.group_size
    if script:
        training = preflight.check_script(site, script[0])
    else:
        training = preflight.check(site, groups, nodes)
    url, folder = _lighthouse(site, outputs, run)
    _await_lighthouse(site, run, url)
    address = folder.address()
    waits = 0 if address is None else address.join_timeout_ms
    if problem := lighthouse_problem(training.method, groups, waits):
        raise UsageError(problem)
    folder.claim(run.number, slurm)
    if not run.manifest_path.exists():
        try:
            reach.refuse_strangers(url)
        except UsageError:
            folder.release(run.number)
            raise
    first = manifest_of(
        site,
        training,
        run,
        url,
        folder,
        replicas=replicas,
        nodes=nodes,
        user=env.get("SLURM_JOB_USER", ""),
        script=script,
    )
    manifest = run.create(first)
    _refuse_misfits(site, run, manifest, mine.task)
    if site.run:
        run.join(mine.array)
    return Opening(run, manifest, scheduler_of(run, slurm), mine, training)


def _as_it_began(site: Site, manifest: Manifest) -> Site:
    """The settings of this shell, but with the training of the run that it joins."""
    return dataclasses.replace(
        site,
        config=Path(manifest.config) if manifest.config else site.config,
        extra_args=manifest.extra_args,
        method=manifest.method,
    )


def manifest_of(
    site: Site,
    training: preflight.Training,
    run: RunDir,
    url: str,
    folder: LighthouseDir,
    *,
    replicas: int,
    nodes: int,
    user: str,
    script: Sequence[str] = (),
) -> Manifest:
    """What is fixed for the whole life of a run, as whoever comes first writes it."""
    return Manifest(
        run=run.name,
        array_job_id=run.number,
        group_size=site.max_replicas or replicas,
        replicas=replicas,
        spares=site.spares,
        ranks_per_group=site.ranks_per_node * nodes,
        nodes_per_group=nodes,
        config="" if script else str(site.config),
        extra_args=site.extra_args,
        script=script[0] if script else "",
        script_args=tuple(script[1:]),
        method=training.method.name,
        sync_every=1 if training.schedule is None else training.schedule.every,
        lighthouse=url,
        lighthouse_name=folder.path.name,
        steps=training.steps,
        submitted_by=user,
        created=time.time(),
        versions=_versions(),
        settings=training.settings,
        cluster=cluster_of(run),
    )


def _lighthouse(site: Site, outputs: Outputs, run: RunDir) -> tuple[str, LighthouseDir]:
    """The lighthouse that was set by hand, else that of the run to join, else the published one."""
    if (site.run or run.manifest_path.exists()) and not site.lighthouse:
        manifest = run.manifest()
        folder = LighthouseDir.of_run(run, manifest)
        address = folder.address()
        return address.url if address is not None else manifest.lighthouse, folder
    return lighthouse.discover(outputs, site.lighthouse, run.number)


def _await_lighthouse(site: Site, run: RunDir, url: str) -> None:
    """Wait until the lighthouse answers, or the one that stands in for it. A group of a run that
    has begun goes on without: its launcher waits too, and may have to vote.

    Raises:
        UsageError: it did not in time.
    """
    goes_on = run.manifest_path.exists() and site.relay
    deadline = time.monotonic() + LIGHTHOUSE_PATIENCE
    while True:
        serving = Terms(run.terms).newest().serving
        try:
            return reach.require_answer(f"http://{serving}" if serving else url)
        except UsageError:
            if time.monotonic() > deadline:
                if goes_on:
                    return None
                raise
        time.sleep(LIGHTHOUSE_EVERY)


def _refuse_misfits(site: Site, run: RunDir, manifest: Manifest, task: Task) -> None:
    if task.index >= manifest.group_size + manifest.spares:
        raise UsageError(
            f"replica {task.index} is outside run {run.name}, which has {manifest.group_size} "
            f"replica groups (0 and up) and {manifest.spares} spares; its data is split by the former"
        )
    nodes = max(1, len(task.nodes))
    if (manifest.nodes_per_group, manifest.ranks_per_node) != (nodes, site.ranks_per_node):
        raise UsageError(
            f"replica {task.index} has {nodes} nodes of {site.ranks_per_node} ranks, and those of run "
            f"{run.name} have {manifest.nodes_per_group} of {manifest.ranks_per_node}: replica groups "
            "exchange gradients rank by rank and must be of one shape; submit with --nodes="
            f"{manifest.nodes_per_group} --gpus-per-node={manifest.ranks_per_node}"
        )


def _array_task(
    env: Mapping[str, str], slurm: Scheduler, job: str, *, any_index: bool
) -> ArrayTask:
    """This task, from Slurm's variables.

    Args:
        job: the job script and its arguments, for the remedy in an error.
        any_index: whether the array's indices may be others than 0 to N-1.

    Raises:
        UsageError: not in an array, or one whose indices cannot be replica ids.
    """
    if any(f"SLURM_ARRAY_{name}" not in env for name in _ARRAY):
        raise UsageError(
            f"not in a Slurm array: submit with `sbatch --array=0-3 {job}` for four replica groups"
        )
    count = int(env["SLURM_ARRAY_TASK_COUNT"])
    lowest, highest = int(env["SLURM_ARRAY_TASK_MIN"]), int(env["SLURM_ARRAY_TASK_MAX"])
    if (lowest, highest) != (0, count - 1) and not any_index:
        raise UsageError(
            f"the array's indices run from {lowest} to {highest} in {count} tasks; they are the "
            f"replica ids and must be 0 to N-1: submit with --array=0-{count - 1} (or set TFT_RUN "
            "to the run that they are to join)"
        )
    index = int(env["SLURM_ARRAY_TASK_ID"])
    node = env.get("SLURMD_NODENAME") or os.uname().nodename
    task = Task(replica=index, index=index, node=node, nodes=_nodes(env, slurm, node))
    return ArrayTask(int(env["SLURM_ARRAY_JOB_ID"]), task, count)


def _nodes(env: Mapping[str, str], slurm: Scheduler, first: str) -> tuple[str, ...]:
    """Nodes of a task that has several, this one first; empty when this is all.

    Raises:
        UsageError: Slurm does not say which they are.
        SlurmError: the list of them cannot be read.
    """
    count = int(env.get("SLURM_JOB_NUM_NODES") or "1")
    if count == 1:
        return ()
    names = slurm.hostnames(env.get("SLURM_JOB_NODELIST", ""))
    if first not in names or len(names) != count:
        raise UsageError(
            f"Slurm gave this task {count} nodes, and its list of them is {', '.join(names)!r}, "
            f"seen from {first}: submit the script with sbatch, not with srun or salloc"
        )
    return (first, *(name for name in names if name != first))


def _versions() -> dict[str, str]:
    """Of what is installed: a script may need no torchtitan."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
