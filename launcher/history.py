"""What happened over the whole of a run, in bounded memory: the series a report draws. Pure.

A series never grows with the steps: when it is full, neighbours are merged so that what
was worst in them (a loss, a spike) is kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection
from typing import Generic, NamedTuple, TypeVar

from launcher.events import Event
from launcher.groups import Group
from launcher.model import GroupState
from launcher.stalls import overdue, patience, stalls_at
from launcher.state import RunState

#: Changes kept for one replica group, and of the quorum's size.
MOST_CHANGES = 2000
#: Points kept of the loss and of the tokens per second; even, for they are merged in pairs.
MOST_POINTS = 2000
#: Seconds after which every group is looked at, for Slurm changes states without an event.
CHECK_EVERY = 1.0

#: How much a state matters where there is no room for all: the last ones most.
BY_BADNESS = (
    GroupState.DONE,
    GroupState.TRAINING,
    GroupState.PENDING,
    GroupState.REQUEUED,
    GroupState.STARTING,
    GroupState.HEALING,
    GroupState.STALLED,
    GroupState.LOST,
)

#: States in which a group is waited for when the others ask for the next quorum.
WORKING = (GroupState.TRAINING, GroupState.HEALING)

V = TypeVar("V")


class Span(NamedTuple, Generic[V]):
    """A value and the time during which it stood."""

    start: float
    end: float
    value: V


class Changes(Generic[V]):
    """A value that changes now and then."""

    def __init__(self, badness: Callable[[V], int]) -> None:
        self.points: list[tuple[float, V]] = []
        """When it changed (Unix seconds, rising), and to what."""
        self._badness = badness

    def add(self, t: float, value: V) -> None:
        if self.points:
            last, before = self.points[-1]
            if value == before:
                return
            t = max(t, last)
        self.points.append((t, value))
        if len(self.points) > MOST_CHANGES:
            self._coarsen()

    def add_before(self, t: float, value: V, instead_of: Collection[V]) -> None:
        """Put in what is known of ``t`` only later, where one of ``instead_of`` stood then."""
        before = [index for index, point in enumerate(self.points) if point[0] <= t]
        if not before or self.points[before[-1]][1] not in instead_of:
            return
        after = before[-1] + 1
        if after < len(self.points) and self.points[after][1] == value:
            del self.points[after]
        self.points.insert(after, (t, value))

    def spans(self, end: float) -> list[Span[V]]:
        """The values one after the other, the last one until ``end``."""
        ends = [t for t, _ in self.points[1:]] + [end]
        return [
            Span(t, max(t, until), value)
            for (t, value), until in zip(self.points, ends, strict=False)
        ]

    def _coarsen(self) -> None:
        """Keep the worst and the last value of every slice of time."""
        first = self.points[0][0]
        slice_seconds = (self.points[-1][0] - first) / (MOST_CHANGES // 4) or 1.0
        kept: list[tuple[float, V]] = []
        for _, group in itertools.groupby(
            self.points, key=lambda point: int((point[0] - first) / slice_seconds)
        ):
            here = list(group)
            worst = max(here, key=lambda point: self._badness(point[1]))
            for point in [worst] if worst is here[-1] else [worst, here[-1]]:
                if not kept or kept[-1][1] != point[1]:
                    kept.append(point)
        self.points = kept


class Point(NamedTuple):
    """Some measurements in a row, as one."""

    t: float
    low: float
    mean: float
    high: float


class Series:
    """A number measured again and again; its extremes survive the thinning."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self._stride = 1
        """Measurements in one point."""
        self._count = 0
        self._open = Point(0.0, 0.0, 0.0, 0.0)
        """Point that is not full yet, of ``_count`` measurements."""

    def add(self, t: float, value: float) -> None:
        """Take in one measurement; what is not finite has no place in a picture."""
        if not math.isfinite(value):
            return
        if self._count == 0:
            self._open = Point(t, value, value, value)
        else:
            start, low, mean, high = self._open
            mean += (value - mean) / (self._count + 1)
            self._open = Point(start, min(low, value), mean, max(high, value))
        self._count += 1
        if self._count == self._stride:
            self.points.append(self._open)
            self._count = 0
        if len(self.points) >= MOST_POINTS:
            self.points = [
                Point(a.t, min(a.low, b.low), (a.mean + b.mean) / 2, max(a.high, b.high))
                for a, b in zip(self.points[::2], self.points[1::2], strict=True)
            ]
            self._stride *= 2


class History:
    """The series of one run; ``note`` is made to be a watcher's ``on_event``."""

    def __init__(self) -> None:
        self.groups: dict[int, Changes[GroupState]] = {}
        self.quorum: Changes[int] = Changes(lambda size: -size)
        """Replica groups in the quorum."""
        self.loss = Series()
        self.tokens_per_second = Series()
        """Of rank 0 of every replica group, summed over the groups."""
        self._speeds: dict[int, float] = {}
        """By replica group, since somebody reported for the second time."""
        self._losses: list[float] = []
        """The same of groups that train by themselves: each has its own."""
        self._reported = 0.0
        self._checked = float("-inf")

    def note(self, state: RunState, event: Event) -> None:
        """Take in what ``event`` has made of ``state``."""
        if event.kind == "membership":
            self.quorum.add(event.t, len(state.members))
            self._stalls(state, event)
        elif event.kind == "metrics" and event.replica is not None:
            self._metrics(state, event, event.replica)
        if event.kind == "membership" or event.t - self._checked >= CHECK_EVERY:
            self.check(state)
            self._checked = event.t
        elif event.replica in state.groups:
            self._group(state, state.groups[event.replica])

    def check(self, state: RunState) -> None:
        """Take in the states of all replica groups."""
        for group in state.groups.values():
            self._group(state, group)

    def _stalls(self, state: RunState, event: Event) -> None:
        """Whom the others had waited for, which a quorum that ends a wait tells afterwards."""
        waited = event.get("waited")
        if waited is None or overdue(waited, state.groups.values(), event.t) is None:
            return
        usual = patience(state.groups.values())
        for replica, changes in self.groups.items():
            if replica not in waited.requested:
                stalled = stalls_at(waited, state.group(replica), usual)
                changes.add_before(stalled, GroupState.STALLED, instead_of=WORKING)

    def _group(self, state: RunState, group: Group) -> None:
        changes = self.groups.get(group.replica)
        if changes is None:
            changes = self.groups[group.replica] = Changes(BY_BADNESS.index)
        changes.add(max(group.since, state.first_event or 0.0), group.state)

    def _metrics(self, state: RunState, event: Event, replica: int) -> None:
        loss, speed = event.get("loss"), event.get("tokens_per_second")
        if replica in self._speeds:
            # A new step: all who take part in training have reported the one before.
            self.tokens_per_second.add(self._reported, sum(self._speeds.values()))
            if self._losses:
                self.loss.add(self._reported, sum(self._losses) / len(self._losses))
            self._speeds, self._losses = {}, []
        if isinstance(loss, int | float):
            if state.sync_every > 1:
                self._losses.append(float(loss))
            elif not self._speeds:
                self.loss.add(event.t, float(loss))
        self._speeds[replica] = float(speed) if isinstance(speed, int | float) else 0.0
        self._reported = event.t
