"""The trainer's command line, built here and nowhere else.

For the versions pinned in ``requirements.txt`` (torchtitan 0.2.2: TOML files and
``--section.key`` flags).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.environment import wandb_switch


@dataclass(frozen=True, slots=True, kw_only=True)
class Torchrun:
    """One node's part of a torchrun job."""

    ranks_per_node: int
    log_dir: Path
    """Where torchrun keeps the full output of every rank."""
    node_address: str
    nodes: int = 1
    node_rank: int = 0
    master: str = ""
    """``host:port`` of the first node, for a job of several."""
    module: str = "launcher.train"
    """What every rank runs."""

    def argv(self, trainer: Sequence[str]) -> list[str]:
        if self.nodes == 1:
            meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        else:
            host, _, port = self.master.rpartition(":")
            meeting = [
                f"--node-rank={self.node_rank}",
                f"--master-addr={host}",
                f"--master-port={port}",
            ]
        return [
            sys.executable,
            "-m",
            "launcher.train.torchrun",
            f"--nnodes={self.nodes}",
            *meeting,
            f"--local-addr={self.node_address}",
            f"--nproc-per-node={self.ranks_per_node}",
            "--role=rank",
            # The console shows rank 0 alone; every rank's output is kept under log_dir.
            *(["--local-ranks-filter=0", "--tee=3"] if self.node_rank == 0 else ["--redirects=3"]),
            f"--log-dir={self.log_dir}",
            "-m",
            self.module,
            *trainer,
        ]


def trainer_flags(config: Path | str, dump_folder: Path, extra: Sequence[str]) -> list[str]:
    """torchtitan's flags of a job without fault tolerance; ``extra`` wins, being last."""
    return [f"--job.config_file={config}", f"--job.dump_folder={dump_folder}", *extra]


def replica_flags(
    config: Path | str,
    dump_folder: Path,
    extra: Sequence[str],
    *,
    replica: int,
    group_size: int,
) -> list[str]:
    """torchtitan's flags of one replica group among ``group_size``."""
    return [
        *trainer_flags(config, dump_folder, ()),
        "--fault_tolerance.enable",
        f"--fault_tolerance.replica_id={replica}",
        f"--fault_tolerance.group_size={group_size}",
        *extra,
    ]


def wandb_flags(
    env: Mapping[str, str], settings: Mapping[str, Any], extra: Sequence[str]
) -> list[str]:
    """W&B is on when the environment has a key (or offline mode), and neither the config
    file nor a flag says anything about it."""
    metrics = settings.get("metrics", {})
    told = isinstance(metrics, Mapping) and "enable_wandb" in metrics
    told = told or any(
        flag.startswith("--metrics.") and "enable_wandb" in flag.replace("-", "_") for flag in extra
    )
    return ["--metrics.enable_wandb"] if wandb_switch(env) and not told else []
