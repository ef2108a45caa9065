"""The node side of the classic multi-node job: one torchrun over all nodes, no fault tolerance."""

from __future__ import annotations

import os
from collections.abc import Mapping

from launcher import preflight
from launcher.command import Torchrun, trainer_flags, wandb_flags
from launcher.config import Site
from launcher.environment import common_environment
from launcher.model import UsageError
from launcher.payload import Payload, complain, say, why
from launcher.slurm import Slurm

#: Range of ports from which a job's meeting point is chosen, by its id.
PORTS = range(20_000, 30_000)


def run_classic(env: Mapping[str, str], slurm: Slurm) -> int:
    """Run this node's part of a classic multi-node job (started on each node by srun).

    Raises:
        KitError: what is needed is missing; nothing was started.
    """
    site = Site.from_environment(env)
    for name in ("SLURM_JOB_ID", "SLURM_NODEID", "SLURM_NNODES", "SLURM_JOB_NODELIST"):
        if name not in env:
            raise UsageError(
                f"{name} is not set: submit with `sbatch -N 2 llama3.1-8b-pretraining.sh`"
            )
    job, node_rank, nodes = (
        int(env[name]) for name in ("SLURM_JOB_ID", "SLURM_NODEID", "SLURM_NNODES")
    )
    node = env.get("SLURMD_NODENAME") or os.uname().nodename
    say(f"launching node {node_rank} of {nodes} on {node}")
    training = preflight.check(site)
    folder = site.outputs.absolute() / "classic" / str(job)
    attempt = int(env.get("SLURM_RESTART_COUNT") or "0") + 1
    ranks = folder / "ranks" / f"{node_rank}.{attempt}"
    ranks.mkdir(parents=True, exist_ok=True)
    torchrun = Torchrun(
        ranks_per_node=site.ranks_per_node,
        log_dir=ranks,
        node_address=site.node_address,
        nodes=nodes,
        node_rank=node_rank,
        master=meeting_point(env, slurm, job) if nodes > 1 else "",
    )
    failures = ranks / "failures.json"
    child_env = {
        **common_environment(env, site),
        "TFT_ATTEMPT": str(attempt),
        "TFT_FAILURES": str(failures),
        "TFT_EVENTS": str(folder / f"node-{node_rank}.events.jsonl"),
    }
    extra = [*wandb_flags(env, training.settings, site.extra_args), *site.extra_args]
    flags = trainer_flags(site.config, folder, extra)
    payload = Payload(torchrun.argv(flags), child_env)
    code = payload.run()
    if payload.stopped_by is not None:
        complain(f"node {node_rank} on {node} was stopped by {payload.stopped_by.name}")
    elif code != 0:
        complain(
            f"node {node_rank} on {node} failed: {why(failures)}; every rank's output: {ranks}"
        )
    else:
        say(f"node {node_rank} on {node} finished")
    return code


def meeting_point(env: Mapping[str, str], slurm: Slurm, job: int) -> str:
    """``host:port`` of the job's first node, the same on every node of it."""
    first = slurm.hostnames(env["SLURM_JOB_NODELIST"])[0]
    return f"{slurm.node_address(first)}:{PORTS[job % len(PORTS)]}"
