"""Folds events into a state in the order of their time, also those that are read late. Pure but for
the clock that bounds its work.

Logs of several nodes come over a shared file system, some seconds apart (NFS shows a file that
grows up to ``acregmax``, 60 s, late). An event that is read after later ones were folded in is folded
in at once, so that it is told; then the state is taken back to before its time, and everything since
is folded again. So the state is that of one pass over all of it, in whatever order it came.
"""

from __future__ import annotations

import bisect
import dataclasses
import pickle
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from launcher.events import Event
from launcher.incidents import Incident
from launcher.observed import Notice
from launcher.state import RunState

#: Events kept to be folded again, at least; of many replica groups, as many of each of them.
MOST_EVENTS, MOST_OF_A_GROUP = 20_000, 100
#: Into how many parts those are divided: the oldest is forgotten as a whole.
PARTS = 4
#: Part of the time that may be spent on folding again, and seconds that it may begin with.
MOST_OF_THE_TIME, FIRST_SECONDS = 0.02, 1.0


@dataclass(slots=True)
class _Part:
    """Events in a row, and the state before them."""

    state: bytes
    since: float
    """Newest time of an event before them, Unix seconds."""
    events: list[Event]
    """By time."""
    told: Counter[Notice]
    """What was told of them."""


#: Seconds by which the beginning of an incident may move when it is corrected.
SAME_SECONDS = 120.0
_DETAILS = re.compile(r"\(.*\)|[0-9.]+")


def _shape(notice: Notice) -> str:
    """A notice but for how much, how long and why."""
    return _DETAILS.sub("#", notice.text)


class Fold:
    """A state, and what it takes to correct it. ``state`` stays the same object."""

    def __init__(self, state: RunState) -> None:
        self.state = state
        self.forgot = False
        """Whether an event came from before all that is kept: only the files can help."""
        self._parts = [self._part(float("-inf"))]
        self._to = float("-inf")
        """Newest time of an event that was folded in."""
        self._late: float | None = None
        """Time of the oldest event that came too late, while the state is not corrected."""
        self._began = time.monotonic()
        self._spent = 0.0

    def take(self, event: Event) -> list[Notice]:
        """Fold one event in; returns what there is to tell of it."""
        part = self._parts[-1]
        if len(part.events) >= self._most / PARTS:
            part = self._next_part()
        notices = self.state.apply(event)
        if event.t >= self._to:
            part.events.append(event)
            self._to = event.t
        else:
            self._insert(event)
            part = self._part_of(event.t) or part
        part.told.update(notices)
        return notices

    def correct(self, *, now: bool = False) -> list[Notice]:
        """Put right what late events have upset; returns what was not told before.

        Args:
            now: however long it takes.
        """
        began = time.monotonic()
        allowed = FIRST_SECONDS + MOST_OF_THE_TIME * (began - self._began)
        if self._late is None or (self._spent > allowed and not now):
            return []
        start = self._part_of(self._late)
        self.forgot = self.forgot or start is None
        first = 0 if start is None else self._parts.index(start)
        again = self._parts[first:]
        del self._parts[first:]
        state = pickle.loads(again[0].state)  # noqa: S301 (our own bytes)
        self._parts.append(
            _Part(state=again[0].state, since=again[0].since, events=[], told=Counter())
        )
        before = sum((part.told for part in again), Counter[Notice]())
        news: list[Notice] = []
        for event in (event for part in again for event in part.events):
            part = self._parts[-1]
            if len(part.events) >= self._most / PARTS:
                part = self._next_part(state)
            notices = state.apply(event)
            part.events.append(event)
            part.told.update(notices)
            news += notices
            self._to = max(self._to, event.t)
        self._take_over(state)
        self._late = None
        self._spent += time.monotonic() - began
        # What is told again with other numbers is no news.
        fresh = Counter(news) - before
        corrected = Counter(_shape(notice) for notice in (before - Counter(news)).elements())
        told = []
        for notice in dict.fromkeys(news):
            if notice in fresh and corrected[_shape(notice)] <= 0:
                told.append(notice)
            elif notice in fresh:
                corrected[_shape(notice)] -= 1
        return told

    def begin_again(self, state: RunState) -> None:
        """Forget everything, and begin with ``state``."""
        self._take_over(state)
        self.forgot, self._late, self._to = False, None, float("-inf")
        self._parts = [self._part(self._to)]

    @property
    def _most(self) -> int:
        return max(MOST_EVENTS, MOST_OF_A_GROUP * len(self.state.groups))

    def _part(self, since: float, state: RunState | None = None) -> _Part:
        held = pickle.dumps(state or self.state, protocol=pickle.HIGHEST_PROTOCOL)
        return _Part(state=held, since=since, events=[], told=Counter())

    def _next_part(self, state: RunState | None = None) -> _Part:
        newest = self._parts[-1]
        since = max([newest.since, *(event.t for event in newest.events[-1:])])
        self._parts.append(self._part(since, state))
        del self._parts[: -PARTS - 1]
        return self._parts[-1]

    def _part_of(self, t: float) -> _Part | None:
        """The newest part into which an event of that time falls; None: it is forgotten."""
        return next((part for part in reversed(self._parts) if part.since <= t), None)

    def _insert(self, event: Event) -> None:
        part = self._part_of(event.t)
        if part is None:
            self.forgot = True
            return
        bisect.insort_right(part.events, event, key=lambda other: other.t)
        self._late = event.t if self._late is None else min(self._late, event.t)

    def _take_over(self, state: RunState) -> None:
        """Make ``self.state`` equal to ``state``, but for what no event tells: Slurm's word. Its
        groups and incidents stay the same objects too: somebody may have them in mind."""
        for replica, group in self.state.groups.items():
            again = state.groups.get(replica)
            if again is not None:
                again.waiting, again.slurm_state = group.waiting, group.slurm_state
                again.expected_start = group.expected_start
                _become(group, again)
                state.groups[replica] = group
        _keep_incidents(self.state.incidents, state)
        _become(self.state, state)


def _become(old: Any, new: Any) -> None:
    """Give an object every field of another one of its class."""
    for each in dataclasses.fields(new):
        setattr(old, each.name, getattr(new, each.name))


def _keep_incidents(before: list[Incident], state: RunState) -> None:
    """Make the incidents of ``state`` that were known ``before`` the same objects as then. A group has
    one at a time: the nearest one of its own is the same."""
    left = list(before)
    for index, incident in enumerate(state.incidents):
        same = [old for old in left if (old.replica, old.kind) == (incident.replica, incident.kind)]
        old = min(same, key=lambda old: abs(old.opened_at - incident.opened_at), default=None)
        if old is None or abs(old.opened_at - incident.opened_at) > SAME_SECONDS:
            continue
        left.remove(old)
        _become(old, incident)
        state.incidents[index] = old
        if state.outage is incident:
            state.outage = old
