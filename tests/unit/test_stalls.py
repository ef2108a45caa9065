"""STALLED: a state that is seen by waiting, and that changes nothing else."""

import io
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.events import Event
from launcher.findings import Snapshot, judge
from launcher.history import History
from launcher.lighthouse_log import Waiting
from launcher.model import GroupState
from launcher.screen import view
from launcher.snapshot import as_data
from launcher.state import RunState
from launcher.watcher import Watcher
from tests.conftest import FIXTURES

SCENES = sorted(path for path in FIXTURES.iterdir() if path.is_dir())
#: In the scene "hang": when the others began to wait, and when the hung process was killed.
SINCE, KILLED = 1795188261.075, 1795188281.736


def recorded(scene: Path) -> list[Event]:
    """Every event of a scene, in the order in which it is folded."""
    seen: list[Event] = []
    with Watcher.of_files(scene / "lighthouse.log", sorted(scene.glob("tft-*"))) as watcher:
        watcher.on_event = lambda state, event: seen.append(event)
        watcher.look(final=True)
    return seen


@pytest.fixture
def story() -> list[Event]:
    return recorded(FIXTURES / "hang")


def until(story: list[Event], t: float) -> RunState:
    state = RunState(2)
    for event in story:
        if event.t < t:
            state.apply(event)
    return state


WAITING = Waiting(since=SINCE, requested={0}, status="need at least half of 2 healthy workers")


def stalled(story: list[Event]) -> RunState:
    state = until(story, KILLED)
    state.observe_waiting(WAITING, SINCE + 20)
    assert state.groups[1].state is GroupState.STALLED
    return state


def test_a_group_that_others_wait_for_is_stalled(story: list[Event]) -> None:
    state = until(story, KILLED)
    before = as_data(state, [])["incidents"]
    for seconds, expected in ((7.9, GroupState.TRAINING), (8.1, GroupState.STALLED)):
        now = SINCE + seconds
        state.observe_waiting(WAITING, now)
        assert state.groups[1].state is expected
        found = [f.replica for f in judge(Snapshot(state=state, now=now, waiting=WAITING))]
        assert (1 in found) is (expected is GroupState.STALLED), "one rule for both"
    assert state.groups[0].state is GroupState.TRAINING
    assert state.groups[1].since == SINCE + 8, "wherever the monitor was started"
    assert as_data(state, [])["incidents"] == before


def test_slow_steps_are_waited_for_longer(story: list[Event]) -> None:
    state = until(story, KILLED)
    state.groups[0].step_seconds = 30.0
    for seconds, expected in ((149, GroupState.TRAINING), (151, GroupState.STALLED)):
        state.observe_waiting(WAITING, SINCE + seconds)
        assert state.groups[1].state is expected


def one(kind: str, **fields: Any) -> Event:
    return Event(t=SINCE + 21, kind=kind, replica=1, fields=fields)


@pytest.mark.parametrize(
    ("event", "after"),
    [
        (one("commit", step=40, committed=True, rank=0), GroupState.TRAINING),
        (one("heal", step=40, source=0, rank=0), GroupState.HEALING),
        (one("exit", code=1, reason="killed"), GroupState.LOST),
    ],
    ids=lambda value: value.kind if isinstance(value, Event) else value.value,
)
def test_what_ends_a_stall(story: list[Event], event: Event, after: GroupState) -> None:
    state = stalled(story)
    state.apply(event)
    assert state.groups[1].state is after


def test_joining_ends_a_stall(story: list[Event]) -> None:
    for waiting in (Waiting(), Waiting(since=SINCE, requested={0, 1})):
        state = stalled(story)
        state.observe_waiting(waiting, SINCE + 21)
        assert (state.groups[1].state, state.groups[1].since) == (GroupState.TRAINING, SINCE + 21)
    state = stalled(story)
    members = [(1, "b", 0, "x"), (0, "a", 40, "x")]
    fields = {"quorum_id": 9, "members": members}
    state.apply(Event(t=SINCE + 21, kind="membership", fields=fields))
    assert state.groups[1].state is GroupState.HEALING


@pytest.mark.parametrize("kind", ["exit", "launch"])
def test_who_ended_or_starts_again_is_not_stalled(story: list[Event], kind: str) -> None:
    state = until(story, KILLED)
    state.apply(one(kind, code=1, reason="killed", attempt=2, host="w"))
    before = state.groups[1].state
    state.observe_waiting(WAITING, SINCE + 60)
    assert state.groups[1].state is before
    found = judge(Snapshot(state=state, now=SINCE + 60, waiting=WAITING))
    assert "replica_stalled" not in {finding.kind for finding in found}


@pytest.mark.parametrize("scene", SCENES, ids=lambda path: path.name)
def test_looking_at_any_time_changes_no_incident(scene: Path) -> None:
    plain, looked, chances = RunState(0), RunState(0), random.Random(3)
    for event in recorded(scene):
        plain.apply(event)
        looked.apply(event)
        if chances.random() < 0.3:
            since = event.t - chances.uniform(0, 60)
            waiting = Waiting(since=since, requested=set(chances.sample(range(3), 1)))
            looked.observe_waiting(waiting, event.t)
    looked.observe_waiting(Waiting(), looked.last_event)
    assert as_data(looked, []) == as_data(plain, [])


def test_a_report_of_the_past_shows_it_too(story: list[Event]) -> None:
    state, history = RunState(2), History()
    for event in story:
        state.apply(event)
        history.note(state, event)
    spans = history.groups[1].spans(state.last_event)
    (span,) = (span for span in spans if span.value is GroupState.STALLED)
    assert (span.start, round(span.end, 3)) == (SINCE + 8, KILLED)
    assert GroupState.STALLED not in {s.value for s in history.groups[0].spans(state.last_event)}
    live, seen = RunState(2), History()
    for event in story:
        if event.t >= KILLED > live.last_event:
            live.observe_waiting(WAITING, SINCE + 15)  # a monitor that was started late
            seen.check(live)
        live.apply(event)
        seen.note(live, event)
    assert seen.groups[1].spans(live.last_event) == spans


def test_the_table_shows_it(tmp_path: Path) -> None:
    scene = FIXTURES / "hang"
    log = (scene / "lighthouse.log").read_bytes()
    end = log.index(b"Quorum! Quorum { quorum_id: 2,")
    (tmp_path / "lighthouse.log").write_bytes(log[: log.rindex(b"\n", 0, end) + 1])
    for path in scene.glob("*.events.jsonl"):
        text = path.read_text()
        kept = [x for x in text.splitlines() if float(x[5:].partition(",")[0]) < KILLED]
        (tmp_path / path.name).write_text("\n".join(kept) + "\n")
    paths = sorted(tmp_path.glob("*.events.jsonl"))
    screen = io.StringIO()
    with Watcher.of_files(tmp_path / "lighthouse.log", paths) as watcher:
        watcher.look()
        Console(file=screen, width=160).print(view(watcher, "", SINCE + 20))
    text = screen.getvalue()
    assert "STALLED" in text
    assert "replica_stalled: replica 1 has not joined the quorum" in text
