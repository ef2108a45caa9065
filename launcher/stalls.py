"""When a wait for a replica group is a stall: one rule, for its state and for the finding. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from launcher.groups import Group
from launcher.lighthouse_log import Waiting
from launcher.model import GroupState
from launcher.timeouts import HANG_SECONDS

#: A wait counts as a stall after this many usual steps (and at least ``HANG_SECONDS``).
STALL_STEPS = 5.0
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
    usual = max((group.step_seconds or 0.0 for group in groups), default=0.0)
    return max(HANG_SECONDS, STALL_STEPS * usual)


def overdue(waiting: Waiting, groups: Iterable[Group], now: float) -> float | None:
    """Seconds that the next quorum has been waited for; None while that is no stall."""
    if waiting.since is None:
        return None
    seconds = now - waiting.since
    return seconds if seconds >= patience(groups) else None


def silent(
    waiting: Waiting, members: Iterable[int], groups: Mapping[int, Group], now: float
) -> list[int]:
    """Members of the quorum that others wait for: alive (the lighthouse forms a quorum without
    one whose heartbeats end), and not joining."""
    if overdue(waiting, groups.values(), now) is None:
        return []
    return [
        replica
        for replica in members
        if replica not in waiting.requested and groups[replica].state not in _EXCUSED
    ]
