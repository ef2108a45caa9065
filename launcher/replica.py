"""The node side of one array task: one replica group, from its run's manifest to torchrun."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from launcher.command import SCRIPT, TRAINER, Torchrun, replica_flags, script_flags, wandb_flags
from launcher.config import Site
from launcher.environment import Task
from launcher.keeper import Keeper
from launcher.leader import Spread
from launcher.methods import METHODS
from launcher.opening import enter
from launcher.payload import say
from launcher.plan import Plan
from launcher.records import note
from launcher.rundir import Manifest, RunDir
from launcher.scheduler import Scheduler


def run_replica(env: Mapping[str, str], slurm: Scheduler, script: Sequence[str] = ()) -> int:
    """Run the replica group that Slurm started us for; returns the task's exit code.

    Args:
        script: the user's own training script and its arguments; empty: torchtitan trains.

    Raises:
        KitError: what is needed is missing; nothing was started.
    """
    site = Site.from_environment(env)
    opening = enter(site, env, slurm, script)
    run, manifest, mine = opening.run, opening.manifest, opening.mine
    if run.finished.exists():
        # Alone, it would train again from the beginning: there is no peer left to heal from.
        say(f"run {run.name} has finished: nothing is left to train for replica {mine.task.index}")
        note(run, mine.task, "exit", code=0, reason="the run has finished")
        return 0
    if mine.task.index == 0:
        for line in opening.training.lines:
            say(line)
    plan = Plan(
        env=env,
        site=site,
        manifest=manifest,
        run=run,
        limits=site.limits,
        flags=partial(_flags, env, manifest, run),
        argv=partial(_argv, site, manifest, mine.task),
        slurm_task=mine.name,
    )
    return Keeper(plan, mine.task, opening.scheduler).run()


def _flags(env: Mapping[str, str], manifest: Manifest, run: RunDir, task: Task) -> list[str]:
    """The trainer's flags for one attempt of a replica group, or the script's."""
    if manifest.script:
        return script_flags(manifest.script, manifest.script_args)
    return replica_flags(
        manifest.config,
        run.path,
        [
            *METHODS[manifest.method].flags(manifest.settings),
            *wandb_flags(env, manifest.settings, manifest.extra_args),
            *manifest.extra_args,
        ],
        replica=task.replica,
        group_size=manifest.group_size,
    )


def _argv(site: Site, manifest: Manifest, task: Task, folder: Path, flags: list[str]) -> list[str]:
    """Command of the group's ranks, whose output is kept in ``folder``."""
    entry = SCRIPT if manifest.script else TRAINER
    if manifest.script:  # known before it is known which group these ranks are to be
        flags = script_flags(manifest.script, manifest.script_args)
    if task.nodes:
        return Spread(
            nodes=task.nodes,
            ranks_per_node=manifest.ranks_per_node,
            address=site.node_address,
            log_dir=folder,
            entry=entry,
            flags=tuple(flags),
        ).argv()
    torchrun = Torchrun(
        ranks_per_node=manifest.ranks_per_group,
        log_dir=folder,
        node_address=site.node_address,
        entry=entry,
    )
    return torchrun.argv(flags)
