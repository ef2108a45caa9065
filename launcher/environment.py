"""The environment of a replica group's ranks, from settings, manifest and Slurm. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config import VARIABLES, Site
from launcher.rundir import Manifest, RunDir

#: Settings passed through to torchft with the defaults that the README documents.
_DEFAULTED = (
    "TORCHFT_MANAGER_PORT",
    "TORCHFT_QUORUM_TIMEOUT_SEC",
    "TORCHFT_QUORUM_RETRIES",
    "TORCHFT_TIMEOUT_SEC",
    "TORCHFT_CONNECT_TIMEOUT_SEC",
    "RUST_LOG",
    "RUST_BACKTRACE",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Which start of which replica group this is."""

    replica: int
    attempt: int
    """1 for the first start, one more after each requeue."""
    node: str


def replica_environment(
    base: Mapping[str, str], site: Site, manifest: Manifest, run: RunDir, task: Task
) -> dict[str, str]:
    """Environment for torchrun of one replica group; what ``base`` sets by hand stays."""
    env = common_environment(base, site)
    defaults = {variable.name: variable.default for variable in VARIABLES}
    for name in _DEFAULTED:
        env[name] = base.get(name) or defaults[name]
    env |= {
        "TORCHFT_LIGHTHOUSE": manifest.lighthouse,
        "REPLICA_GROUP_ID": str(task.replica),
        "NUM_REPLICA_GROUPS": str(manifest.group_size),
        "JOB_ID": manifest.run,
        "TFT_ATTEMPT": str(task.attempt),
        "TFT_EVENTS": str(run.events(task.replica)),
        "TFT_FINISHED": str(run.finished),
        "TFT_FAILURES": str(run.failures(task.replica, task.attempt)),
    }
    # One W&B run a replica group, in one W&B group a run, continued over requeues.
    env.setdefault("WANDB_RUN_GROUP", manifest.run)
    env.setdefault("WANDB_RUN_ID", f"{manifest.run}-{task.replica}-{int(manifest.created)}")
    env.setdefault("WANDB_NAME", f"{manifest.run} replica {task.replica}")
    env.setdefault("WANDB_RESUME", "allow")
    return env


def common_environment(base: Mapping[str, str], site: Site) -> dict[str, str]:
    """What every rank gets, fault-tolerant or not."""
    env = dict(base)
    env["TFT_DEVICE"] = site.device
    env["PYTHONUNBUFFERED"] = "1"
    if site.interface:
        env.setdefault("NCCL_SOCKET_IFNAME", site.interface)
        env.setdefault("GLOO_SOCKET_IFNAME", site.interface)
    if site.device == "cpu":
        # torchrun's own default for several ranks, said here to spare its warning.
        env.setdefault("OMP_NUM_THREADS", "1")
    return env
