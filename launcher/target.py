"""Where runs are to go: what the doctor must know of a site, in one place."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher import layers, methods
from launcher.config import Site
from launcher.handover import environment, sbatch_flags
from launcher.settings import DEFAULT_PORTS, ports
from launcher.submission import cleaned


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
    """Address that a lighthouse listens on; empty: it chooses (``listen_address``)."""
    outputs: Path
    """Root of what runs write, absolute."""
    config: Path
    """torchtitan TOML file."""
    extra_args: tuple[str, ...]
    """torchtitan flags that win over it."""
    job_flags: tuple[str, ...] = ()
    """What ``sbatch`` gets for a run of two replica groups."""
    quorum_timeout: float
    """Seconds for which a replica group waits for a quorum."""

    def flags(self) -> list[str]:
        """What every ``sbatch`` to this target gets."""
        named = (("partition", self.partition), ("account", self.account), ("qos", self.qos))
        return [*(f"--{name}={value}" for name, value in named if value), *self.sbatch_flags]


def target_of(
    profile: str, env: Mapping[str, str], *, partition: str = "", account: str = ""
) -> tuple[Target, dict[str, str]]:
    """The target of a profile and of this environment, and the environment that jobs to it get.

    Args:
        profile: cluster profile; empty: the one that ``TFT_PROFILE`` names, or none.
        partition: wins over what is set elsewhere; empty does not, and so with ``account``.

    Raises:
        UsageError: a setting is wrong.
    """
    said = layers.resolve({"partition": partition, "account": account}, env, profile=profile)
    env = {**cleaned(env), **environment(said, env)}
    site = Site.from_environment(env)
    first, _ = ports(said.get("lighthouse_ports", DEFAULT_PORTS))
    method = methods.METHODS.get(site.method, methods.HSDP)
    target = Target(
        partition=said.get("partition", ""),
        account=said.get("account", ""),
        qos=said.get("qos", ""),
        sbatch_flags=(
            *(f"--{key}={said.get(key)}" for key in ("constraint", "exclude") if said.get(key)),
            *said.get("sbatch_flags", ()),
        ),
        job_flags=tuple(sbatch_flags(said, "0-1", site)),
        interface=site.interface,
        environment=Path(said.get("environment", ".env")),
        device=site.device,
        ranks_per_node=site.ranks_per_node,
        lighthouse=site.lighthouse,
        lighthouse_host=said.get("lighthouse_host") or socket.gethostname(),
        lighthouse_port=int(env.get("TFT_LIGHTHOUSE_PORT") or first),
        lighthouse_bind=said.get("lighthouse_bind", ""),
        outputs=site.outputs.absolute(),
        config=site.config,
        extra_args=site.extra_args,
        quorum_timeout=site.quorum_timeout or method.quorum_timeout,
    )
    return target, env
