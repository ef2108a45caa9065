"""When a wait for a replica group is a stall: one rule, for its state and for the finding. Pure.

Groups that sync at every step join the next quorum within a step of each other. With a semi-sync
method one may wait for another as long as that one needs to come to its next sync: it is no stall while
that group goes on with its own steps, of which it tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from launcher.groups import Group
from launcher.lighthouse_log import Waiting
from launcher.model import GroupState
from launcher.timeouts import HANG_SECONDS

#: A wait counts as a stall after this many usual steps (and at least ``HANG_SECONDS``).
STALL_STEPS = 5.0
#: Seconds by which a group's word of its own steps may be late: it tells of them every 2 s, and NFS
#: shows a file that grows some seconds later (``acregmin`` is 3, ``acregmax`` 60).
LATE_SECONDS = 20.0
#: Seconds that others wait for a group in its first steps, which compile and load.
FIRST_STEPS_SECONDS = 300.0
#: A member in these states is silent for a reason that is known already.
_EXCUSED = frozenset(
    {
        GroupState.PENDING,
        GroupState.REQUEUED,
        GroupState.STARTING,
        GroupState.LOST,
        GroupState.DONE,
    }
)


def patience(groups: Iterable[Group]) -> float:
    """Seconds of waiting after which it is a stall."""
    usual = max((group.pace or 0.0 for group in groups), default=0.0)
    return max(HANG_SECONDS, STALL_STEPS * usual)


def stalls_at(waiting: Waiting, group: Group, usual: float) -> float:
    """When a group that others wait for has stalled, unless it goes on before; never while nobody
    waits.

    Args:
        usual: the ``patience`` with its groups, seconds.
    """
    if waiting.since is None:
        return math.inf
    longest = FIRST_STEPS_SECONDS if group.warming else usual
    late = LATE_SECONDS if group.progress_at else 0.0
    return max(waiting.since, group.progress_at) + longest + late


def overdue(waiting: Waiting, groups: Iterable[Group], now: float) -> float | None:
    """Seconds that the next quorum has been waited for; None while that is no stall."""
    groups = list(groups)
    if waiting.since is None or now < waiting.since + (usual := patience(groups)):
        return None
    awaited = [group for group in groups if group.replica not in waiting.requested]
    if any(group.progress_at and now < stalls_at(waiting, group, usual) for group in awaited):
        return None
    return now - waiting.since


def silent(
    waiting: Waiting, members: Iterable[int], groups: Mapping[int, Group], now: float
) -> list[int]:
    """Members of the quorum that others wait for: alive (the lighthouse forms a quorum without
    one whose heartbeats end), and not joining."""
    if waiting.since is None:
        return []
    usual = patience(groups.values())
    return [
        replica
        for replica in members
        if replica not in waiting.requested
        and groups[replica].state not in _EXCUSED
        and now >= stalls_at(waiting, groups[replica], usual)
    ]
