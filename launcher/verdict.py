"""Did a run really recover from a loss? Pure: a run's state in, checked claims out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.incidents import Incident
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


def judge(state: RunState, lost: int) -> Verdict:
    """Judge the recovery of replica group ``lost``."""
    incident = next((i for i in state.incidents if i.replica == lost), None)
    return Verdict(
        checks=[
            _recovery(incident, lost),
            *(_survivor(state, replica) for replica in state.groups if replica != lost),
            _weights(state, incident),
            _end(state),
        ]
    )


def _recovery(incident: Incident | None, lost: int) -> Check:
    if incident is None:
        return Check(ok=False, text=f"replica {lost} never left the quorum")
    if incident.recovered_at is None or incident.healed_from is None:
        return Check(ok=False, text=f"replica {lost} did not come back and heal")
    away = incident.recovered_at - incident.lost_at
    return Check(
        ok=True,
        text=f"replica {lost} was lost at step {incident.lost_at_step} ({incident.why}), healed from "
        f"replica {incident.healed_from} and committed step {incident.recovered_at_step} "
        f"{away:.1f} s later",
    )


def _survivor(state: RunState, replica: int) -> Check:
    group = state.groups[replica]
    text = (
        f"replica {replica} trained on: {group.commits} {state.counted}s committed, {group.failed_commits} "
        f"failed commit, longest pause {group.longest_pause:.1f} s, "
        f"{state.seconds_below_full:.1f} s below full size"
    )
    return Check(ok=group.attempt == 1 and group.failed_commits <= 1, text=text)


def _weights(state: RunState, incident: Incident | None) -> Check:
    ledger = state.weights
    recovered = incident is not None and incident.recovered_at is not None
    after = ledger.compared - incident.compared_before if recovered and incident else 0
    if after <= 0:
        return Check(ok=False, text="no weights could be compared after the recovery")
    if ledger.differences:
        step, rank = ledger.different[0]
        return Check(
            ok=False,
            text=f"weights DIFFER between replica groups at {ledger.differences} of "
            f"{ledger.compared} compared (step, rank) pairs, first at step {step} rank {rank}",
        )
    return Check(
        ok=True,
        text=f"weights identical at all {ledger.compared} compared (step, rank) pairs, "
        f"{after} of them after the recovery, the last at step {ledger.last_step}",
    )


def _end(state: RunState) -> Check:
    steps = sorted({group.step for group in state.groups.values()})
    ok = state.finished and len(steps) == 1
    what = "trained to the last step" if state.finished else "did NOT train to the last step"
    tried = f" of {state.steps} tried" if state.steps is not None else ""
    if state.sync_every > 1:
        tried = f", one every {state.sync_every} steps{tried}"
    committed = " and ".join(str(step) for step in steps)
    return Check(
        ok=ok,
        text=f"all {state.group_size} replica groups {what}: {committed} {state.counted}s "
        f"committed{tried}",
    )
