"""One replica group, as far as its own events and Slurm tell. Pure data."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from launcher.events import Event
from launcher.incidents import Sign
from launcher.model import GroupState


@dataclass(slots=True, kw_only=True)
class Group:
    """One replica group."""

    replica: int
    state: GroupState = GroupState.PENDING
    since: float = 0.0
    """When it came into this state, Unix seconds."""
    before_stall: GroupState = GroupState.TRAINING
    """What it goes back to when it was STALLED and joins after all."""
    attempt: int = 0
    copies: deque[str] = field(default_factory=lambda: deque(maxlen=8))
    """uuids under which it was in a quorum, the newest last."""
    seen_copies: int = 0
    """How many there were."""
    tells: bool = False
    """Whether it tells of its commits itself; else they follow from the quorums."""
    task: int | None = None
    """Array task that runs it; None: the one of its own index."""
    host: str = ""
    """Its node; of several the first, on which its launcher runs."""
    nodes: tuple[str, ...] = ()
    """All of them."""
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
    progress_at: float = 0.0
    """When it last told of a step of its own, or began to join the others; semi-sync only."""
    progress_step: int | None = None
    """Which step that was; None while it joins."""
    own_step_seconds: float | None = None
    """Moving mean of the time of its own steps; semi-sync only."""
    busy_seconds: float | None = None
    """Moving mean of its own work in a step, since the quorum changed."""
    busy_samples: int = 0
    uuid: str = ""
    failed_since_commit: int = 0
    failed_at: float | None = None
    """When it first failed to commit since then, Unix seconds."""
    ended_ok: bool = False
    left: bool = False
    """Whether it was told to leave the run."""
    ended: bool = False
    """Whether its newest attempt said that it ended."""
    requeues: int = 0
    """How often the guardian has requeued it since its last commit."""
    next: str = ""
    """What its launcher decided when that attempt failed."""
    busy: str = ""
    """What keeps it from the next step, when it said so: a checkpoint, for example."""
    waiting: str = ""
    """Slurm's reason while it waits in the queue."""
    slurm_state: str = ""
    expected_start: str = ""
    """When Slurm means to start it, while it waits."""
    signs: list[Sign] = field(default_factory=list)
    gpus: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    """Newest sample of each GPU, by node and index."""
    ecc_before: dict[tuple[str, int], int] = field(default_factory=dict)
    """Uncorrected memory errors each GPU had at the first sample of this attempt."""
    boot: dict[str, float] = field(default_factory=dict)
    """Where the time of its newest start went, seconds by phase, in their order: torchrun,
    imports, model, quorum, first step."""
    launched_at: float = 0.0
    """Start of its newest attempt, Unix seconds."""
    boot_at: float = 0.0
    """When the newest of those phases ended, Unix seconds."""
    xids: deque[tuple[float, str, int, int]] = field(default_factory=lambda: deque(maxlen=16))
    """(time, node, GPU, Xid) of the driver's newest errors."""

    @property
    def attempts(self) -> int:
        """How often it was started: as its launcher counts, else as its copies in quorums tell."""
        return self.attempt or self.seen_copies

    def joined_as(self, uuid: str) -> bool:
        """Note that a copy of it is in a quorum; returns whether it is a new one."""
        if uuid in self.copies:
            return False
        self.copies.append(uuid)
        self.seen_copies += 1
        return True

    @property
    def pace(self) -> float | None:
        """Usual seconds of one step, with or without a commit at its end."""
        return self.own_step_seconds or self.step_seconds

    @property
    def warming(self) -> bool:
        """Whether it is in its first step of its own, which may compile, or waits to begin it."""
        return self.progress_at > 0 and self.own_step_seconds is None

    def progressed(self, t: float, step: int | None) -> None:
        """Note that it has come to ``step`` of its own; None: that it joins the others."""
        before, self.progress_step = self.progress_step, step
        if step is None:
            self.own_step_seconds = None
        elif before is not None and step > before:
            seconds = (t - self.progress_at) / (step - before)
            mean = self.own_step_seconds
            self.own_step_seconds = seconds if mean is None else mean + 0.1 * (seconds - mean)
        self.progress_at = t

    def reached(self, phase: str, t: float) -> None:
        """Note that the newest start of this group has come to the end of a phase."""
        if self.boot_at and phase not in self.boot:
            self.boot[phase] = round(max(0.0, t - self.boot_at), 3)
            self.boot_at = t

    @property
    def where(self) -> str:
        """Its nodes, in words."""
        return f"{self.host} +{len(self.nodes) - 1}" if len(self.nodes) > 1 else self.host

    @property
    def task_index(self) -> int:
        """Index of the array task that runs it."""
        return self.replica if self.task is None else self.task


def replaced(group: Group, event: Event) -> bool:
    """Whether ``event`` is of a copy in whose place another one has started."""
    attempt, host = event.get("attempt"), event.get("host")
    if isinstance(attempt, int):
        return attempt < group.attempt
    return bool(host and group.host and host not in (group.host, *group.nodes))
