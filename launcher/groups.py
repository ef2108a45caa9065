"""One replica group, as far as its own events and Slurm tell. Pure data."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from launcher.incidents import Sign
from launcher.model import GroupState


@dataclass(slots=True, kw_only=True)
class Group:
    """One replica group."""

    replica: int
    state: GroupState = GroupState.PENDING
    since: float = 0.0
    """When it came into this state, Unix seconds."""
    attempt: int = 0
    host: str = ""
    step: int = 0
    """Manager's step: commits, counted over the whole run."""
    commits: int = 0
    failed_commits: int = 0
    last_commit: float | None = None
    longest_pause: float = 0.0
    """Longest time between two commits of one attempt, seconds."""
    loss: float | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    """Moving mean of the time between two commits."""
    uuid: str = ""
    failed_since_commit: int = 0
    ended_ok: bool = False
    waiting: str = ""
    """Slurm's reason while it waits in the queue."""
    slurm_state: str = ""
    expected_start: str = ""
    """When Slurm means to start it, while it waits."""
    signs: list[Sign] = field(default_factory=list)
    gpus: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Newest sample of each GPU of its node."""
    ecc_before: dict[int, int] = field(default_factory=dict)
    """Uncorrected memory errors each GPU had at the first sample of this attempt."""
    xids: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=16))
    """(time, GPU, Xid) of the driver's newest errors."""
