"""A group whose own work takes longer than that of the others."""

from typing import Any

import pytest

from launcher.events import Event
from launcher.findings import Finding, Severity, Snapshot, judge
from launcher.state import RunState


def training(groups: int, step_seconds: float = 5.0) -> RunState:
    state = RunState(groups)
    for replica in range(groups):
        fields: dict[str, Any] = {"attempt": 1, "host": f"worker-{replica}"}
        state.apply(Event(t=1.0, kind="launch", replica=replica, fields=fields))
    quorum(state, range(groups), 1)
    for replica in range(groups):
        for step in (1, 2):
            fields = {"step": step, "committed": True, "rank": 0}
            t = 2.0 + step * step_seconds
            state.apply(Event(t=t, kind="commit", replica=replica, fields=fields))
    return state


def quorum(state: RunState, groups: Any, number: int) -> None:
    members = [(replica, f"uuid-{replica}", 1, "x") for replica in groups]
    fields = {"quorum_id": number, "members": members}
    state.apply(Event(t=1.0 + number, kind="membership", fields=fields))


def measure(state: RunState, replica: int, *seconds: object) -> None:
    for value in seconds:
        fields = {"loss": 5.0, "busy_seconds": value}
        state.apply(Event(t=20.0, kind="metrics", replica=replica, fields=fields))


def found(state: RunState) -> list[Finding]:
    snapshot = Snapshot(state=state, now=20.0, job="51")
    return [finding for finding in judge(snapshot) if finding.kind == "straggler"]


def test_the_slower_of_two() -> None:
    state = training(2)
    measure(state, 0, *[1.0] * 5)
    measure(state, 1, *[1.6] * 4)
    assert found(state) == [], "too few measurements"
    measure(state, 1, 1.6)
    (finding,) = found(state)
    assert (finding.replica, finding.severity) == (1, Severity.WARNING)
    assert finding.message.startswith(
        "replica 1 on worker-1 works 1.6 s a step by itself, the others 1 s and wait for it"
    )
    assert "`python -m launcher requeue tft-51 1`" in finding.message


def test_somewhat_slower_is_none() -> None:
    state = training(3)
    for replica, seconds in enumerate((1.0, 1.2, 1.4)):
        measure(state, replica, *[seconds] * 9)
    assert found(state) == []


def test_one_of_many_and_not_the_rest() -> None:
    state = training(4)
    for replica, seconds in enumerate((1.0, 3.0, 1.1, 0.9)):
        measure(state, replica, *[seconds] * 5)
    assert [finding.replica for finding in found(state)] == [1]


def test_a_single_group_has_nobody_to_compare_with() -> None:
    state = training(1)
    measure(state, 0, *[9.0] * 9)
    assert found(state) == []


def test_one_slow_measurement_is_none() -> None:
    state = training(2)
    measure(state, 0, *[1.0] * 9)
    measure(state, 1, *[1.0] * 9, 2.5)
    assert found(state) == []
    measure(state, 1, *[2.5] * 9)
    assert len(found(state)) == 1
    measure(state, 1, *[1.0] * 9)
    assert found(state) == [], "and it passes"


def test_what_costs_nothing_is_none() -> None:
    """Where the forward is a hundredth of a step, its measure is mostly noise."""
    state = training(2, step_seconds=5.0)
    measure(state, 0, *[0.05] * 9)
    measure(state, 1, *[0.15] * 9)
    assert found(state) == []


@pytest.mark.parametrize("change", ["quorum", "launch"])
def test_only_what_was_measured_together_is_compared(change: str) -> None:
    """A survivor alone has the network for itself; a restarted group has warmed up anew."""
    state = training(2)
    measure(state, 0, *[1.0] * 5)
    measure(state, 1, *[2.0] * 5)
    assert len(found(state)) == 1
    if change == "quorum":
        quorum(state, [0, 1], 2)
    else:
        fields = {"attempt": 2, "host": "worker-1"}
        state.apply(Event(t=21.0, kind="launch", replica=1, fields=fields))
    assert found(state) == []


@pytest.mark.parametrize("junk", [None, "fast", -1.0, 0.0, float("nan"), float("inf")])
def test_what_is_no_measurement_counts_for_nothing(junk: object) -> None:
    state = training(2)
    measure(state, 0, *[1.0] * 9)
    measure(state, 1, *[junk] * 9)
    assert found(state) == []
    assert state.groups[1].busy_seconds is None
