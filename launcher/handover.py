"""How the settings of a run reach it: as variables of its tasks, and as flags of sbatch. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from launcher.config import Site
from launcher.methods import DDP
from launcher.settings import Resolved

#: What the job script's header asks for.
HEADER_GPUS, HEADER_CPUS, HEADER_NOTICE = 8, 128, 600.0


def environment(
    resolved: Resolved, env: Mapping[str, str], *, local: bool = False
) -> dict[str, str]:
    """Variables that hand the settings to tasks which get ``env``, too.

    Args:
        local: they run on this machine, and see to their ranks themselves.
    """
    handed = resolved.environment()
    for name in resolved.get("variables", {}):
        if name in env:  # a shell's word is stronger than a file's
            del handed[name]
    if most := resolved.get("max_replicas"):
        handed["TFT_MAX_REPLICAS"] = str(most)
    # Tasks take it from their GPUs; here there are none to count.
    ranks = 1 if resolved.get("method") == DDP.name else resolved.get("gpus_per_node")
    if ranks and not local and not resolved.get("ranks_per_node"):
        handed["TFT_RANKS_PER_NODE"] = str(ranks)
    return handed


def indices(replicas: int, most: int, spares: int) -> str:
    """Array indices: replica groups from 0 up, and spares after the most that there can be."""
    ranges = [(0, replicas), *([(most, most + spares)] if spares else [])]
    if most == replicas:
        ranges = [(0, replicas + spares)]
    return ",".join(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in ranges)


def sbatch_flags(resolved: Resolved, array: str, site: Site) -> list[str]:
    """sbatch's flags of a run whose array has those indices."""
    flags = [f"--array={array}", "--export=ALL"]
    if site.notice != HEADER_NOTICE:
        flags.append(f"--signal=B:USR2@{site.notice:g}")
    if (nodes := resolved.get("nodes_per_replica", 1)) > 1:
        flags.append(f"--nodes={nodes}")
    gpus, cpus = resolved.get("gpus_per_node"), resolved.get("cpus_per_node")
    if site.method == DDP.name:
        # A group is one GPU, and takes its share of a node, not the whole of it.
        flags.append("--oversubscribe")
        cpus = max(1, (cpus or HEADER_CPUS) // (gpus or HEADER_GPUS))
        gpus = 1
    flags += [f"--gpus-per-node={gpus}"] if gpus else []
    flags += [f"--cpus-per-task={cpus}"] if cpus else []
    further = resolved.sbatch_flags()
    if site.method == DDP.name:
        further = [
            _share_of(flag, resolved.get("gpus_per_node") or HEADER_GPUS) for flag in further
        ]
    return [*flags, *filter(None, further)]


def _share_of(flag: str, gpus: int) -> str:
    """A flag for a group of one GPU: of a node's memory its share (of "all of it" there is none)."""
    match = re.fullmatch(r"--mem=(\d+)([KMGT]?)", flag)
    if match is None:
        return flag
    share = int(match[1]) // gpus
    return f"--mem={share}{match[2]}" if share else ""
