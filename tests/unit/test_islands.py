"""Groups that train by themselves between two syncs: what a wait for one of them means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher import records
from launcher.care import View, needed
from launcher.events import Event
from launcher.findings import Snapshot, judge
from launcher.history import History
from launcher.lighthouse_log import Waiting
from launcher.model import GroupState
from launcher.slurm import Job
from launcher.spares import Spare
from launcher.state import RunState
from launcher.verdict import judge as verdict


class Islands:
    """A run of groups that train by themselves, told by their events."""

    def __init__(self, groups: int = 2, own_steps: float = 1.0) -> None:
        self.state = RunState(groups, 1000, sync_every=100)
        for replica in range(groups):
            self.tell("launch", replica, 0.0, attempt=1, host=f"w{replica}", task=replica)
        for replica in range(groups):
            self.tell("progress", replica, 5.0, joining=True)
        members = [(r, f"u{r}", 0, "x") for r in range(groups)]
        self.state.apply(
            Event(t=6.0, kind="membership", fields={"quorum_id": 1, "members": members})
        )
        for replica in range(groups):
            self.tell("commit", replica, 7.0, step=0, committed=True, rank=0)

    def tell(self, kind: str, replica: int, t: float, **fields: Any) -> None:
        self.state.apply(Event(t=t, kind=kind, replica=replica, fields=fields))

    def train(self, replica: int, begin: float, steps: int) -> float:
        """So many steps of a second; when they were over."""
        first = self.state.groups[replica].progress_step or 0
        for step in range(1, steps + 1):
            self.tell("progress", replica, begin + step, titan_step=first + step)
        return begin + steps

    def alarms(self, waiting: Waiting, now: float) -> set[str]:
        self.state.observe_waiting(waiting, now)
        found = {f.kind for f in judge(Snapshot(state=self.state, now=now, waiting=waiting))}
        jobs = [
            Job(
                job_id=60 + r, array_job_id=60, task=r, state="RUNNING", node=f"w{r}", reason="None"
            )
            for r in self.state.groups
        ]
        view = View(state=self.state, now=now, waiting=waiting, jobs=jobs)
        return found | {f"guardian: {action.kind}" for action in needed(view)}


BLOCKED = "need at least half of 2 healthy workers"


def test_a_slower_group_that_goes_on_is_waited_for() -> None:
    islands = Islands()
    islands.train(0, 7.0, 100)
    islands.train(1, 7.0, 150)  # the other one came to its sync at 107
    waiting = Waiting(since=107.0, requested={0}, status=BLOCKED)
    assert islands.alarms(waiting, 158.0) == set()
    assert islands.state.groups[1].state is GroupState.TRAINING
    # It stops: the first one has waited a minute by then, and the second one is hung since 157.
    assert islands.alarms(waiting, 157.0 + 27.9) == set()
    assert islands.alarms(waiting, 157.0 + 28.1) == {
        "replica_stalled",
        "survivor_blocked",
        "guardian: restart",
    }
    assert islands.state.groups[1].since == 157.0 + 28.0


def test_the_first_steps_after_joining_may_compile() -> None:
    islands = Islands()
    islands.train(0, 7.0, 100)
    waiting = Waiting(since=107.0, requested={0}, status=BLOCKED)
    assert islands.alarms(waiting, 107.0 + 299) == set()
    assert islands.alarms(waiting, 107.0 + 321) >= {"guardian: restart", "replica_stalled"}


def test_slow_own_steps_are_waited_for_longer() -> None:
    islands = Islands()
    for step in range(1, 4):
        for replica in (0, 1):
            islands.tell("progress", replica, 7.0 + 20 * step, titan_step=step)
    waiting = Waiting(since=68.0, requested={0}, status=BLOCKED)
    assert islands.alarms(waiting, 68.0 + 115) == set(), "five steps of 20 s"
    assert islands.alarms(waiting, 68.0 + 121) >= {"replica_stalled"}


def lost(islands: Islands, replica: int, t: float) -> None:
    members = [(r, f"u{r}", 1, "x") for r in islands.state.groups if r != replica]
    event = Event(t=t, kind="membership", fields={"quorum_id": 2, "members": members})
    islands.state.apply(event)


def test_a_group_that_waits_to_join_is_not_stuck() -> None:
    """With a semi-sync method that may take as long as the time between two syncs."""
    islands = Islands()
    islands.tell("launch", 1, 20.0, attempt=2, host="w1", task=1)
    islands.tell("progress", 1, 40.0, joining=True)
    islands.train(0, 7.0, 993)
    asks = Waiting(since=40.0, requested={1}, status=BLOCKED)
    assert islands.alarms(asks, 1000.0) == set()
    assert islands.alarms(Waiting(), 1000.0) == {"guardian: restart"}, "it never came so far"


def test_joining_the_others_is_no_step_of_its_own(tmp_path: Path) -> None:
    """A group whose first step fails each time must not be started again for ever."""
    log = tmp_path / "events.jsonl"
    joined = [
        '{"t":1,"kind":"progress","joining":true}',
        '{"t":2,"kind":"commit","committed":true}',
    ]
    own = [joined[0].replace('"joining":true', '"titan_step":1'), joined[1]]
    for lines, expected in (
        (joined, False),
        ([*joined, own[0]], False),
        ([*joined, *own], True),
        ([joined[1]], True),
        ([joined[1].replace("true", "false")], False),
    ):
        log.write_text("\n".join(lines) + "\n")
        assert records.committed(log, 0) is expected
    assert not records.committed(log, log.stat().st_size)


def test_a_spare_does_not_wait_for_the_next_sync() -> None:
    islands = Islands()
    spare = Spare(task=2, host="w9", t=59.0)
    view = View(state=islands.state, now=60.0, spares=[spare])
    assert not [a for a in needed(view) if a.kind == "take_over"]
    islands.tell("exit", 1, 59.0, code=143, reason="stopped by SIGTERM")
    assert [(a.kind, a.replica) for a in needed(view)] == [("take_over", 1)]
    islands.tell("launch", 1, 59.5, attempt=2, host="w1", task=1)
    assert needed(view) == [], "it starts again by itself"


def test_a_group_that_was_left_out_and_trains_on_is_not_stopped() -> None:
    islands = Islands(3)
    lost(islands, 2, 107.0)
    islands.train(2, 100.0, 60)
    assert islands.alarms(Waiting(), 161.0) == set()
    asks = Waiting(since=162.0, requested={2})
    assert islands.alarms(asks, 400.0) == set()
    assert islands.alarms(Waiting(), 400.0) == {"guardian: restart"}


def test_who_was_at_work_until_its_end_was_not_hung() -> None:
    waited = Waiting(since=100.0, requested={0})
    for last, cause in ((119.0, "unknown"), (105.0, "hang")):
        islands = Islands()
        islands.tell("progress", 1, last, titan_step=3)
        members = [(0, "u0", 1, "x")]
        fields = {"quorum_id": 2, "members": members, "waited": waited}
        islands.state.apply(Event(t=120.0, kind="membership", fields=fields))
        assert islands.state.incidents[-1].why.startswith(cause)


def test_the_loss_of_groups_that_do_not_meet_is_their_mean() -> None:
    for every, losses in ((1, [4.0, 4.0]), (10, [5.0])):
        state, history = RunState(2, 1000, sync_every=every), History()
        for step in (1, 2):
            for replica, loss in ((0, 4.0), (1, 6.0)):
                event = Event(t=step, kind="metrics", replica=replica, fields={"loss": loss})
                state.apply(event)
                history.note(state, event)
        assert [point.mean for point in history.loss.points] == losses


def test_a_straggler_is_measured_against_a_step_of_its_own() -> None:
    islands = Islands(3)
    for replica in range(3):
        islands.train(replica, 7.0, 20)
        islands.tell("commit", replica, 107.0, step=1, committed=True, rank=0)
        islands.tell("commit", replica, 207.0, step=2, committed=True, rank=0)
        for t in range(10):
            busy = 0.9 if replica == 2 else 0.3
            islands.tell("metrics", replica, 208.0 + t, busy_seconds=busy)
    assert islands.alarms(Waiting(), 220.0) == {"straggler"}, "0.6 s of 1 s, not of 100 s"


def test_a_verdict_says_what_it_counts() -> None:
    (end,) = verdict(Islands().state, 1).checks[-1:]
    assert end.text.endswith("1 syncs committed, one every 100 steps of 1000 tried")
    (end,) = verdict(RunState(1, 1000), 0).checks[-1:]
    assert end.text.endswith("0 steps committed of 1000 tried")
