"""Did a run really recover from a loss? Pure: events in, checked claims and figures out."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.events import Event
from launcher.state import RunState


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One claim, and whether it holds."""

    ok: bool
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """All claims about one recovery."""

    checks: Sequence[Check]

    @property
    def recovered(self) -> bool:
        return all(check.ok for check in self.checks)

    def lines(self) -> list[str]:
        head = "verdict: RECOVERED" if self.recovered else "verdict: NOT RECOVERED"
        return [head, *(f"  {'ok    ' if c.ok else 'FAILED'}  {c.text}" for c in self.checks)]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightComparison:
    """Weight hashes of replica groups at the same manager step and rank."""

    compared: int
    different: tuple[tuple[int, int], ...]
    """(step, rank) pairs whose hashes differ."""
    last_compared_step: int


def judge(state: RunState, events: Sequence[Event], lost: int) -> Verdict:
    """Judge the recovery of replica group ``lost`` in a run of per-step synchronisation."""
    incident = next((i for i in state.incidents if i.replica == lost), None)
    checks = []
    if incident is None:
        checks.append(Check(ok=False, text=f"replica {lost} never left the quorum"))
    elif incident.recovered_at is None or incident.healed_from is None:
        checks.append(Check(ok=False, text=f"replica {lost} did not come back and heal"))
    else:
        away = incident.recovered_at - incident.lost_at
        checks.append(
            Check(
                ok=True,
                text=f"replica {lost} was lost at step {incident.lost_at_step}, healed from replica "
                f"{incident.healed_from} and committed step {incident.recovered_at_step} "
                f"{away:.1f} s later",
            )
        )
    checks += [_survivor(state, events, group) for group in state.groups if group != lost]
    checks.append(_weights(events, since=incident.recovered_at if incident else None))
    checks.append(_end(state))
    return Verdict(checks=checks)


def compare_weights(events: Iterable[Event], since: float | None = None) -> WeightComparison:
    """Compare every (step, rank) that at least two replica groups have hashed.

    Args:
        since: only hashes logged from this time on (Unix seconds).
    """
    hashes: dict[tuple[int, int], dict[int, str]] = defaultdict(dict)
    for event in events:
        if event.kind == "weights" and event.replica is not None:
            if since is not None and event.t < since - 1.0:
                continue
            key = (int(event.get("step", -1)), int(event.get("rank", -1)))
            hashes[key][event.replica] = str(event.get("hash"))
    shared = {key: values for key, values in hashes.items() if len(values) > 1}
    different = tuple(
        sorted(key for key, values in shared.items() if len(set(values.values())) > 1)
    )
    last = max((step for step, _ in shared), default=-1)
    return WeightComparison(compared=len(shared), different=different, last_compared_step=last)


def longest_pause(events: Iterable[Event], replica: int) -> float:
    """Longest time, in seconds, between two successive commits of a replica group."""
    committed = [
        e.t for e in events if e.kind == "commit" and e.replica == replica and e.get("committed")
    ]
    pauses = (after - before for before, after in itertools.pairwise(committed))
    return max(pauses, default=0.0)


def seconds_below_full(events: Iterable[Event], group_size: int) -> float:
    """Seconds between the first full quorum and the last one that was spent below full size."""
    total, since, seen_full = 0.0, None, False
    for event in events:
        if event.kind != "membership":
            continue
        size = len(event.fields["members"])
        if size == group_size:
            seen_full = True
            if since is not None:
                total += event.t - since
                since = None
        elif seen_full and since is None:
            since = event.t
    return total


def _survivor(state: RunState, events: Sequence[Event], replica: int) -> Check:
    group = state.groups[replica]
    pause = longest_pause(events, replica)
    alone = seconds_below_full(events, state.group_size)
    text = (
        f"replica {replica} trained on: {group.commits} steps committed, {group.failed_commits} "
        f"failed commit, longest pause {pause:.1f} s, {alone:.1f} s below full size"
    )
    return Check(ok=group.attempt == 1 and group.failed_commits <= 1, text=text)


def _weights(events: Sequence[Event], since: float | None) -> Check:
    whole = compare_weights(events)
    after = compare_weights(events, since) if since is not None else None
    if after is None or after.compared == 0:
        return Check(ok=False, text="no weights could be compared after the recovery")
    if whole.different:
        step, rank = whole.different[0]
        return Check(
            ok=False,
            text=f"weights DIFFER between replica groups at {len(whole.different)} of "
            f"{whole.compared} compared (step, rank) pairs, first at step {step} rank {rank}",
        )
    return Check(
        ok=True,
        text=f"weights identical at all {whole.compared} compared (step, rank) pairs, "
        f"{after.compared} of them after the recovery, the last at step {whole.last_compared_step}",
    )


def _end(state: RunState) -> Check:
    steps = sorted({group.step for group in state.groups.values()})
    ok = state.finished and len(steps) == 1
    what = "trained to the last step" if state.finished else "did NOT train to the last step"
    total = f" of {state.steps}" if state.steps is not None else ""
    return Check(
        ok=ok, text=f"all {state.group_size} replica groups {what}: {steps[0]}{total} committed"
    )
