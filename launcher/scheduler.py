"""Who runs the tasks of a run: Slurm, or the daemon of a run of one machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from launcher.local import Local
from launcher.model import KitError, UsageError
from launcher.rundir import RunDir
from launcher.slurm import Job, Node, Slurm

#: What a manifest's ``cluster`` may be.
SLURM, LOCAL = "slurm", "local"


class Scheduler(Protocol):
    """What a run needs to ask; `launcher.slurm.Slurm` says what each of it means. "Could not ask"
    is a ``BlindError``."""

    name: str
    """In words, for people."""

    def jobs(self, *job_ids: int) -> list[Job]: ...
    def nodes(self) -> list[Node]: ...
    def arrays_on(self, node: str) -> list[int]: ...
    def time_limit(self, task: str) -> str: ...
    def requeue(self, task: str) -> None: ...
    def release(self, task: str) -> None: ...
    def start_now(self, task: str, exclude: Sequence[str] | None = None) -> None: ...
    def excluded_nodes(self, task: str) -> list[str]: ...
    def cancel(self, job: int | str) -> None: ...
    def hostnames(self, nodelist: str) -> list[str]: ...


def cluster_of(run: RunDir) -> str:
    """``"slurm"`` or ``"local"``, as the run's manifest says. (Before its first task has written
    that, or when it is damaged: a local run has a daemon.)

    Raises:
        UsageError: the manifest names another kind.
    """
    try:
        cluster = run.manifest().cluster if run.manifest_path.exists() else ""
    except KitError:
        cluster = ""
    if not cluster:
        return LOCAL if run.local.is_dir() else SLURM
    if cluster not in (SLURM, LOCAL):
        raise UsageError(f"{run.manifest_path} names a cluster of an unknown kind: {cluster!r}")
    return cluster


def scheduler_of(run: RunDir, slurm: Scheduler | None = None) -> Scheduler:
    """Who runs the tasks of ``run``; ``slurm``: what to ask where that is Slurm.

    Raises:
        UsageError: the run's manifest names a cluster of an unknown kind.
    """
    if cluster_of(run) == LOCAL:
        return Local(run)
    return slurm or Slurm()
