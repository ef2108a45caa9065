"""What follows from quorums alone, where replica groups tell nothing themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.events import Event
from launcher.lighthouse_log import Waiting
from launcher.model import GroupState
from launcher.snapshot import as_data
from launcher.state import RunState
from launcher.watcher import Watcher
from tests.conftest import FIXTURES

SCENES = sorted(path for path in FIXTURES.iterdir() if path.is_dir())
#: Seconds by which what follows from the quorums may be off: a commit is seen at the next request.
CLOSE = 1.5


def told(lighthouse: Path, *logs: Path) -> dict[str, Any]:
    with Watcher.of_files(lighthouse, logs) as watcher:
        watcher.look(final=True)
        return as_data(watcher.state, watcher.findings(watcher.present))


def seconds(stamp: str) -> float:
    hours, minutes, rest = stamp[11:23].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(rest)


@pytest.mark.parametrize("scene", SCENES, ids=lambda path: path.name)
def test_the_lighthouses_log_alone_tells_what_all_logs_tell(scene: Path) -> None:
    """All but the causes, and the very last step."""
    own = sorted(scene.glob("*.events.jsonl"))
    whole, alone = told(scene / "lighthouse.log", *own), told(scene / "lighthouse.log")
    assert alone["quorum_id"] == whole["quorum_id"]
    assert whole["step"] - alone["step"] in (0, 1)
    for mine, theirs in zip(alone["replicas"], whole["replicas"], strict=True):
        assert (mine["id"], mine["attempts"]) == (theirs["id"], theirs["attempts"])
        assert theirs["step"] - mine["step"] in (0, 1)
    for mine, theirs in zip(alone["incidents"], whole["incidents"], strict=True):
        assert (mine["replica"], mine["kind"]) == (theirs["replica"], theirs["kind"])
        for moment in ("first_sign", "detected_at", "recovered_at"):
            if theirs["kind"] == "replica_lost":
                assert abs(seconds(mine[moment]) - seconds(theirs[moment])) < CLOSE, moment
        assert abs(mine["survivor_stall_s"] - theirs["survivor_stall_s"]) < CLOSE


UUIDS = ("u-a", "u-b", "u-c")


def membership(t: float, quorum_id: int, *members: tuple[int, str, int], **waited: Any) -> Event:
    fields = {
        "quorum_id": quorum_id,
        "members": [(*member, "x") for member in members],
        "waited": Waiting(**waited),
    }
    return Event(t=t, kind="membership", fields=fields)


def steps(t: float, *known: tuple[int, int], in_a_row: bool = True) -> Event:
    return Event(t=t, kind="steps", fields={"steps": list(known), "in_a_row": in_a_row})


def said(t: float, kind: str, replica: int, **fields: Any) -> Event:
    return Event(t=t, kind=kind, replica=replica, fields=fields)


def fold(*events: Event) -> RunState:
    state = RunState(0)
    for event in events:
        state.apply(event)
    return state


def test_who_tells_of_his_commits_is_believed_and_nobody_else() -> None:
    state = fold(
        membership(10.0, 1, (0, "a", 0), (1, "b", 0)),
        said(11.0, "commit", 0, step=0, committed=True, rank=0),
        steps(12.0, (0, 3), (1, 3)),
        Event(t=13.0, kind="commit_failed", fields={"ids": ["x"], "replicas": [0, 1]}),
    )
    assert [(g.step, g.failed_commits) for g in state.groups.values()] == [(1, 0), (3, 1)]


def test_the_time_that_was_not_looked_at_is_no_pause() -> None:
    state = fold(
        membership(10.0, 1, (0, "a", 0), (1, "b", 0)),
        steps(11.0, (0, 1), (1, 1)),
        steps(500.0, (0, 300), (1, 300), in_a_row=False),
        membership(507.0, 2, (0, "a", 300)),
        steps(508.0, (0, 301)),
    )
    (incident,) = state.incidents
    assert incident.survivor_stall_s == 8.0
    assert state.groups[0].commits == 301


def test_a_group_that_said_it_has_finished_is_done_and_its_next_copy_is_not() -> None:
    start = membership(10.0, 1, (0, "a", 5), (1, "b", 5))
    end = said(11.0, "end", 1, code=0)
    state = fold(start, end, membership(12.0, 2, (0, "a", 6)))
    assert state.incidents == []
    assert state.groups[1].state is GroupState.DONE
    again = fold(
        start,
        end,
        membership(12.0, 2, (0, "a", 6)),
        membership(20.0, 3, (0, "a", 9), (1, "c", 0)),
        membership(30.0, 4, (0, "a", 12)),
    )
    assert [incident.replica for incident in again.incidents] == [1]
    assert again.groups[1].attempts == 2


@pytest.mark.parametrize(
    ("heartbeating", "waits", "cause"),
    [(3, 5.0, "hang"), (2, 5.0, "unknown"), (None, 5.0, "unknown"), (None, 9.0, "hang")],
)
def test_a_group_whose_heartbeats_go_on_hangs(
    heartbeating: int | None, waits: float, cause: str
) -> None:
    """However short the others waited for it; without that word, it is a matter of time."""
    state = fold(
        membership(10.0, 1, *((n, UUIDS[n], 1) for n in range(3))),
        membership(
            20.0 + waits,
            2,
            (0, "u-a", 2),
            (2, "u-c", 2),
            since=20.0,
            requested={0, 2},
            heartbeating=heartbeating,
        ),
    )
    assert state.incidents[0].why.startswith(cause)


def test_one_that_may_be_starting_also_beats() -> None:
    state = fold(
        membership(10.0, 1, *((n, UUIDS[n], 1) for n in range(3))),
        membership(20.0, 2, (0, "u-a", 2), (2, "u-c", 2)),
        membership(30.0, 3, (0, "u-a", 3), since=25.0, requested={0}, heartbeating=2),
    )
    assert [incident.why for incident in state.incidents] == ["unknown", "unknown"]


def test_the_first_sign_of_a_silent_loss_is_what_the_others_noticed() -> None:
    before = [
        membership(10.0, 1, (0, "a", 1), (1, "b", 1)),
        said(12.0, "commit", 0, step=1, committed=True, rank=0),
        said(13.0, "commit", 0, step=2, committed=False, rank=0),
    ]
    lost = membership(16.0, 2, (0, "a", 2), since=13.5, requested={0})
    (incident,) = fold(*before, lost).incidents
    assert (incident.first_sign, incident.detected_at) == (13.0, 16.0)
    # What it said of its own end counts more, be it later.
    own = said(15.0, "rank_failed", 1, exit_code=-9)
    for story in ([*before, own, lost], [*before, lost, own]):
        (incident,) = fold(*story).incidents
        assert incident.first_sign == 15.0


def test_the_absence_of_one_lost_group_is_no_pause_of_another_loss() -> None:
    events = [membership(10.0, 1, *((n, UUIDS[n], 1) for n in range(3)))]
    for n in range(3):
        events.append(said(11.0, "commit", n, step=1, committed=True, rank=0))
    events += [
        membership(13.0, 2, (0, "u-a", 2)),
        said(13.1, "commit", 0, step=2, committed=True, rank=0),
        membership(30.0, 3, (0, "u-a", 9), (1, "v-b", 0), (2, "v-c", 0)),
        said(31.0, "commit", 1, step=10, committed=True, rank=0),
        said(31.0, "commit", 2, step=10, committed=True, rank=0),
    ]
    assert [round(i.survivor_stall_s, 1) for i in fold(*events).incidents] == [2.1, 2.1]


def test_late_words_of_the_lost_copy_are_no_start_over() -> None:
    """From a clock that is ahead of the lighthouse's."""
    state = fold(
        membership(10.0, 1, (0, "a", 1), (1, "b", 1)),
        said(11.0, "commit", 0, step=8, committed=True, rank=0),
        said(11.0, "commit", 1, step=8, committed=True, rank=0),
        membership(16.0, 2, (0, "a", 10)),
        said(16.5, "commit", 1, step=8, committed=True, rank=0),
        membership(30.0, 3, (0, "a", 20), (1, "c", 0)),
        said(31.0, "commit", 1, step=20, committed=True, rank=0),
    )
    (incident,) = state.incidents
    assert (incident.started_over, incident.recovered_at) == (False, 31.0)


def test_a_log_that_is_named_and_not_there_is_a_blind_spot_and_json(tmp_path: Path) -> None:
    scene = FIXTURES / "node-down"
    data = told(scene / "lighthouse.log", tmp_path / "none.log", scene)
    json.dumps(data, allow_nan=False)
    messages = [f["message"] for f in data["findings"] if f["kind"] == "monitor_blind"]
    assert len(messages) == 2
    assert any("there is no such file" in message for message in messages)
    assert data["quorum_id"] == 3
