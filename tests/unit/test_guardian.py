"""What a run needs done for it, and that it is done once."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import orders
from launcher.care import (
    BUSY_SECONDS,
    LAUNCH_HELD,
    MOST_REQUEUES,
    MOST_SPARE_REQUEUES,
    SILENT_SECONDS,
    View,
    excluded_nodes,
    needed,
    patience,
)
from launcher.events import Event
from launcher.guardian import Guardian
from launcher.lighthouse_log import Waiting
from launcher.model import UsageError
from launcher.rundir import Outputs, RunDir
from launcher.slurm import Job, Node, Slurm
from launcher.spares import Spare
from launcher.stalls import FIRST_STEPS_SECONDS
from launcher.state import RunState
from launcher.timeouts import HANG_SECONDS
from launcher.watcher import Watcher
from tests.conftest import FIXTURES, FakeRun, apply_all
from tests.unit.conftest import MANIFEST


def job(task: int, state: str, reason: str = "None") -> Job:
    return Job(job_id=60 + task, array_job_id=60, task=task, state=state, node="", reason=reason)


def nodes(count: int) -> dict[str, Node]:
    return {f"w{i}": Node(name=f"w{i}", state="idle", reason="none") for i in range(count)}


def training(size: int = 2, step_seconds: float = 0.5) -> RunState:
    """A run whose groups have trained from t=100 to t=110, and are in quorum 1."""
    state = RunState(size, 1000)
    members = [(replica, f"u{replica}", 0, "") for replica in range(size)]
    say(state, 100.0, "membership", None, quorum_id=1, members=members)
    for replica in range(size):
        say(state, 90.0, "launch", replica, attempt=1, host=f"w{replica}")
    for number in range(int(10 / step_seconds)):
        for replica in range(size):
            t = 100.0 + number * step_seconds
            say(state, t, "commit", replica, rank=0, step=number, committed=True)
    return state


def say(state: RunState, t: float, kind: str, replica: int | None, **fields: Any) -> None:
    state.apply(Event(t=t, kind=kind, replica=replica, fields=fields))


def kinds(view: View) -> list[tuple[str, int | None]]:
    return [(action.kind, action.replica) for action in needed(view)]


def test_a_healthy_run_needs_nothing() -> None:
    waiting = Waiting(since=110.0, requested={0})
    jobs = [job(0, "RUNNING"), job(1, "RUNNING")]
    assert not needed(View(state=training(), now=111.0, waiting=waiting, jobs=jobs))
    assert not needed(View(state=training(), now=5000.0, jobs=jobs))


def test_slurms_delay_is_cut_and_a_failed_task_is_requeued() -> None:
    state = training()
    say(state, 111.0, "exit", 1, code=143, reason="stopped by SIGTERM")
    assert kinds(View(state=state, now=115.0, jobs=[job(1, "PENDING", "BeginTime")])) == [
        ("start_now", 1)
    ]
    assert not kinds(View(state=state, now=112.0, jobs=[job(1, "PENDING", "Resources")]))
    assert not kinds(View(state=state, now=112.0, jobs=[job(1, "CANCELLED")]))
    say(state, 111.0, "exit", 1, code=75, reason="x", next="requeued")
    assert kinds(View(state=state, now=112.0, jobs=[job(1, "FAILED")])) == [("requeue", 1)]
    say(state, 111.0, "exit", 1, code=1, reason="x", next="given up")
    assert not kinds(View(state=state, now=112.0, jobs=[job(1, "FAILED")]))


def test_a_task_that_a_node_refused_is_released() -> None:
    """Found by the drill node-down on a busy machine: without this it waits for ever."""
    view = View(state=training(), now=112.0, jobs=[job(1, "PENDING", LAUNCH_HELD)])
    assert kinds(view) == [("release", 1)]
    # What a person holds stays held.
    assert not kinds(View(state=training(), now=112.0, jobs=[job(1, "PENDING", "JobHeldUser")]))


def test_a_persons_own_waiting_time_is_respected() -> None:
    state, now = training(), 1_795_000_000.0
    for group in state.groups.values():
        group.since = now - 60
    later = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now + 3600))
    soon = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now + 100))
    waits = job(1, "PENDING", "BeginTime")
    assert kinds(View(state=state, now=now, jobs=[replace(waits, start=soon)])) == [
        ("start_now", 1)
    ]
    assert not kinds(View(state=state, now=now, jobs=[replace(waits, start=later)]))
    fresh = View(state=RunState(2), now=now, jobs=[replace(waits, start=soon)])
    assert not kinds(fresh), "it has never started: somebody chose --begin"


def test_nodes_left_out_are_added_to_the_owners(run: RunDir, fake_run: FakeRun) -> None:
    fake_run.on("scontrol", "--oneliner", "show", "job", out="JobId=7 ExcNodeList=bad-[1-2] X=1\n")
    fake_run.on("scontrol", "show", "hostnames", out="bad-1\nbad-2\n")
    fake_run.on("scontrol", "update")
    state, now = training(), time.time()
    state.unfit["w1"] = now
    begin = [job(1, "PENDING", "BeginTime")]
    with (
        watch(run, state, begin, Waiting()) as watcher,
        Guardian.of(run, Slurm(fake_run)) as guardian,
    ):
        watcher.nodes = nodes(4)
        guardian.tend(watcher)
        assert fake_run.calls[-1][-1] == "ExcNodeList=bad-1,bad-2,w1"
        state.unfit.clear()
        watcher.jobs, watcher.jobs_asked = [job(1, "PENDING", "Resources")], time.monotonic()
        guardian._done.clear()
        guardian.tend(watcher)
        assert fake_run.calls[-1][-1] == "ExcNodeList=bad-1,bad-2"


def test_what_slurm_said_before_it_was_told_is_not_acted_on(run: RunDir, fake_run: FakeRun) -> None:
    """The task may run again already, and be requeued a second time."""
    fake_run.on("scontrol", "requeue")
    state = training()
    with (
        watch(run, state, [job(1, "FAILED")], Waiting()) as watcher,
        Guardian.of(run, Slurm(fake_run)) as guardian,
    ):
        guardian.tend(watcher)
        assert len(fake_run.calls) == 1
        say(state, time.time(), "launch", 1, attempt=2, host="w1")
        guardian.tend(watcher)
        assert len(fake_run.calls) == 1
        watcher.jobs_asked = time.monotonic()  # it has failed again
        guardian.tend(watcher)
        assert len(fake_run.calls) == 2


def test_a_task_whose_launcher_was_killed_comes_back_and_one_that_never_started_does_not() -> None:
    assert kinds(View(state=training(), now=112.0, jobs=[job(1, "FAILED")])) == [("requeue", 1)]
    assert not kinds(View(state=RunState(2), now=112.0, jobs=[job(1, "FAILED")]))
    # Also one that was killed before it could do what it had said.
    state = training()
    say(state, 111.0, "exit", 1, code=137, reason="x", next="restarted in place")
    assert kinds(View(state=state, now=112.0, jobs=[job(1, "FAILED")])) == [("requeue", 1)]
    # Slurm took the end of the copy before, on the same node, for the new one's, and ended that.
    state = training()
    say(state, 111.0, "exit", 1, code=143, reason="stopped by SIGTERM")
    assert kinds(View(state=state, now=112.0, jobs=[job(1, "FAILED")])) == [("requeue", 1)]
    assert not kinds(View(state=state, now=112.0, jobs=[job(1, "CANCELLED")]))
    say(state, 111.0, "exit", 1, code=1, reason="x", next="given up")
    assert not kinds(View(state=state, now=112.0, jobs=[job(1, "FAILED")]))
    # Not for ever, unless it makes progress.
    state = training()
    for _ in range(MOST_REQUEUES):
        say(state, 112.0, "action", 1, action="requeue", what="is requeued", why="x")
    assert not kinds(View(state=state, now=112.0, jobs=[job(1, "FAILED")]))
    say(state, 113.0, "commit", 1, rank=0, step=30, committed=True)
    assert kinds(View(state=state, now=114.0, jobs=[job(1, "FAILED")])) == [("requeue", 1)]


def test_a_group_that_others_wait_for_is_restarted() -> None:
    waiting = Waiting(since=110.0, requested={0})
    early, late = 110.0 + HANG_SECONDS - 1, 110.0 + HANG_SECONDS + 1
    assert not needed(View(state=training(), now=early, waiting=waiting))
    (action,) = needed(View(state=training(), now=late, waiting=waiting))
    assert (action.kind, action.replica, action.attempt) == ("restart", 1, 1)
    assert "hung: did not join the quorum that others waited 9 s for" in action.why
    # Nobody waits: nobody can be said to hang.
    assert not needed(View(state=training(), now=late, waiting=Waiting(since=110.0)))


def test_a_survivor_in_a_collective_with_a_dead_peer_is_not_taken_to_be_hung() -> None:
    """Found by the drill kill-replica on three groups: one survivor sees the connection break, the
    other waits for what the first one sends no more, until its collective's time is over."""
    state = training(3)
    waiting = Waiting(since=110.0, requested={1})
    patient, late = 110.0 + HANG_SECONDS + 9, 110.0 + HANG_SECONDS + 11

    def hung(now: float) -> list[tuple[str, int | None]]:
        return kinds(View(state=state, now=now, waiting=waiting, collective=10.0))

    assert not hung(patient), "0 and 2 are both away: one of them is dead, the other waits for it"
    say(state, 112.0, "launch", 2, attempt=2, host="w2")
    waiting.requested.add(2)
    assert not hung(patient), "and when the new copy of 2 asks already"
    assert hung(late) == [("restart", 0)], "it hangs after all"


def test_patience_grows_with_the_step_and_with_what_is_known() -> None:
    slow = training(step_seconds=5.0)
    assert patience(slow, slow.groups[1]) == pytest.approx(25.0)
    fresh = training()
    say(fresh, 120.0, "membership", None, quorum_id=2, members=[(0, "u0", 9, ""), (1, "v", 0, "")])
    assert patience(fresh, fresh.groups[1]) == FIRST_STEPS_SECONDS
    busy = training()
    say(busy, 110.0, "busy", 1, what="checkpoint")
    assert patience(busy, busy.groups[1]) == BUSY_SECONDS
    say(busy, 111.0, "busy", 1, what="")
    assert patience(busy, busy.groups[1]) == HANG_SECONDS


def test_a_group_that_is_silent_while_its_task_runs_is_restarted() -> None:
    state = training()
    say(state, 112.0, "membership", None, quorum_id=2, members=[(0, "u0", 20, "")])
    jobs = [job(0, "RUNNING"), job(1, "RUNNING")]
    assert not needed(View(state=state, now=113.0, jobs=jobs))
    late = 113.0 + SILENT_SECONDS
    (action,) = needed(View(state=state, now=late, jobs=jobs))
    assert (action.kind, action.replica) == ("restart", 1)
    assert "stopped: silent for" in action.why
    # Its node does not answer: an order would not reach it. Its task does not run, or its launcher is at it: nothing to order.
    silent = {"w1": Node(name="w1", state="mix*", reason="Not responding")}
    assert not needed(View(state=state, now=late, jobs=jobs, nodes=silent))
    assert not needed(View(state=state, now=late, jobs=[job(1, "PENDING", "Resources")]))
    say(state, 114.0, "exit", 1, code=1, reason="x", next="restarted in place")
    assert not needed(View(state=state, now=late, jobs=jobs))


def test_a_lost_group_is_taken_over_by_a_spare_of_another_node() -> None:
    state = training()
    say(state, 112.0, "membership", None, quorum_id=2, members=[(0, "u0", 20, "")])
    here, there = Spare(task=2, host="w1", t=112.0), Spare(task=3, host="w7", t=112.0)
    assert not needed(View(state=state, now=113.0, spares=[here]))
    (action,) = needed(View(state=state, now=113.0, spares=[here, there]))
    assert (action.kind, action.replica, action.task) == ("take_over", 1, 3)
    # Lost again while it comes back: taken over again.
    twice = [(0, "u0", 22, ""), (1, "v", 0, "")]
    say(state, 112.2, "membership", None, quorum_id=3, members=twice)
    assert not needed(View(state=state, now=112.3, spares=[there]))
    say(state, 112.4, "membership", None, quorum_id=4, members=[(0, "u0", 23, "")])
    assert kinds(View(state=state, now=112.5, spares=[there])) == [("take_over", 1)]
    # It is on its way back by itself.
    say(state, 113.0, "launch", 1, attempt=2, host="w1")
    assert needed(View(state=state, now=114.0, spares=[there]))
    assert not needed(View(state=state, now=119.0, spares=[there]))
    # Taken over: the group is the other task's now, and the old task is nobody's.
    say(state, 114.0, "launch", 1, attempt=3, host="w7", task=3)
    assert state.group_of_task(3) is state.groups[1]
    assert state.group_of_task(1) is None
    begin = [job(1, "PENDING", "BeginTime")]
    (action,) = needed(View(state=state, now=119.0, jobs=begin))
    assert (action.kind, action.task) == ("start_now", 1)


def lost_with_its_node() -> RunState:
    state = training()
    say(state, 112.0, "slurm_cancelled", 1, due="NODE FAILURE")
    say(state, 113.5, "membership", None, quorum_id=2, members=[(0, "u0", 20, "")])
    return state


def test_a_lost_nodes_task_starts_elsewhere_or_when_the_old_copy_has_ended() -> None:
    """On a node that has not ended the old copy the new one may be ended with it: without this, a
    group was lost for good once in 25 losses of a node that came back at once."""
    begin, state = [job(0, "RUNNING"), job(1, "PENDING", "BeginTime")], lost_with_its_node()
    view = View(state=state, now=114.0, jobs=begin, nodes=nodes(3))
    assert [a.exclude for a in needed(view)] == [("w1",)]
    # No other node is free: it waits for the launcher's last word, or for Slurm's KillWait.
    small = replace(view, nodes=nodes(2))
    assert not needed(small)
    assert [a.exclude for a in needed(replace(small, now=150.0))] == [()]
    say(state, 115.0, "exit", 1, code=143, reason="stopped by SIGTERM")
    assert not needed(replace(small, now=116.0))
    assert [a.exclude for a in needed(replace(small, now=118.5))] == [()]
    # Until Slurm's own reason has been read, it may be that.
    silent = training()
    say(silent, 112.0, "exit", 1, code=143, reason="stopped by SIGTERM")
    say(silent, 113.5, "membership", None, quorum_id=2, members=[(0, "u0", 20, "")])
    assert not needed(replace(view, state=silent, now=113.6))
    assert [a.exclude for a in needed(replace(view, state=silent, now=114.5))] == [("w1",)]
    # A second copy has been started since, and ended: the same again.
    say(state, 119.0, "launch", 1, attempt=2, host="w1")
    assert not needed(replace(small, now=121.0))
    assert [a.exclude for a in needed(replace(small, now=122.5))] == [()]
    # While it is down Slurm leaves it out by itself: that takes no node from anybody.
    down = {**nodes(2), "w1": Node(name="w1", state="down", reason="x")}
    assert [a.exclude for a in needed(replace(small, now=120.0, nodes=down))] == [("w1",)]


def of_two_nodes() -> RunState:
    """Group 0 on w0 and w1, group 1 on w2 and w3."""
    state = training()
    state.nodes_per_group = 2
    for replica, group in state.groups.items():
        group.nodes = (f"w{2 * replica}", f"w{2 * replica + 1}")
        group.host = group.nodes[0]
    return state


def test_of_several_nodes_the_one_that_is_down_is_left_out() -> None:
    state = of_two_nodes()
    say(state, 112.0, "slurm_cancelled", 1, due="NODE FAILURE")
    say(state, 113.5, "membership", None, quorum_id=2, members=[(0, "u0", 20, "")])
    (incident,) = state.incidents
    assert (incident.host, incident.where) == ("", "w2, w3")
    down = {**nodes(5), "w3": Node(name="w3", state="down", reason="x")}
    apply_all(state, state.observe_nodes(down.values(), 113.6))
    assert incident.host == "w3"
    begin = [job(0, "RUNNING"), job(1, "PENDING", "BeginTime")]
    view = View(state=state, now=114.0, jobs=begin, nodes=down)
    assert [a.exclude for a in needed(view)] == [("w3",)]
    # It was back before anybody looked: it may be either, and both are left out where there is room.
    assert [a.exclude for a in needed(replace(view, nodes=nodes(6)))] == [("w2", "w3")]
    tight = replace(view, nodes=nodes(5))
    assert not needed(tight)
    assert [a.exclude for a in needed(replace(tight, now=150.0))] == [()]
    # A spare of two nodes stands ready, the lost one not among them.
    spare = Spare(task=2, host="w4", t=114.0)
    assert ("take_over", 1) in kinds(replace(view, spares=[spare]))
    assert ("take_over", 1) not in kinds(replace(view, spares=[replace(spare, host="w3")]))


def test_of_several_nodes_the_one_to_blame_is_left_out() -> None:
    state = of_two_nodes()
    why = {"reason": "unfit node: w3: the fan is off", "node": "w3", "next": "requeued"}
    say(state, 112.0, "exit", 1, code=75, **why)
    assert list(state.unfit) == ["w3"]
    (incident,) = state.incidents
    assert (incident.host, incident.nodes) == ("w3", ("w2", "w3"))
    begin = [job(0, "RUNNING"), job(1, "PENDING", "BeginTime")]
    view = View(state=state, now=115.0, jobs=begin, nodes=nodes(5))
    assert [a.exclude for a in needed(view)] == [("w3",)]
    # Four nodes are needed, and there are four.
    assert [a.exclude for a in needed(replace(view, nodes=nodes(4)))] == [()]


def test_a_group_with_a_node_that_does_not_respond_gets_no_orders() -> None:
    state = of_two_nodes()
    say(state, 112.0, "membership", None, quorum_id=2, members=[(0, "u0", 20, "")])
    view = View(
        state=state, now=113.0 + SILENT_SECONDS, jobs=[job(0, "RUNNING"), job(1, "RUNNING")]
    )
    assert kinds(view) == [("restart", 1)]
    silent = {"w3": Node(name="w3", state="mix*", reason="Not responding")}
    assert not needed(replace(view, nodes=silent))


def test_a_requeue_by_a_person_need_not_leave_the_node() -> None:
    state = training()
    say(state, 112.0, "slurm_cancelled", 1, due="JOB REQUEUE")
    say(state, 113.5, "membership", None, quorum_id=2, members=[(0, "u0", 20, "")])
    view = View(state=state, now=114.0, jobs=[job(1, "PENDING", "BeginTime")], nodes=nodes(3))
    assert [a.exclude for a in needed(view)] == [()]


def test_a_task_that_slurm_calls_running_and_that_is_not_is_requeued() -> None:
    state = training()
    say(state, 112.0, "exit", 1, code=143, reason="stopped by SIGTERM")
    view = View(state=state, now=200.0, jobs=[job(0, "RUNNING"), job(1, "RUNNING")])
    assert not needed(view)
    assert kinds(replace(view, now=240.0)) == [("requeue", 1)]


def test_a_failed_spare_is_requeued_and_not_for_ever() -> None:
    view = View(state=training(), now=113.0, jobs=[job(2, "FAILED", "NonZeroExitCode")])
    (action,) = needed(view)
    assert (action.kind, action.replica, action.task) == ("requeue", None, 2)
    assert needed(replace(view, requeued={2: MOST_SPARE_REQUEUES - 1}))
    assert not needed(replace(view, requeued={2: MOST_SPARE_REQUEUES}))
    assert not needed(replace(view, jobs=[job(2, "CANCELLED")]))


def test_a_lost_groups_task_does_not_race_the_spare_that_takes_it_over() -> None:
    state = training()
    say(state, 112.0, "exit", 1, code=143, reason="stopped by SIGTERM")
    begin, spare = [job(1, "PENDING", "BeginTime")], Spare(task=3, host="w7", t=112.0)
    # Slurm may say so before anything else does.
    early = training()
    apply_all(early, early.observe(begin, 110.5))
    assert not needed(View(state=early, now=110.6, jobs=begin, spares=[spare]))
    assert kinds(View(state=early, now=122.0, jobs=begin, spares=[spare])) == [("start_now", 1)]
    assert not needed(View(state=state, now=112.5, jobs=begin, spares=[spare])), "still a member"
    say(state, 113.5, "membership", None, quorum_id=2, members=[(0, "u0", 20, "")])
    view = View(state=state, now=113.6, jobs=begin, spares=[spare])
    assert kinds(view) == [("take_over", 1)]
    # Nobody waits for ever for a spare that does not come, nor for one on the lost node.
    assert ("start_now", 1) in kinds(replace(view, now=124.0))
    fit = replace(view, now=116.0, spares=[replace(spare, host="w1")])
    assert kinds(fit) == [("start_now", 1)]


def test_bad_nodes_are_left_out_and_never_too_many() -> None:
    state = training()
    for number in range(3):
        t = 200.0 + 10 * number
        alone, both = [(0, "u0", 1, "")], [(0, "u0", 1, ""), (1, f"x{number}", 1, "")]
        say(state, t, "membership", None, quorum_id=2 * number + 2, members=alone)
        say(state, t + 5, "membership", None, quorum_id=2 * number + 3, members=both)
        for replica in (0, 1):
            say(state, t + 6, "commit", replica, rank=0, step=30 + number, committed=True)
    view = View(state=state, now=230.0, nodes=nodes(4))
    assert excluded_nodes(view) == ["w1"]
    say(state, 230.0, "launch", 0, attempt=2, host="w3")
    say(state, 230.0, "exit", 0, code=75, reason="unfit node: x", next="requeued")
    assert excluded_nodes(view) == ["w1", "w3"]
    pending = [job(0, "PENDING", "BeginTime")]
    (action,) = needed(View(state=state, now=231.0, nodes=nodes(4), jobs=pending))
    assert action.exclude == ("w1", "w3")
    assert "without w1, w3" in action.why
    # A task that waits for a node although none of those is left out any more.
    waits = [job(1, "PENDING", "Resources")]
    stuck = View(state=state, now=231.0, nodes=nodes(2), jobs=waits, excluded={1: ("w1", "w3")})
    (action,) = needed(stuck)
    assert (action.kind, action.exclude) == ("start_now", ())
    same = View(state=state, now=231.0, nodes=nodes(4), jobs=waits, excluded={1: ("w1", "w3")})
    assert not needed(same)
    # Only as many as leave the run its two nodes; one that says itself that it is unfit, first.
    assert excluded_nodes(View(state=state, now=230.0, nodes=nodes(3))) == ["w3"]
    assert not excluded_nodes(View(state=state, now=230.0, nodes=nodes(2)))
    assert not excluded_nodes(View(state=state, now=9999.0, nodes=nodes(9)))


# -- the guardian does it ------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = Outputs(tmp_path).run_of_array(5188040)
    shutil.copytree(FIXTURES / "hang", run.path)
    return run


def watch(run: RunDir, state: RunState, jobs: list[Job], waiting: Waiting) -> Watcher:
    class Known(Watcher):
        waiting = property(lambda self: known)

    known = waiting
    watcher = Known(list, lambda: state)
    watcher.jobs = jobs
    return watcher


def test_each_thing_is_done_once_also_by_the_next_guardian(run: RunDir, fake_run: FakeRun) -> None:
    fake_run.on("scontrol", "update", "JobId=60_1", "StartTime=now")
    state, now = training(), time.time()
    waiting = Waiting(since=now - 60, requested={1})
    state.groups[0].last_commit = state.quorum_since = now - 100
    state.groups[0].last_commit = now - 60
    jobs = [job(0, "RUNNING"), job(1, "PENDING", "BeginTime")]
    with watch(run, state, jobs, waiting) as watcher:
        with Guardian.of(run, Slurm(fake_run)) as guardian:
            for _ in range(3):
                assert not guardian.tend(watcher)
            with pytest.raises(UsageError, match="another guardian looks after"):
                Guardian.of(run, Slurm(fake_run)).__enter__()
        assert len(fake_run.calls) == 1
        with Guardian.of(run, Slurm(fake_run)) as guardian:
            guardian.tend(watcher)
    (order,) = orders.OrderReader(run.orders).every()
    assert (order.replica, order.attempt) == (0, 1)
    done = [json.loads(line) for line in run.guardian_events.read_text().splitlines()]
    assert [(d["action"], d["replica"]) for d in done] == [
        ("start_now", 1),
        ("restart", 0),
        ("start_now", 1),
    ]
    # It is part of the story.
    with Watcher.of_run(run) as later:
        told = "\n".join(notice.text for notice in later.look(final=True))
    assert "guardian: replica 0 is restarted (hung: did not join the quorum" in told


def test_a_refusing_slurm_is_told_of_once(run: RunDir, fake_run: FakeRun) -> None:
    fake_run.on("scontrol", "update", err="slurm_update error: Access/permission denied", code=1)
    with (
        watch(run, training(), [job(1, "PENDING", "BeginTime")], Waiting()) as watcher,
        Guardian.of(run, Slurm(fake_run)) as guardian,
    ):
        (notice,) = guardian.tend(watcher)
        assert "cannot be helped (start_now)" in notice.text
        assert "permission denied" in notice.text
        guardian._done.clear()
        assert not guardian.tend(watcher)
    assert not run.guardian_events.exists()


def test_a_collective_of_a_script_has_torchfts_time(tmp_path: Path, fake_run: FakeRun) -> None:
    for script, seconds in (("", 10.0), ("my_train.py", 60.0)):
        run = Outputs(tmp_path / script).run_of_array(50)
        run.create(replace(MANIFEST, script=script))
        with Guardian.of(run, Slurm(fake_run)) as guardian:
            assert guardian._collective_seconds() == seconds
