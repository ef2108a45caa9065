"""The node side of one array task: one replica group, from Slurm's variables to torchrun."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import time
from collections.abc import Mapping
from functools import partial

from launcher import lighthouse, preflight
from launcher.command import Torchrun, replica_flags, wandb_flags
from launcher.config import Site
from launcher.environment import Task, replica_environment
from launcher.gpus import GpuSampler
from launcher.model import UsageError
from launcher.payload import Payload, complain, say, why
from launcher.rundir import Manifest, Outputs, RunDir, create_once
from launcher.slurm import Slurm

_ARRAY = ("JOB_ID", "TASK_ID", "TASK_COUNT", "TASK_MIN", "TASK_MAX")
_PACKAGES = ("torch", "torchft-nightly", "torchtitan")
#: Seconds that a lighthouse may be away while a replica group starts (a restart of it).
LIGHTHOUSE_PATIENCE = 3.0


def run_replica(env: Mapping[str, str], slurm: Slurm) -> int:
    """Run the replica group that Slurm started us for; returns the task's exit code.

    Raises:
        KitError: what is needed is missing; nothing was started.
    """
    site = Site.from_environment(env)
    array_id, task, count = _array_task(env)
    say(f"launching replica {task.replica} (attempt {task.attempt}) on {task.node}")
    training = preflight.check(site)
    outputs = Outputs(site.outputs.absolute())
    url = lighthouse.discover(outputs, site.lighthouse)
    lighthouse.require_answer(url, patience=LIGHTHOUSE_PATIENCE)
    run = outputs.run_of_array(array_id)
    folder = lighthouse.LighthouseDir.of(outputs, url)
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
            group_size=count,
            ranks_per_group=site.ranks_per_node,
            config=str(site.config),
            extra_args=site.extra_args,
            lighthouse=url,
            steps=training.steps,
            submitted_by=env.get("SLURM_JOB_USER", ""),
            created=time.time(),
            versions=_versions(),
            settings=training.settings,
        )
    )
    if task.replica >= manifest.group_size:
        raise UsageError(
            f"replica {task.replica} is outside run {run.name}, which has {manifest.group_size} "
            "replica groups (0 and up); its data is split by that number"
        )
    if run.finished.exists():
        # Alone, it would train again from the beginning: there is no peer left to heal from.
        say(f"run {run.name} has finished: nothing is left to train for replica {task.replica}")
        _note(run, task, "exit", code=0, reason="the run has finished")
        return 0
    return _train(env, site, manifest, run, task)


def _train(env: Mapping[str, str], site: Site, manifest: Manifest, run: RunDir, task: Task) -> int:
    ranks = run.ranks(task.replica, task.attempt)
    ranks.mkdir(parents=True, exist_ok=True)
    torchrun = Torchrun(
        ranks_per_node=manifest.ranks_per_group, log_dir=ranks, node_address=site.node_address
    )
    flags = replica_flags(
        manifest.config,
        run.path,
        [*wandb_flags(env, manifest.settings, manifest.extra_args), *manifest.extra_args],
        replica=task.replica,
        group_size=manifest.group_size,
    )
    _note(run, task, "launch")
    payload = Payload(torchrun.argv(flags), replica_environment(env, site, manifest, run, task))
    watching = (
        GpuSampler(partial(_note, run, task)) if site.device == "cuda" else contextlib.nullcontext()
    )
    with watching:
        code = payload.run()
    name = f"replica {task.replica} (attempt {task.attempt}) on {task.node}"
    if payload.stopped_by is not None:
        reason = f"stopped by {payload.stopped_by.name}"
        complain(f"{name} was {reason} (node down, requeue, time limit or cancel)")
    elif code != 0:
        reason = why(run.failures(task.replica, task.attempt))
        complain(f"{name} failed: {reason}; every rank's output: {ranks}")
    else:
        reason = "finished"
        create_once(run.finished, json.dumps({"replica": task.replica, "t": time.time()}) + "\n")
        say(f"{name} finished")
    _note(run, task, "exit", code=code, reason=reason)
    return code


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
    task = Task(
        replica=int(env["SLURM_ARRAY_TASK_ID"]),
        attempt=int(env.get("SLURM_RESTART_COUNT") or "0") + 1,
        node=env.get("SLURMD_NODENAME") or os.uname().nodename,
    )
    return int(env["SLURM_ARRAY_JOB_ID"]), task, count


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _note(run: RunDir, task: Task, kind: str, **fields: object) -> None:
    """Append one event to the replica group's structured log; a full disk is no reason to die."""
    event = {
        "t": round(time.time(), 3),
        "kind": kind,
        "replica": task.replica,
        "attempt": task.attempt,
        "host": task.node,
        **fields,
    }
    try:
        with open(run.events(task.replica), "a", encoding="utf-8") as file:
            file.write(json.dumps(event, separators=(",", ":")) + "\n")
    except OSError as error:
        complain(f"an event was lost: {error}")
