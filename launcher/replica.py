"""The node side of one array task: one replica group, from Slurm's variables to torchrun."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from launcher import lighthouse, preflight
from launcher.command import Torchrun, replica_flags, wandb_flags
from launcher.config import Site
from launcher.environment import Task
from launcher.keeper import Keeper
from launcher.model import UsageError
from launcher.payload import say
from launcher.plan import Plan
from launcher.records import note
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.scheduler import Scheduler, cluster_of, scheduler_of

_ARRAY = ("JOB_ID", "TASK_ID", "TASK_COUNT", "TASK_MIN", "TASK_MAX")
_PACKAGES = ("torch", "torchft-nightly", "torchtitan")
#: Seconds that a lighthouse may be away while a replica group starts (a restart of it).
LIGHTHOUSE_PATIENCE = 3.0


def run_replica(env: Mapping[str, str], slurm: Scheduler) -> int:
    """Run the replica group that Slurm started us for; returns the task's exit code.

    Raises:
        KitError: what is needed is missing; nothing was started.
    """
    site = Site.from_environment(env)
    array_id, task, count = _array_task(env)
    if site.spares >= count:
        raise UsageError(
            f"TFT_SPARES={site.spares} of {count} array tasks leaves no replica group: submit "
            "--array=0-N with one task for each group and one for each spare"
        )
    training = preflight.check(site)
    outputs = Outputs(site.outputs.absolute())
    url, folder = lighthouse.discover(outputs, site.lighthouse)
    lighthouse.require_answer(url, patience=LIGHTHOUSE_PATIENCE)
    run = outputs.run_of_array(array_id)
    scheduler = scheduler_of(run, slurm)
    folder.claim(array_id, slurm)
    if not run.manifest_path.exists():
        try:
            lighthouse.refuse_strangers(url)
        except UsageError:
            folder.release(array_id)
            raise
    manifest = run.create(
        Manifest(
            run=run.name,
            array_job_id=array_id,
            group_size=count - site.spares,
            spares=site.spares,
            ranks_per_group=site.ranks_per_node,
            config=str(site.config),
            extra_args=site.extra_args,
            lighthouse=url,
            lighthouse_name=folder.path.name,
            steps=training.steps,
            submitted_by=env.get("SLURM_JOB_USER", ""),
            created=time.time(),
            versions=_versions(),
            settings=training.settings,
            cluster=cluster_of(run),
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
    return Keeper(plan, task, scheduler).run()


def _flags(env: Mapping[str, str], manifest: Manifest, run: RunDir, task: Task) -> list[str]:
    """The trainer's flags for one attempt of a replica group."""
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
        ranks_per_node=manifest.ranks_per_group, log_dir=folder, node_address=site.node_address
    )
    return torchrun.argv(flags)


def _array_task(env: Mapping[str, str]) -> tuple[int, Task, int]:
    """Array job id, task and group size from Slurm's variables.

    Raises:
        UsageError: not in an array, or an array whose indices are not 0 to N-1.
    """
    if any(f"SLURM_ARRAY_{name}" not in env for name in _ARRAY):
        raise UsageError(
            "not in a Slurm array: submit with `sbatch --array=0-3 llama3.1-8b-pretraining-torchft.sh` "
            "for four replica groups"
        )
    if int(env.get("SLURM_JOB_NUM_NODES", "1")) != 1:
        raise UsageError(
            f"a replica group is one node here, and this task has {env['SLURM_JOB_NUM_NODES']}: "
            "submit with --nodes=1 (more replica groups instead: --array=0-N)"
        )
    count = int(env["SLURM_ARRAY_TASK_COUNT"])
    lowest, highest = int(env["SLURM_ARRAY_TASK_MIN"]), int(env["SLURM_ARRAY_TASK_MAX"])
    if (lowest, highest) != (0, count - 1):
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
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
