"""Where runs are to go: what the doctor must know of a site, in one place."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.config import Site
from launcher.model import UsageError

#: Job script that the doctor asks Slurm to try.
SCRIPT = "llama3.1-8b-pretraining-torchft.sh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A cluster's settings, wherever they were set."""

    partition: str
    """Empty: Slurm's default."""
    account: str
    """Empty: the user's default."""
    qos: str
    """Empty: the default."""
    sbatch_flags: tuple[str, ...] = ()
    """Further flags of every submission."""
    interface: str
    """Network interface for NCCL and gloo; empty: their own choice."""
    environment: Path
    """Virtual environment that the job scripts activate."""
    device: str
    """``"cuda"`` or ``"cpu"``."""
    ranks_per_node: int
    lighthouse: str
    """URL set by hand; empty: the published one."""
    lighthouse_host: str
    """Address of this machine for the nodes."""
    lighthouse_port: int
    lighthouse_bind: str
    """Address that a lighthouse listens on; empty: every interface."""
    outputs: Path
    """Root of what runs write, absolute."""
    config: Path
    """torchtitan TOML file."""
    extra_args: tuple[str, ...]
    """torchtitan flags that win over it."""
    quorum_timeout: float
    """Seconds for which a replica group waits for a quorum."""

    def flags(self) -> list[str]:
        """What every ``sbatch`` to this target gets."""
        named = (("partition", self.partition), ("account", self.account), ("qos", self.qos))
        return [*(f"--{name}={value}" for name, value in named if value), *self.sbatch_flags]


def target_of(
    profile: str, env: Mapping[str, str], *, partition: str = "", account: str = ""
) -> Target:
    """The target of a profile, or with an empty one, of this environment.

    Args:
        partition: wins over what is set elsewhere; empty does not, and so with ``account``.

    Raises:
        UsageError: a variable is wrong, or a profile is asked for.
    """
    if profile:
        raise UsageError(
            f"--profile {profile}: the doctor does not read profiles yet; set the variables of "
            "README.md, and --partition and --account"
        )
    site = Site.from_environment(env)
    return Target(
        partition=partition or env.get("SBATCH_PARTITION", ""),
        account=account or env.get("SBATCH_ACCOUNT", ""),
        qos=env.get("SBATCH_QOS", ""),
        interface=site.interface,
        environment=Path(env.get("TFT_ENV") or ".env"),
        device=site.device,
        ranks_per_node=site.ranks_per_node,
        lighthouse=site.lighthouse,
        lighthouse_host=env.get("TFT_LIGHTHOUSE_HOST") or socket.gethostname(),
        lighthouse_port=int(env.get("TFT_LIGHTHOUSE_PORT") or 29510),
        lighthouse_bind=env.get("TFT_LIGHTHOUSE_BIND", ""),
        outputs=site.outputs.absolute(),
        config=site.config,
        extra_args=site.extra_args,
        quorum_timeout=site.quorum_timeout,
    )
