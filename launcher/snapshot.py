"""A run's state as plain data: the interface for tools (``docs/monitor.md``), a contract. Pure."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from launcher.findings import Finding
from launcher.incidents import Incident
from launcher.state import RunState


def as_data(state: RunState, findings: Sequence[Finding]) -> dict[str, Any]:
    """The JSON object that ``monitor --once --json`` prints."""
    return {
        "quorum_id": state.quorum_id,
        "step": state.step,
        "replicas": [
            {
                "id": group.replica,
                "state": group.state.value,
                "step": group.step,
                "failed_commits": group.failed_commits,
                "attempts": group.attempts,
            }
            for group in sorted(state.groups.values(), key=lambda group: group.replica)
        ],
        "incidents": [incident_as_data(incident) for incident in state.incidents],
        "findings": [
            {
                "kind": finding.kind,
                "severity": finding.severity.value,
                "replica": finding.replica,
                "message": finding.message,
            }
            for finding in findings
        ],
    }


def incident_as_data(incident: Incident) -> dict[str, Any]:
    """One incident as it stands in that object."""
    return {
        "replica": incident.replica,
        "kind": incident.kind,
        "cause": incident.why,
        "first_sign": iso(incident.first_sign),
        "detected_at": iso(incident.detected_at),
        "recovered_at": iso(incident.recovered_at),
        "steps_lost": incident.steps_lost,
        "survivor_stall_s": round(incident.survivor_stall_s, 3),
    }


def iso(t: float | None) -> str | None:
    """ISO 8601 with the zone, to the millisecond; None for None."""
    if t is None:
        return None
    return datetime.datetime.fromtimestamp(t).astimezone().isoformat(timespec="milliseconds")


def figures(state: RunState, now: float | None = None) -> dict[str, float | None]:
    """The running figures of a run.

    Returns:
        ``time_to_detect_s``: first sign to first quorum without it, median over incidents;
        ``time_to_recover_s``: that quorum to the first commit after coming back, median;
        ``steps_lost``: sum over incidents; ``participation``: mean quorum size over the
        run's size; ``step_efficiency``: committed over attempted steps; ``training_efficiency``:
        the product of the last two. None where nothing has been measured yet.
    """
    # Of replica groups: the lighthouse is not noticed by a quorum, and comes back in another way.
    groups = [i for i in state.incidents if i.replica is not None]
    detect = [i.detected_at - i.first_sign for i in groups if i.detected_at is not None]
    recover = [i.recovered_at - i.lost_at for i in groups if i.recovered_at is not None]
    member_seconds, wanted = state.member_seconds, state.wanted_seconds
    if state.quorum_since is not None and state.members:
        end = state.last_event if now is None or state.finished else now
        more = max(0.0, end - state.quorum_since)
        member_seconds, wanted = (
            member_seconds + more * len(state.members),
            wanted + more * state.size,
        )
    participation = min(1.0, member_seconds / wanted) if wanted else None
    committed = sum(group.commits for group in state.groups.values())
    attempted = committed + sum(group.failed_commits for group in state.groups.values())
    efficiency = committed / attempted if attempted else None
    return {
        "time_to_detect_s": _median(detect),
        "time_to_recover_s": _median(recover),
        "steps_lost": float(sum(i.steps_lost for i in state.incidents)),
        "participation": participation,
        "step_efficiency": efficiency,
        "training_efficiency": (
            participation * efficiency
            if participation is not None and efficiency is not None
            else None
        ),
    }


def _median(values: list[float]) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
