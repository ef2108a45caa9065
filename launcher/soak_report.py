"""What a soak has shown, as text and as data. Pure."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from launcher import growth
from launcher.drill_verdict import Outcome, hit
from launcher.drills import KINDS, Stage
from launcher.events import Event
from launcher.incidents import Incident
from launcher.state import RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One failure of a schedule."""

    wait: float
    """Seconds after the one before."""
    kind: str
    replica: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What was trained up to a time, or between two."""

    t: float
    committed: int
    failed: int
    step: int
    member_seconds: float
    size: int

    @classmethod
    def of(cls, state: RunState, t: float) -> Cost:
        open_seconds = max(0.0, t - state.quorum_since) if state.quorum_since else 0.0
        return cls(
            t=t,
            committed=sum(group.commits for group in state.groups.values()),
            failed=sum(group.failed_commits for group in state.groups.values()),
            step=state.step,
            member_seconds=state.member_seconds + open_seconds * len(state.members),
            size=state.size,
        )

    def since(self, before: Cost) -> Cost:
        return Cost(
            t=self.t - before.t,
            committed=self.committed - before.committed,
            failed=self.failed - before.failed,
            step=self.step - before.step,
            member_seconds=self.member_seconds - before.member_seconds,
            size=self.size,
        )

    @property
    def step_efficiency(self) -> float:
        """Committed over tried steps."""
        tried = self.committed + self.failed
        return self.committed / tried if tried else 0.0

    @property
    def participation(self) -> float:
        """Mean size of the quorum over the number of groups."""
        whole = self.t * self.size
        return min(1.0, self.member_seconds / whole) if whole > 0 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Soak:
    """A soak that is over."""

    seed: int
    mtbf: float
    planned: Sequence[Planned]
    outcomes: Sequence[Outcome]
    cost: Cost
    false_alarms: Sequence[str]
    compared: int
    differences: int
    before: Mapping[str, growth.Held]
    after: Mapping[str, growth.Held]

    @property
    def passed(self) -> bool:
        """All was recovered from, without help where none is meant to be needed."""
        return (
            len(self.outcomes) == len(self.planned)
            and all(outcome.passed for outcome in self.outcomes)
            and not self.differences
            and self.compared > 0
            and not self.false_alarms
            and not growth.grown(self.before, self.after)
        )

    @property
    def recoveries(self) -> list[float]:
        """Seconds from each failure to the first commit after it, sorted."""
        done = (outcome.seconds.get(Stage.COMMITS.value) for outcome in self.outcomes)
        return sorted(seconds for seconds in done if seconds is not None)

    def lines(self) -> list[str]:
        kinds = Counter(outcome.kind for outcome in self.outcomes)
        recovered = sum(o.passed and not KINDS[o.kind].help for o in self.outcomes)
        cost, found = self.cost, growth.grown(self.before, self.after)
        word, names = ("PASSED" if self.passed else "FAILED"), sorted(kinds.items())
        made = ", ".join(f"{name} {number}" for name, number in names)
        efficiency = cost.step_efficiency * cost.participation
        equal = "DIFFER" if self.differences else "equal"
        pairs = (
            f"{self.differences or self.compared} of {self.compared} compared (step, rank) pairs"
        )
        rows = [f"soak: {word} (seed {self.seed}, one every {self.mtbf:g} s, {cost.t:.0f} s)"]
        rows.append(f"failures injected: {len(self.outcomes)} of {len(self.planned)} ({made})")
        rows.append(f"recovered without help: {recovered}")
        rows.append(f"steps: {cost.step}; commits {cost.committed}, failed commits {cost.failed}")
        rows.append(
            f"step efficiency {cost.step_efficiency:.1%}, participation {cost.participation:.1%}, "
            f"training efficiency {efficiency:.1%}"
        )
        rows.append(f"time to recover: {_spread(self.recoveries)}")
        rows.append(f"false alarms: {len(self.false_alarms) or 'none'}")
        rows += [f"  {alarm}" for alarm in self.false_alarms]
        rows.append(f"weights: {equal} at {pairs}")
        rows += growth.lines(self.before, self.after)
        rows += [f"GROWN  {problem}" for problem in found]
        for outcome in self.outcomes:
            if not outcome.passed:
                failed = "; ".join(check.text for check in outcome.checks if not check.ok)
                rows.append(f"FAILED  {outcome.kind} on replica {outcome.replica}: {failed}")
        return rows

    def as_data(self) -> dict[str, Any]:
        cost, values = self.cost, self.recoveries
        return {
            "passed": self.passed,
            "seed": self.seed,
            "mtbf_s": self.mtbf,
            "seconds": round(cost.t, 1),
            "schedule": [asdict(one) for one in self.planned],
            "drills": [outcome.as_data() for outcome in self.outcomes],
            "recovered": sum(outcome.passed for outcome in self.outcomes),
            "steps": cost.step,
            "committed": cost.committed,
            "failed_commits": cost.failed,
            "step_efficiency": cost.step_efficiency,
            "participation": cost.participation,
            "training_efficiency": cost.step_efficiency * cost.participation,
            "time_to_recover_s": {
                "median": statistics.median(values) if values else None,
                "p95": quantile(values, 0.95),
                "worst": values[-1] if values else None,
            },
            "false_alarms": list(self.false_alarms),
            "weights": {"compared": self.compared, "differences": self.differences},
            "held": {
                "before": growth.as_data(self.before),
                "after": growth.as_data(self.after),
                "grown": growth.grown(self.before, self.after),
            },
        }


def unexplained(
    outcomes: Iterable[Outcome],
    incidents: Iterable[Incident],
    events: Iterable[Event],
    since: float,
    settle: float,
) -> list[str]:
    """Losses, restarts and orders of the guardian that no failure of ours has caused.

    Args:
        events: launches of replica groups and the guardian's actions.
        since: what was before is not asked about, Unix seconds.
        settle: seconds after a recovery in which it still explains something.
    """
    windows = [
        (hit(KINDS[outcome.kind], outcome.replica), outcome.t - 0.5, outcome.ended + settle)
        for outcome in outcomes
    ]

    def explained(replica: int | None, t: float) -> bool:
        return any(replica in whom and start <= t <= end for whom, start, end in windows)

    found = []
    for incident in incidents:
        if incident.lost_at >= since and not explained(incident.replica, incident.lost_at):
            found.append((incident.lost_at, f"{incident.who} was lost: {incident.why[:120]}"))
    for event in events:
        if event.t >= since and not explained(event.replica, event.t):
            what = event.get("what") if event.kind == "action" else "was started again"
            found.append((event.t, f"replica {event.replica} {what}: {event.get('why', '')}"))
    return [text for _, text in sorted(found)]


def quantile(values: Sequence[float], part: float) -> float | None:
    """Of sorted values: the smallest that is not exceeded by that part of them."""
    if not values:
        return None
    return values[max(0, math.ceil(part * len(values)) - 1)]


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "nothing to measure"
    p95 = quantile(values, 0.95)
    return (
        f"median {statistics.median(values):.1f} s, p95 {p95:.1f} s, worst {values[-1]:.1f} s "
        f"({len(values)} measured)"
    )
