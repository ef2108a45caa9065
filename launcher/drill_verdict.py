"""Did what must follow a failure follow, and when? Pure: states in, checked claims out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from launcher.drills import STAGES, Follows, Kind, Stage
from launcher.events import Event
from launcher.incidents import Incident
from launcher.state import RunState
from launcher.verdict import Check


def hit(kind: Kind, replica: int) -> tuple[int | None, ...]:
    """Whom a failure is to take out: a group, the lighthouse (None), or nobody."""
    whom: dict[Follows, tuple[int | None, ...]] = {
        Follows.LOSS: (replica,),
        Follows.OUTAGE: (None,),
    }
    return whom.get(kind.follows, ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """A run just before a failure."""

    t: float
    """Unix seconds."""
    incidents: Sequence[Incident]
    attempts: Mapping[int, int]
    commits: Mapping[int, int]
    failed_commits: Mapping[int, int]
    compared: int
    differences: int

    @classmethod
    def of(cls, state: RunState, t: float) -> Before:
        groups = state.groups
        return cls(
            t=t,
            incidents=list(state.incidents),
            attempts={r: g.attempt for r, g in groups.items()},
            commits={r: g.commits for r, g in groups.items()},
            failed_commits={r: g.failed_commits for r, g in groups.items()},
            compared=state.weights.compared,
            differences=state.weights.differences,
        )


@dataclass(slots=True)
class Story:
    """What has followed one failure so far; `note` is told every event."""

    kind: Kind
    replica: int
    before: Before
    reached: dict[Stage, float] = field(default_factory=dict)
    """Unix seconds."""
    first_commits: dict[int, float] = field(default_factory=dict)
    """First commit of each of the others since the loss was detected."""
    restored_at: float | None = None
    _compared: int | None = None

    @property
    def hit(self) -> tuple[int | None, ...]:
        """Whom it is to take out: a group, the lighthouse (None), or nobody."""
        return hit(self.kind, self.replica)

    def incident(self, state: RunState) -> Incident | None:
        """What the failure has led to: of the group, or of the lighthouse."""
        found = [i for i in self.new(state) if i.replica in self.hit]
        return found[0] if found else None

    def new(self, state: RunState) -> list[Incident]:
        """Incidents since the failure."""
        known = {id(incident) for incident in self.before.incidents}
        return [i for i in state.incidents if id(i) not in known]

    def note(self, state: RunState, event: Event) -> None:
        """Take in an event that has just been folded into ``state``."""
        other = event.replica is not None and event.replica != self.replica
        if event.kind != "commit" or not other or not event.get("committed"):
            return
        if event.replica is None or event.replica in self.first_commits:
            return
        incident = self.incident(state)
        if incident is not None and incident.detected_at and event.t > incident.detected_at:
            self.first_commits[event.replica] = event.t

    def look(self, state: RunState, now: float) -> None:
        """Note the stages that have been reached."""
        if self.kind.follows is Follows.LOSS:
            self._loss(state)
        elif self.kind.follows is Follows.OUTAGE:
            self._outage(state)
        else:
            self._nothing(state, now)
        last = STAGES[self.kind.follows][-2]
        if last in self.reached:
            if self._compared is None:
                self._compared = state.weights.compared
            elif state.weights.compared > self._compared:
                self.reached.setdefault(Stage.WEIGHTS, now)

    def _loss(self, state: RunState) -> None:
        incident = self.incident(state)
        if incident is None or incident.detected_at is None:
            return
        others = set(state.groups) - {self.replica}
        again = [t for t in (incident.requeued_at, incident.started_at) if t is not None]
        self._reach(Stage.DETECTED, incident.detected_at)
        if others <= set(self.first_commits):
            self._reach(Stage.SURVIVORS, max(self.first_commits.values(), default=None))
        self._reach(Stage.AGAIN, min(again, default=None))
        self._reach(Stage.QUORUM, incident.rejoined_at)
        self._reach(Stage.HEALED, incident.healed_at)
        self._reach(Stage.COMMITS, incident.recovered_at)

    def _outage(self, state: RunState) -> None:
        incident = self.incident(state)
        if incident is None:
            return
        self._reach(Stage.DETECTED, incident.detected_at)
        self._reach(Stage.AGAIN, incident.started_at)
        self._reach(Stage.COMMITS, incident.recovered_at)

    def _nothing(self, state: RunState, now: float) -> None:
        """Everybody has committed since what was changed was put back."""
        since = self.restored_at
        if since is not None and all((g.last_commit or 0) > since for g in state.groups.values()):
            self._reach(Stage.HELD, now)

    def _reach(self, stage: Stage, t: float | None) -> None:
        if t is not None:
            self.reached.setdefault(stage, t)

    def overdue(self, now: float, patience: float) -> list[Stage]:
        """Stages that should have been reached, the first one first."""
        return [
            stage
            for stage in STAGES[self.kind.follows]
            if stage not in self.reached
            and now - self.before.t > self.kind.deadline(stage) * patience
        ]

    @property
    def complete(self) -> bool:
        return all(stage in self.reached for stage in STAGES[self.kind.follows])


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a drill has shown."""

    kind: str
    replica: int
    node: str
    t: float
    """Of the failure, Unix seconds."""
    ended: float
    seconds: Mapping[str, float]
    """From the failure to each stage that was reached, by its name."""
    steps_lost: int
    cause: str
    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        return all(check.ok for check in self.checks)

    def lines(self) -> list[str]:
        head = f"verdict: {'PASSED' if self.passed else 'FAILED'}"
        return [head, *(f"  {'ok    ' if c.ok else 'FAILED'}  {c.text}" for c in self.checks)]

    def as_data(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "replica": self.replica,
            "node": self.node,
            "t": round(self.t, 3),
            "passed": self.passed,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "steps_lost": self.steps_lost,
            "cause": self.cause,
            "failed": [check.text for check in self.checks if not check.ok],
        }


def judge(
    story: Story,
    state: RunState,
    node: str,
    now: float,
    *,
    patience: float = 1.0,
    excused: Collection[int | None] = (),
    problems: Sequence[str] = (),
) -> Outcome:
    """Judge a drill.

    Args:
        excused: groups that another drill has lost meanwhile, None for the lighthouse.
        problems: what could not be put back.
    """
    kind, before, incident = story.kind, story.before, story.incident(state)
    seconds = {s.value: t - before.t for s, t in story.reached.items()}
    checks = [_stage(story, stage, patience) for stage in STAGES[kind.follows]]
    if kind.follows is Follows.LOSS and incident is not None:
        expected = not kind.causes or incident.cause in kind.causes
        wanted = "" if expected else f", and not {' or '.join(c.value for c in kind.causes)}"
        checks.append(Check(ok=expected, text=f"the cause is told: {incident.why[:160]}{wanted}"))
    lost = incident.steps_lost if incident is not None else 0
    checks.append(
        Check(
            ok=lost <= kind.failed_commits,
            text=f"steps lost: {lost} of at most {kind.failed_commits}",
        )
    )
    checks.append(_others(story, state, {*excused, *story.hit}))
    found = state.weights.differences - before.differences
    if found:
        checks.append(Check(ok=False, text=f"weights DIFFER at {found} (step, rank) pairs"))
    checks += [Check(ok=False, text=f"not put back: {problem}") for problem in problems]
    return Outcome(
        kind=kind.name,
        replica=story.replica,
        node=node,
        t=before.t,
        ended=now,
        seconds=seconds,
        steps_lost=lost,
        cause=incident.why if incident is not None else "",
        checks=checks,
    )


def _stage(story: Story, stage: Stage, patience: float) -> Check:
    t, limit = story.reached.get(stage), story.kind.deadline(stage) * patience
    if t is None:
        return Check(ok=False, text=f"{stage.value}: not within {limit:g} s")
    seconds = t - story.before.t
    late = "" if seconds <= limit else f", later than {limit:g} s"
    text = f"{stage.value}: {seconds:.1f} s after the failure{late}"
    if stage is Stage.WEIGHTS:
        text = f"{stage.value}: at every (step, rank) compared since"
    return Check(ok=not late, text=text)


def _others(story: Story, state: RunState, excused: Collection[int | None]) -> Check:
    """Nobody was harmed who was not meant."""
    before, most = story.before, story.kind.failed_commits
    harmed = []
    for replica, group in state.groups.items():
        if replica in excused:
            continue
        if group.attempt != before.attempts.get(replica):
            harmed.append(f"replica {replica} was started again")
        failed = group.failed_commits - before.failed_commits.get(replica, 0)
        if failed > most:
            harmed.append(f"replica {replica} failed to commit {failed} steps")
    harmed += [
        f"{incident.who} was lost ({incident.why[:80]})"
        for incident in story.new(state)
        if incident.replica not in excused
    ]
    return Check(ok=not harmed, text="; ".join(harmed) or "nobody else was harmed")
