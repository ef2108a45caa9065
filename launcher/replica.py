"""The node side of one array task: one replica group, from Slurm's variables to torchrun."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from launcher import lighthouse, preflight
from launcher.command import SCRIPT, TRAINER, Torchrun, replica_flags, script_flags, wandb_flags
from launcher.config import Site
from launcher.environment import Task
from launcher.keeper import Keeper
from launcher.model import UsageError
from launcher.payload import say
from launcher.plan import Plan
from launcher.records import note
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.slurm import Slurm

_ARRAY = ("JOB_ID", "TASK_ID", "TASK_COUNT", "TASK_MIN", "TASK_MAX")
_PACKAGES = ("torch", "torchft-nightly", "torchtitan")
#: Job script of the groups that torchtitan trains.
TORCHTITAN_JOB = "llama3.1-8b-pretraining-torchft.sh"
#: Seconds that a lighthouse may be away while a replica group starts (a restart of it).
LIGHTHOUSE_PATIENCE = 3.0


def run_replica(env: Mapping[str, str], slurm: Slurm, script: Sequence[str] = ()) -> int:
    """Run the replica group that Slurm started us for; returns the task's exit code.

    Args:
        script: the user's own training script and its arguments; empty: torchtitan trains.

    Raises:
        KitError: what is needed is missing; nothing was started.
    """
    site = Site.from_environment(env)
    job = "slurm/replica-group.sbatch my_train.py" if script else TORCHTITAN_JOB
    array_id, task, count = _array_task(env, job, any_index=bool(site.run or site.max_replicas))
    if site.spares >= count and not site.run:
        raise UsageError(
            f"TFT_SPARES={site.spares} of {count} array tasks leaves no replica group: submit "
            "--array=0-N with one task for each group and one for each spare"
        )
    training = preflight.check_script(site, script[0]) if script else preflight.check(site)
    outputs = Outputs(site.outputs.absolute())
    run = outputs.find(site.run) if site.run else outputs.run_of_array(array_id)
    by_hand = site.lighthouse
    if site.run and not by_hand:
        folder = lighthouse.LighthouseDir.of_run(run, run.manifest())
        address = folder.address()
        by_hand = address.url if address is not None else run.manifest().lighthouse
    url, folder = lighthouse.discover(outputs, by_hand)
    lighthouse.require_answer(url, patience=LIGHTHOUSE_PATIENCE)
    if site.run:
        run.join(array_id)
    folder.claim(run.number, slurm)
    if not run.manifest_path.exists():
        try:
            lighthouse.refuse_strangers(url)
        except UsageError:
            folder.release(run.number)
            raise
    user = env.get("SLURM_JOB_USER", "")
    manifest = run.create(
        manifest_of(
            site,
            training,
            run,
            url,
            folder,
            replicas=count - site.spares,
            user=user,
            script=script,
        )
    )
    if task.index >= manifest.group_size + manifest.spares:
        raise UsageError(
            f"replica {task.index} is outside run {run.name}, which has {manifest.group_size} "
            f"replica groups (0 and up) and {manifest.spares} spares; its data is split by the former"
        )
    if run.finished.exists():
        # Alone, it would train again from the beginning: there is no peer left to heal from.
        say(f"run {run.name} has finished: nothing is left to train for replica {task.replica}")
        note(run, task, "exit", code=0, reason="the run has finished")
        return 0
    plan = Plan(
        env=env,
        site=site,
        manifest=manifest,
        run=run,
        limits=site.limits,
        flags=partial(_flags, env, manifest, run),
        argv=partial(_argv, site, manifest),
        slurm_task=f"{array_id}_{task.index}",
    )
    return Keeper(plan, task, slurm).run()


def manifest_of(
    site: Site,
    training: preflight.Training,
    run: RunDir,
    url: str,
    folder: lighthouse.LighthouseDir,
    *,
    replicas: int,
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
        ranks_per_group=site.ranks_per_node,
        config="" if script else str(site.config),
        extra_args=site.extra_args,
        script=script[0] if script else "",
        script_args=tuple(script[1:]),
        lighthouse=url,
        lighthouse_name=folder.path.name,
        steps=training.steps,
        submitted_by=user,
        created=time.time(),
        versions=_versions(),
        settings=training.settings,
    )


def _flags(env: Mapping[str, str], manifest: Manifest, run: RunDir, task: Task) -> list[str]:
    """The trainer's flags for one attempt of a replica group, or the script's."""
    if manifest.script:
        return script_flags(manifest.script, manifest.script_args)
    return replica_flags(
        manifest.config,
        run.path,
        [*wandb_flags(env, manifest.settings, manifest.extra_args), *manifest.extra_args],
        replica=task.replica,
        group_size=manifest.group_size,
    )


def _argv(site: Site, manifest: Manifest, folder: Path, flags: list[str]) -> list[str]:
    """Command of one node's ranks, whose output is kept in ``folder``."""
    torchrun = Torchrun(
        ranks_per_node=manifest.ranks_per_group,
        log_dir=folder,
        node_address=site.node_address,
        entry=SCRIPT if manifest.script else TRAINER,
    )
    if manifest.script:  # known before it is known which group these ranks are to be
        flags = script_flags(manifest.script, manifest.script_args)
    return torchrun.argv(flags)


def _array_task(env: Mapping[str, str], job: str, *, any_index: bool) -> tuple[int, Task, int]:
    """Array job id, task and number of tasks from Slurm's variables.

    Args:
        job: the job script and its arguments, for the remedy in an error.

    Raises:
        UsageError: not in an array, or an array whose indices are not 0 to N-1.
    """
    if any(f"SLURM_ARRAY_{name}" not in env for name in _ARRAY):
        raise UsageError(
            f"not in a Slurm array: submit with `sbatch --array=0-3 {job}` for four replica groups"
        )
    if int(env.get("SLURM_JOB_NUM_NODES", "1")) != 1:
        raise UsageError(
            f"a replica group is one node here, and this task has {env['SLURM_JOB_NUM_NODES']}: "
            "submit with --nodes=1 (more replica groups instead: --array=0-N)"
        )
    count = int(env["SLURM_ARRAY_TASK_COUNT"])
    lowest, highest = int(env["SLURM_ARRAY_TASK_MIN"]), int(env["SLURM_ARRAY_TASK_MAX"])
    if (lowest, highest) != (0, count - 1) and not any_index:
        raise UsageError(
            f"the array's indices run from {lowest} to {highest} in {count} tasks; they are the "
            f"replica ids and must be 0 to N-1: submit with --array=0-{count - 1}"
        )
    index = int(env["SLURM_ARRAY_TASK_ID"])
    task = Task(
        replica=index,
        index=index,
        node=env.get("SLURMD_NODENAME") or os.uname().nodename,
    )
    return int(env["SLURM_ARRAY_JOB_ID"]), task, count


def _versions() -> dict[str, str]:
    """Of what is installed: a script may need no torchtitan."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
