"""Failure after failure: the schedule, how many at once, and the report."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest

from launcher import growth
from launcher.drill import Drill
from launcher.drill_command import duration
from launcher.drill_verdict import Outcome
from launcher.drills import KINDS, Stage
from launcher.events import Event
from launcher.incidents import Incident
from launcher.inject import Injector
from launcher.model import UsageError
from launcher.slurm import Slurm
from launcher.soak import Active, begin, room, schedule
from launcher.soak_report import Cost, Planned, Soak, quantile, unexplained
from launcher.verdict import Check
from tests.conftest import FakeRun
from tests.unit.drilling import TARGET, Run, Watched, failed


def planned_requeue() -> Planned:
    return Planned(wait=0.0, kind="requeue", replica=1)


def test_what_cannot_be_made_is_an_outcome_too(fake_run: FakeRun) -> None:
    fake_run.on("scontrol", code=1, err="Access denied")
    run = Run("requeue")
    watcher: Any = Watched(run.state)
    injector = Injector(Slurm(fake_run), lambda line: None, run=fake_run)
    active = Active()
    aim_at = partial(lambda target, kind, replica: target, TARGET)
    begin(planned_requeue(), watcher, injector, aim_at, active, 1.0, lambda line: None)
    (drill,) = active.drills
    assert drill.poll(run.t)
    assert drill.outcome is not None
    assert failed(drill.outcome) == ["could not be made: scontrol requeue 60_1: Access denied"]


def test_a_schedule_is_reproduced_by_its_seed() -> None:
    def made(seed: int) -> list[Planned]:
        return schedule(["kill-rank", "hang", "stop"], count=90, mtbf=60, seed=seed, size=3)

    assert made(7) == made(7)
    assert made(7) != made(8)
    kinds = [one.kind for one in made(7)]
    assert {kinds.count(kind) for kind in ("kill-rank", "hang", "stop")} == {30}
    assert {one.replica for one in made(7)} == {0, 1, 2}
    assert 45 < sum(one.wait for one in made(7)) / 90 < 75, "exponential, sixty seconds on average"
    with pytest.raises(UsageError, match="no such kind"):
        schedule(["kill-rnak"], count=1, mtbf=60, seed=0, size=2)


def test_never_more_failures_at_once_than_allowed(fake_run: FakeRun) -> None:
    run = Run(size=3)
    watcher: Any = Watched(run.state)
    injector = Injector(Slurm(fake_run), lambda line: None, run=fake_run)

    def under_way(kind: str) -> Active:
        return Active([Drill(KINDS[kind], TARGET, watcher, injector)])

    assert room(run.state, Active(), 1)
    assert not room(run.state, under_way("kill-rank"), 1)
    assert room(run.state, under_way("kill-rank"), 2)
    assert not room(run.state, under_way("lighthouse-kill"), 2), "nobody can come back without it"
    run.state.stand_in = (0, "worker-0", 1.0)
    assert not room(run.state, under_way("kill-rank"), 2), "the lighthouse is not back"
    run.state.stand_in = None
    run.lose(heal=False)
    assert not room(run.state, Active(), 1), "one is away still"
    assert room(run.state, under_way("kill-rank"), 2)
    assert under_way("kill-rank").hit() == {1}
    assert under_way("slow").hit() == set()


@pytest.mark.parametrize(
    ("text", "seconds"), [("60s", 60), ("90", 90), ("1.5m", 90), ("1h", 3600), ("a", None)]
)
def test_durations(text: str, seconds: float | None) -> None:
    if seconds is None:
        with pytest.raises(UsageError, match="not a time"):
            duration(text)
    else:
        assert duration(text) == seconds


def outcome(kind: str, t: float, *, ok: bool = True, back: float = 10.0) -> Outcome:
    return Outcome(
        kind=kind,
        replica=1,
        node="w1",
        t=t,
        ended=t + back,
        seconds={Stage.COMMITS.value: back},
        steps_lost=1,
        cause="x",
        checks=[Check(ok=ok, text="something")],
    )


def test_an_alarm_that_no_failure_explains_is_false() -> None:
    def event(t: float, replica: int, kind: str = "launch") -> Event:
        return Event(
            t=t, kind=kind, replica=replica, fields={"what": "is restarted", "why": "hung"}
        )

    events = [event(50, 0), event(105, 1), event(106, 0, "action"), event(300, 1)]
    lost = Incident(replica=1, first_sign=104, lost_at_step=5)
    other = Incident(replica=0, first_sign=160, lost_at_step=5)
    outcomes = [outcome("kill-rank", 100.0), outcome("lighthouse-kill", 150.0)]
    assert unexplained(outcomes, [lost, other], events, 90.0, 8.0) == [
        "replica 0 is restarted: hung",
        "replica 0 was lost: unknown",
        "replica 1 was started again: hung",
    ]


def held(memory: int = 50 << 20, files: int = 20) -> growth.Held:
    return growth.Held(memory=memory, files=files, sockets=5, threads=4, processes=3)


HELD = (
    "supervisor: memory 52 to 52 MB, files 20 to 20, sockets 5 to 5, threads 4 to 4, "
    "processes 3 to 3"
)


def soaked(**changes: Any) -> Soak:
    values: dict[str, Any] = {
        "seed": 1,
        "mtbf": 60.0,
        "planned": [Planned(wait=1.0, kind="kill-rank", replica=1)] * 2,
        "outcomes": [outcome("kill-rank", 0.0), outcome("time-limit", 50.0, back=20.0)],
        "cost": Cost(t=100, committed=95, failed=5, step=33, member_seconds=180, size=2),
        "false_alarms": [],
        "compared": 40,
        "differences": 0,
        "before": {"supervisor": held()},
        "after": {"supervisor": held()},
    }
    return Soak(**values | changes)


def test_the_report_of_a_soak() -> None:
    soak = soaked()
    assert soak.passed
    assert soak.lines() == [
        "soak: PASSED (seed 1, one every 60 s, 100 s)",
        "failures injected: 2 of 2 (kill-rank 1, time-limit 1)",
        "recovered without help: 1",
        "steps: 33; commits 95, failed commits 5",
        "step efficiency 95.0%, participation 90.0%, training efficiency 85.5%",
        "time to recover: median 15.0 s, p95 20.0 s, worst 20.0 s (2 measured)",
        "false alarms: none",
        "weights: equal at 40 of 40 compared (step, rank) pairs",
        HELD,
    ]
    assert json.loads(json.dumps(soak.as_data()))["time_to_recover_s"]["worst"] == 20.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"false_alarms": ["replica 0 was lost"]}, "false alarms: 1"),
        ({"differences": 2}, "weights: DIFFER at 2 of 40"),
        ({"after": {}}, "GROWN  supervisor is gone"),
        ({"after": {"supervisor": held(files=40)}}, "GROWN  supervisor: files 20 to 40"),
        ({"after": {"supervisor": held(memory=150 << 20)}}, "GROWN  supervisor: memory 52 to 157"),
        ({"outcomes": [outcome("stop", 0.0, ok=False)]}, "FAILED  stop on replica 1: something"),
    ],
)
def test_a_soak_fails_for(changes: dict[str, Any], says: str) -> None:
    soak = soaked(**changes)
    assert not soak.passed
    assert any(says in line for line in soak.lines()), soak.lines()


def test_quantiles() -> None:
    values = [float(number) for number in range(1, 101)]
    assert quantile(values, 0.95) == 95.0
    assert quantile([3.0], 0.95) == 3.0
    assert quantile([], 0.95) is None
