"""The environment of a replica group's ranks, from settings, manifest and Slurm. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.config import Site
from launcher.methods import METHODS
from launcher.rundir import Manifest, RunDir
from launcher.variables import VARIABLES

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
    node: str
    """The first of its nodes, on which its launcher runs."""
    nodes: tuple[str, ...] = ()
    """All of them, where there are several."""
    index: int = 0
    """Index of the array task that runs it; a spare's differs from the replica group's."""
    attempt: int = 0
    """1 for the group's first start, one more for each further one; 0 before it."""

    @property
    def where(self) -> str:
        """Its nodes, in words."""
        return ", ".join(self.nodes) or self.node


def replica_environment(
    base: Mapping[str, str], site: Site, manifest: Manifest, run: RunDir, task: Task
) -> dict[str, str]:
    """Environment for torchrun of one replica group; what ``base`` sets by hand stays."""
    env = waiting_environment(base, site)
    usual = METHODS[manifest.method].environment
    env |= {name: value for name, value in usual.items() if not base.get(name)}
    env |= {
        "TORCHFT_LIGHTHOUSE": manifest.lighthouse,
        "REPLICA_GROUP_ID": str(task.replica),
        "NUM_REPLICA_GROUPS": str(manifest.group_size),
        "JOB_ID": manifest.run,
        "TFT_ATTEMPT": str(task.attempt),
        "TFT_EVENTS": str(run.events(task.replica)),
        "TFT_FINISHED": str(run.finished),
        "TFT_STACKS": str(run.ranks(task.replica, task.attempt)),
        "TFT_LEAVE": str(run.leave(task.replica, task.attempt)),
        "TFT_FAILURES": str(run.failures(task.replica, task.attempt)),
    }
    # One W&B run a replica group, in one W&B group a run, continued over requeues.
    env.setdefault("WANDB_RUN_GROUP", manifest.run)
    env.setdefault("WANDB_RUN_ID", wandb_run_id(manifest, task.replica))
    env.setdefault("WANDB_NAME", f"{manifest.run} replica {task.replica}")
    env.setdefault("WANDB_RESUME", "allow")
    env.setdefault("WANDB_JOB_TYPE", "replica")
    env.setdefault("WANDB_TAGS", f"torchft,{manifest.run}")
    env.setdefault("WANDB_DIR", str(run.path))
    return env


def wandb_run_id(manifest: Manifest, part: int | str) -> str:
    """The same over requeues and restarts; another one when Slurm counts its jobs anew."""
    return f"{manifest.run}-{part}-{int(manifest.created)}"


def wandb_project(env: Mapping[str, str]) -> str:
    """The project to which torchtitan logs."""
    return env.get("WANDB_PROJECT") or "torchtitan"


def wandb_switch(env: Mapping[str, str]) -> bool | None:
    """Whether the environment alone turns W&B on or off; None when it says neither."""
    mode = env.get("WANDB_MODE", "").lower()
    if mode == "disabled" or env.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        return False
    if mode in ("offline", "dryrun") or env.get("WANDB_API_KEY"):
        return True
    return None


def waiting_environment(base: Mapping[str, str], site: Site) -> dict[str, str]:
    """What the ranks of a replica group get before it is known which one they are to be."""
    env = common_environment(base, site)
    defaults = {variable.name: variable.default for variable in VARIABLES}
    return env | {name: base.get(name) or defaults[name] for name in _DEFAULTED}


def common_environment(base: Mapping[str, str], site: Site) -> dict[str, str]:
    """What every rank gets, fault-tolerant or not."""
    env = dict(base)
    env["TFT_DEVICE"] = site.device
    env["PYTHONUNBUFFERED"] = "1"
    if site.interface:
        env.setdefault("NCCL_SOCKET_IFNAME", site.interface)
        env.setdefault("GLOO_SOCKET_IFNAME", site.interface)
    # An outage of W&B costs its plots. The trainer starts it beside the training
    # (``launcher/train/tracking.py``), so that a start may take its time; the end may not.
    env.setdefault("WANDB_INIT_TIMEOUT", "30")
    env.setdefault("WANDB_FINISH_TIMEOUT", "10")
    # At the end of a process it would wait up to 20 s for a server that does not answer.
    env.setdefault("WANDB_ERROR_REPORTING", "false")
    if site.device == "cpu":
        # torchrun's own default for several ranks, said here to spare its warning.
        env.setdefault("OMP_NUM_THREADS", "1")
    return env
