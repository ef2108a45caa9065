"""When a replica group leaves a run, and what the monitor makes of a run whose size changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import leaving
from launcher.care import View, needed
from launcher.events import Event, parse_replica_event
from launcher.model import GroupState
from launcher.spares import Spare
from launcher.state import RunState


def commits(path: Path, *events: tuple[float, int, int]) -> Path:
    lines = [
        json.dumps({"t": t, "kind": "commit", "committed": True, "step": step, "rank": rank},
                   separators=(",", ":"))
        for t, step, rank in events
    ]  # fmt: skip
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_a_group_leaves_when_every_rank_has_read_of_it(tmp_path: Path) -> None:
    events = commits(tmp_path / "e", *((10 + step * 0.5, step, 0) for step in range(20)))
    assert leaving.step_to_leave(events, 0) == 20 + 6, "three seconds of half a second each"
    slow = commits(tmp_path / "s", *((10 + step * 60.0, step, 0) for step in range(3)))
    assert leaving.step_to_leave(slow, 0) == 3 + 2


def test_a_group_that_has_not_begun_leaves_at_once(tmp_path: Path) -> None:
    events = commits(tmp_path / "e", (1.0, 5, 0))
    assert leaving.step_to_leave(events, events.stat().st_size) == 0
    assert leaving.step_to_leave(tmp_path / "none", 0) == 0


def test_it_is_told_by_a_file(tmp_path: Path) -> None:
    events = commits(tmp_path / "e", (1.0, 5, 0), (2.0, 6, 0))
    leaving.tell(tmp_path / "ranks" / "leave", events, 0)
    assert (tmp_path / "ranks" / "leave").read_text() == "10\n"


def test_groups_leave_in_two_turns_when_their_time_limit_is_near(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    departure = leaving.Departure(600.0)
    departure.note_time()
    assert not departure.time_is_up, "a limit that short comes again: it ends the task"
    now[0] += 3000
    departure.note_time()
    assert (departure.turn(0), departure.turn(1)) == (True, False)
    now[0] += 61
    assert (departure.overdue(0), departure.overdue(1)) == (True, False)
    now[0] += 240
    assert departure.turn(1)
    assert not departure.overdue(1)


def test_a_group_that_trains_to_the_last_step_has_not_left(tmp_path: Path) -> None:
    departure = leaving.Departure(600.0)
    events = tmp_path / "e"
    events.write_text('{"t":1,"kind":"leave"}\n')
    assert not departure.left(events, 0), "nobody told it to"
    departure.told = True
    assert departure.left(events, 0)
    assert not departure.left(events, events.stat().st_size), "that was the attempt before"


def event(t: float, kind: str, replica: int | None, **fields: object) -> Event:
    found = parse_replica_event(
        json.dumps({"t": t, "kind": kind, "replica": replica, **fields}).encode()
    )
    assert found is not None
    return found


def quorum(t: float, *replicas: int) -> Event:
    members = [(replica, f"u{replica}", 5, "") for replica in replicas]
    return Event(t=t, kind="membership", replica=None, fields={"members": members, "quorum_id": 1})


def test_a_run_that_shrinks_has_lost_nobody() -> None:
    state = RunState(4)
    for replica in range(4):
        state.apply(event(1.0, "launch", replica, attempt=1, host=f"w{replica}"))
    state.apply(quorum(2.0, 0, 1, 2, 3))
    (notice,) = state.apply(event(10.0, "resize", None, replicas=2))
    assert notice.text == "the run is resized: 2 replica groups, before 4"
    for replica in (2, 3):
        state.apply(event(11.0, "leave", replica, step=7))
    state.apply(quorum(12.5, 0, 1))
    for replica in (2, 3):
        (notice,) = state.apply(event(13.0, "exit", replica, attempt=1, host=f"w{replica}", code=0))
        assert "left the run" in notice.text
    assert state.incidents == []
    assert [group.state for group in state.groups.values()][2:] == [GroupState.DONE] * 2
    assert state.size == 2
    assert not state.finished


def test_a_run_that_grows_waits_for_its_new_groups() -> None:
    state = RunState(2)
    state.apply(quorum(2.0, 0, 1))
    state.apply(event(10.0, "resize", None, replicas=3))
    assert state.size == 3
    assert state.groups[2].state is GroupState.PENDING
    assert not state.seen_full
    state.apply(quorum(20.0, 0, 1, 2))
    assert state.seen_full


def test_a_group_that_must_be_ended_when_the_run_shrinks_is_no_loss() -> None:
    state = RunState(3)
    for replica in range(3):
        state.apply(event(1.0, "launch", replica, attempt=1, host=f"w{replica}"))
    state.apply(quorum(2.0, 0, 1, 2))
    state.apply(event(10.0, "resize", None, replicas=2))
    state.apply(event(70.0, "exit", 2, attempt=1, host="w2", code=143, reason="stopped by SIGTERM"))
    state.apply(quorum(72.0, 0, 1))
    assert state.groups[2].state is GroupState.DONE
    assert state.incidents == []
    spare = Spare(task=3, host="w3", t=72.0)
    assert needed(View(state=state, now=73.0, spares=[spare])) == []


def test_a_group_that_was_waiting_when_the_run_shrank_is_done() -> None:
    state = RunState(3)
    state.apply(quorum(2.0, 0, 1))
    state.apply(event(10.0, "resize", None, replicas=2))
    assert state.groups[2].state is GroupState.DONE
