"""What must follow a failure, and what a drill says of it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from launcher.drill import Drill, whole
from launcher.drills import KINDS, Stage
from launcher.inject import Injector
from launcher.lighthouse_log import Waiting
from launcher.slurm import Slurm
from tests.conftest import FakeRun
from tests.unit.drilling import TARGET, Run, Watched, failed


def test_a_recovery_passes_with_its_times() -> None:
    run = Run()
    run.lose()
    run.story.look(run.state, run.t + 8.1)
    assert not run.story.complete, "no weights have been compared yet"
    run.weights(9)
    outcome = run.judged(9.1)
    assert run.story.complete
    assert outcome.passed, outcome.lines()
    assert outcome.lines() == [
        "verdict: PASSED",
        "  ok      detected: 2.0 s after the failure",
        "  ok      survivors committing again: 3.0 s after the failure",
        "  ok      requeued or restarted: 4.0 s after the failure",
        "  ok      back in quorum: 6.0 s after the failure",
        "  ok      healed: 7.0 s after the failure",
        "  ok      committing again: 8.0 s after the failure",
        "  ok      weights equal: at every (step, rank) compared since",
        "  ok      the cause is told: process crash: rank 0 was killed by SIGKILL",
        "  ok      steps lost: 1 of at most 1",
        "  ok      nobody else was harmed",
    ]
    assert outcome.as_data()["seconds"]["healed"] == 7.0


def test_what_does_not_follow_fails_the_drill() -> None:
    run = Run()
    run.lose(heal=False)
    assert run.story.overdue(run.t + 9, 1.0) == []
    run.story.look(run.state, run.t + 9)
    assert run.story.overdue(run.t + 421, 1.0) == [Stage.QUORUM]
    assert run.story.overdue(run.t + 43, 0.1)[0] is Stage.QUORUM, "patience stretches them"
    assert failed(run.judged(421)) == [
        "back in quorum: not within 420 s",
        "healed: not within 450 s",
        "committing again: not within 480 s",
        "weights equal: not within 600 s",
    ]


def test_a_wrong_cause_other_weights_and_bystanders_fail_it() -> None:
    run = Run("hang", size=3)
    run.lose()
    run.weights(9, "b")
    run.say(9.5, "launch", 2, attempt=2, host="w2")
    texts = failed(run.judged(10, problems=["the node is DOWN"]))
    assert any("process crash" in text and "and not hang" in text for text in texts)
    assert "weights DIFFER at 1 (step, rank) pairs" in texts
    assert any("replica 2 was started again" in text for text in texts)
    assert "not put back: the node is DOWN" in texts
    assert not any("started again" in x for x in failed(run.judged(10, excused={2})))


def test_an_outage_of_the_lighthouse_costs_nobody() -> None:
    run = Run("lighthouse-kill")
    step = run.state.step
    run.say(1, "listening", None)
    run.quorum(3, (0, "u0", step), (1, "u1", step))
    for replica in (0, 1):
        run.say(4, "commit", replica, rank=0, step=step, committed=True)
    run.story.look(run.state, run.t + 4)
    run.weights(5)
    outcome = run.judged(5)
    assert outcome.passed, outcome.lines()
    assert list(outcome.seconds.values())[:3] == [1.0, 1.0, 4.0]
    # A group that was started again was harmed.
    run.say(6, "launch", 1, attempt=2, host="w1")
    assert any("replica 1 was started again" in x for x in failed(run.judged(7)))


def test_what_takes_nobody_out_is_over_when_all_go_on() -> None:
    run = Run("disk-full")
    run.story.look(run.state, run.t + 1)
    assert not run.story.reached
    run.story.restored_at = run.t + 5
    for replica in (0, 1):
        run.say(6, "commit", replica, rank=0, step=run.state.step, committed=True)
    run.story.look(run.state, run.t + 6)
    run.weights(7)
    assert run.judged(7).passed


def test_a_run_is_whole_or_says_why_not() -> None:
    run = Run()
    assert whole(run.state) == ""
    run.lose(heal=False)
    assert "replica 1 is STARTING" in whole(run.state)


def test_a_node_is_given_back_as_soon_as_its_task_is_requeued(fake_run: FakeRun) -> None:
    fake_run.on("scontrol")
    run = Run("node-down", t=time.time())
    injector = Injector(Slurm(fake_run), lambda line: None, run=fake_run)
    watcher: Any = Watched(run.state)
    drill = Drill(KINDS["node-down"], TARGET, watcher, injector)
    drill.begin()
    run.story = drill.story
    assert not drill.poll(run.t + 1)
    assert fake_run.calls[-1][-1] == "Reason=drill"
    run.say(0.5, "slurm_cancelled", 1, due="NODE FAILURE")
    run.lose(reason="stopped by SIGTERM")
    assert not drill.poll(run.t + 8.5)
    assert len(fake_run.calls) == 1, "the old copy gets some time to end there"
    assert not drill.poll(run.t + 8.6 + drill.kind.restore_delay)
    assert fake_run.calls[-1][-1] == "State=RESUME"
    run.weights(19)
    assert drill.poll(run.t + 19)
    assert drill.outcome is not None
    assert drill.outcome.passed, drill.outcome.lines()
    drill.restore()
    assert len(fake_run.calls) == 2, "it is put back once"


def test_a_launcher_that_requeues_its_own_task_is_no_person() -> None:
    """Slurm stamps whole seconds: its line may come before the launcher's, or after it."""
    for slurm_after in (-0.4, 0.4):
        run = Run()
        words = {"code": 1, "reason": "rank 0 was killed by SIGSEGV", "next": "requeued"}
        signs: list[tuple[float, str, dict[str, Any]]] = [
            (1.0, "exit", words),
            (1.0 + slurm_after, "slurm_cancelled", {"due": "JOB REQUEUE"}),
        ]
        for after, kind, fields in sorted(signs, key=lambda sign: sign[0]):
            run.say(after, kind, 1, **fields)
        run.quorum(2, (0, "u0", 20))
        (incident,) = run.state.incidents
        assert incident.why == "process crash: rank 0 was killed by SIGSEGV"
    # Without the launcher's word it was a person.
    run = Run()
    run.say(1.0, "slurm_cancelled", 1, due="JOB REQUEUE")
    run.say(1.4, "exit", 1, code=143, reason="stopped by SIGTERM")
    run.quorum(2, (0, "u0", 20))
    assert run.state.incidents[0].why == "requeued by a person"


@pytest.mark.parametrize(("ended", "cause"), [(1.0, "process crash"), (20.0, "hang")])
def test_a_dead_group_is_not_hung_because_another_was_waited_for(ended: float, cause: str) -> None:
    run = Run(size=3)
    run.say(ended, "exit", 1, code=1, reason="rank 0 was killed by SIGKILL")
    waited = Waiting(since=run.t + 1.0, requested={0})
    members = [(replica, f"u{replica}", 20, "") for replica in (0, 2)]
    run.say(21.0, "membership", None, quorum_id=2, members=members, waited=waited)
    (incident,) = run.state.incidents
    assert incident.cause.value == cause
