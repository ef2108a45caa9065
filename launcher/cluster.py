"""What Slurm shows of a cluster: its configuration, partitions, nodes and accounts. Pure.

An answer that is not understood is a ``BlindError``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.model import BlindError

#: Formats in which sinfo (by node) and sacctmgr are asked.
SINFO = "%N|%t|%c|%m|%G|%E"
SACCTMGR = "Account,Partition,QOS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition, as scontrol shows it."""

    name: str
    default: bool
    state: str
    """``UP``, ``DOWN``, ``DRAIN`` or ``INACTIVE``."""
    max_time: str
    """As Slurm writes it, e.g. ``1-00:00:00`` or ``UNLIMITED``."""
    settings: Mapping[str, str]
    """Everything that scontrol shows of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What a node has, as sinfo shows it."""

    name: str
    state: str
    reason: str
    cpus: int
    memory_mb: int
    gpus: int

    @property
    def up(self) -> bool:
        return is_up(self.state)


@dataclass(frozen=True, slots=True, kw_only=True)
class Association:
    """One account that a user may charge, as sacctmgr shows it."""

    account: str
    partition: str
    """Empty: every partition."""
    qos: tuple[str, ...]


def is_up(state: str) -> bool:
    """Whether a node in ``state`` (sinfo's short form) runs jobs or could."""
    return not re.match(r"down|drain|drng|fail|unk|boot|power|maint", state)


def configuration(text: str) -> dict[str, str]:
    """``scontrol show config``, by Slurm's own names."""
    pairs = (line.partition("=") for line in text.splitlines())
    found = {name.strip(): value.strip() for name, sign, value in pairs if sign}
    if "SLURM_VERSION" not in found:
        raise BlindError(f"scontrol shows no configuration: {text.strip()[:200]!r}")
    return found


def partitions(text: str) -> list[Partition]:
    """``scontrol --oneliner show partition``."""
    return [_partition(line) for line in text.splitlines() if "PartitionName=" in line]


def _partition(line: str) -> Partition:
    settings = dict(re.findall(r"(?:^| )(\w+)=(\S*)", line))
    try:
        return Partition(
            name=settings["PartitionName"],
            default=settings["Default"] == "YES",
            state=settings["State"],
            max_time=settings["MaxTime"],
            settings=settings,
        )
    except KeyError as error:
        raise BlindError(f"scontrol shows a partition without {error}: {line[:200]!r}") from error


def resources(text: str) -> list[Resources]:
    """``sinfo --Node`` in the format ``SINFO``; every node once."""
    found = [_resources(line) for line in text.splitlines() if line.strip()]
    return list({one.name: one for one in found}.values())


def _resources(line: str) -> Resources:
    parts = [part.strip() for part in line.split("|", 5)]
    try:
        name, state, cpus, memory, gres, reason = parts
        return Resources(
            name=name,
            state=state,
            reason=reason,
            cpus=int(cpus.rstrip("+")),
            memory_mb=int(memory.rstrip("+")),
            gpus=gpus(gres),
        )
    except ValueError as error:
        raise BlindError(f"sinfo printed a line that is not understood: {line!r}") from error


def gpus(gres: str) -> int:
    """GPUs in a list of generic resources such as ``gpu:h100:8(S:0-1),nvme:2``."""
    count = 0
    for item in re.sub(r"\([^)]*\)", "", gres).split(","):
        words = item.split(":")
        if words[0] == "gpu":
            count += int(words[-1]) if words[-1].isdigit() else 1
    return count


def associations(text: str) -> list[Association]:
    """``sacctmgr --parsable2`` in the format ``SACCTMGR``."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) != 3:
            raise BlindError(f"sacctmgr printed a line that is not understood: {line!r}")
        account, partition, qos = parts
        names = tuple(name for name in qos.split(",") if name)
        found.append(Association(account=account, partition=partition, qos=names))
    return found


def seconds(value: str) -> float | None:
    """A duration of ``scontrol show config`` such as ``30 sec``; None when it is none."""
    match = re.fullmatch(r"(\d+)(?: (usec|sec|min))?", value)
    if match is None:
        return None
    return int(match[1]) * {"usec": 1e-6, "min": 60.0}.get(match[2], 1.0)


def option(value: str, name: str) -> str | None:
    """``name`` of a comma-separated list such as ``socket=/run/x,cred_expire=5``."""
    for item in value.split(","):
        key, sign, found = item.strip().partition("=")
        if key == name:
            return found if sign else ""
    return None
