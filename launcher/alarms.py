"""What of a run is worth an alarm, and how often: a cooldown that holds back, and then sums up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from launcher.findings import Severity
from launcher.sinks import Update

#: Seconds in which the same kind of news of the same subject is told only once.
COOLDOWN = 300.0


class News(Protocol):
    """Something that can happen again and again."""

    @property
    def subject(self) -> str:
        """What it is about: what is held back of one subject is told together."""

    @property
    def kind(self) -> str:
        """What happened to it: each kind has a cooldown of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """One thing that a person wants to know at once."""

    subject: str
    kind: str
    text: str

    @property
    def title(self) -> str:
        """In a few words."""
        return f"{self.subject} {self.kind}"


def alarms(update: Update) -> Iterator[Alarm]:
    """Losses, recoveries, critical findings and an early end."""
    there = f"{len(update.members)} of {update.group_size} replica groups are in the quorum"
    for i in update.lost:
        where = f" on {i.where}" if i.where else ""
        text = f"{i.who} LOST{where} at step {i.lost_at_step}: {i.why}; {there}"
        yield Alarm(subject=i.who, kind="lost", text=text)
    for i in update.recovered:
        text = f"{i.who} RECOVERED at step {i.recovered_at_step}; {there}"
        yield Alarm(subject=i.who, kind="recovered", text=text)
    for f in update.appeared:
        if f.severity is Severity.CRITICAL:
            text = f"CRITICAL {f.kind}: {f.message}"
            yield Alarm(subject=f.key, kind="critical", text=text)
    if update.ended:
        yield Alarm(subject="the run", kind="ended early", text=update.ended)


_News = TypeVar("_News", bound=News)


@dataclass(slots=True)
class Due(Generic[_News]):
    """What is to be told now of one subject."""

    newest: _News
    kinds: Counter[str] = field(default_factory=Counter)
    """How often each kind happened since the last time that the subject was told of."""
    since: float | None = None
    """When the first of it happened that was held back; None: nothing was."""

    def summed_up(self, now: float) -> str:
        """What was held back, in words that follow others; empty when nothing was."""
        if self.since is None:
            return ""
        counts = ", ".join(
            f"{kind} {count} time{'s' if count > 1 else ''}" for kind, count in self.kinds.items()
        )
        return f" (told of the last {now - self.since:.0f} s together: {counts})"


class Cooldown(Generic[_News]):
    """Passes on what is new, and holds back what comes again too soon, to sum it up later."""

    def __init__(self, seconds: float = COOLDOWN) -> None:
        self._seconds = seconds
        self._told: dict[tuple[str, str], float] = {}
        self._held: dict[str, Due[_News]] = {}

    def pass_on(self, news: Iterable[_News], now: float) -> list[Due[_News]]:
        """What is to be told at ``now``: new things, and those whose cooldown has ended.

        To be called at every look, also without news.
        """
        due = []
        for one in news:
            held = self._held.get(one.subject) or Due(one)
            held.newest = one
            held.kinds[one.kind] += 1
            if self._warm(one.subject, one.kind, now):
                held.since = now if held.since is None else held.since
                self._held[one.subject] = held
            else:
                due.append(self._release(held, now))
        for subject, held in list(self._held.items()):
            if not all(self._warm(subject, kind, now) for kind in held.kinds):
                due.append(self._release(held, now))
        return due

    def rest(self) -> list[Due[_News]]:
        """What is still held back, at the end."""
        held, self._held = self._held, {}
        return list(held.values())

    def _warm(self, subject: str, kind: str, now: float) -> bool:
        return now - self._told.get((subject, kind), float("-inf")) < self._seconds

    def _release(self, due: Due[_News], now: float) -> Due[_News]:
        """Of one subject all is told together: one half of it would be out of date."""
        self._held.pop(due.newest.subject, None)
        for kind in due.kinds:
            self._told[due.newest.subject, kind] = now
        return due
