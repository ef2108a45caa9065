"""Logs come in any order, in pieces, late or again: in the end the story is that of one pass."""

from __future__ import annotations

import json
import pickle
import random
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import folding
from launcher import watcher as watching
from launcher.events import Event
from launcher.snapshot import as_data
from launcher.state import RunState
from launcher.watcher import Watcher
from tests.conftest import FIXTURES

SCENES = sorted(path for path in FIXTURES.iterdir() if path.is_dir())


def logs(scene: Path) -> list[Path]:
    """The lighthouse's first, then the replica groups', structured and text."""
    groups = sorted(path for path in scene.iterdir() if path.name.startswith("tft-"))
    return [scene / "lighthouse.log", *groups]


def watch(scene: Path, folder: Path) -> Watcher:
    lighthouse, *rest = (folder / path.name for path in logs(scene))
    return Watcher.of_files(lighthouse, rest)


def one_pass(scene: Path) -> dict[str, Any]:
    with watch(scene, scene) as watcher:
        watcher.look(final=True)
        return as_data(watcher.state, [])


@pytest.mark.parametrize("scene", SCENES, ids=lambda path: path.name)
@pytest.mark.parametrize("seed", range(3))
def test_growing_files_and_restarts_tell_the_same_story(
    scene: Path, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that grow in any interleaving and are cut at any byte, looked at after every piece by
    a monitor that is restarted now and then."""
    if seed == 2:  # little is kept: what comes late must be read again
        monkeypatch.setattr(folding, "MOST_EVENTS", 40)
        monkeypatch.setattr(folding, "MOST_OF_A_GROUP", 1)
    chances = random.Random(seed)
    left = {path: path.read_bytes() for path in logs(scene)}
    watcher = watch(scene, tmp_path)
    while any(left.values()):
        path = chances.choice([p for p, data in left.items() if data])
        size = chances.randrange(1, 60_000)
        with (tmp_path / path.name).open("ab") as file:
            file.write(left[path][:size])
        left[path] = left[path][size:]
        if chances.random() < 0.2:
            watcher.close()
            watcher = watch(scene, tmp_path)
        watcher.look()
    watcher.look(final=True)
    assert as_data(watcher.state, []) == one_pass(scene)
    watcher.close()


@pytest.mark.parametrize("first", [0, 1])
def test_logs_that_lag_behind_are_put_right_and_told(first: int, tmp_path: Path) -> None:
    """As on NFS: one machine's log is seen whole before another's begins."""
    scene = FIXTURES / "kill-replica"
    paths = logs(scene)
    watcher, told = watch(scene, tmp_path), []
    for path in [paths[first], *paths[:first], *paths[first + 1 :]]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
        told += [notice.text for notice in watcher.look()]
    told += [notice.text for notice in watcher.look(final=True)]
    assert as_data(watcher.state, []) == one_pass(scene)
    assert sum("RECOVERED" in text for text in told) == 1
    assert sum("LOST" in text for text in told) == 1
    watcher.close()


def event(t: float, kind: str = "commit", **fields: Any) -> Event:
    return Event(t=t, kind=kind, replica=0, fields={"rank": 0, **fields})


def test_the_state_stays_the_same_object_and_keeps_slurms_word() -> None:
    fold = folding.Fold(RunState(1))
    state, group = fold.state, fold.state.groups[0]
    fold.take(event(10.0, "launch", attempt=1, host="a"))
    fold.take(event(12.0, step=1, committed=True))
    state.groups[0].waiting, state.groups[0].slurm_state = "BeginTime", "PENDING"
    late = fold.take(event(11.0, step=0, committed=False))
    assert [notice.text for notice in late] == ["replica 0 failed to commit step 0"]
    assert fold.correct() == []
    assert state is fold.state
    assert group is state.groups[0]
    assert (state.groups[0].failed_since_commit, state.groups[0].failed_commits) == (0, 1)
    assert (state.groups[0].waiting, state.groups[0].slurm_state) == ("BeginTime", "PENDING")


def test_incidents_stay_the_same_objects_too() -> None:
    """Whoever watches a drill tells new ones from those of before by that."""
    fold = folding.Fold(RunState(2))
    both = [(0, "a", 1, "x"), (1, "b", 1, "x")]
    for t, members in ((10.0, both), (20.0, both[:1])):
        fields = {"quorum_id": int(t), "members": members}
        fold.take(Event(t=t, kind="membership", fields=fields))
    (before,) = fold.state.incidents
    fold.take(event(30.0, step=1, committed=True))
    fold.take(Event(t=19.0, kind="rank_failed", replica=1, fields={"exit_code": -9}))
    fold.correct(now=True)
    (after,) = fold.state.incidents
    assert after is before
    assert (after.first_sign, after.why) == (19.0, "process crash: a rank exited with code -9")
    fold.take(Event(t=40.0, kind="listening", fields={}))
    fold.take(event(35.0, step=2, committed=True))
    outage = fold.state.outage
    fold.correct(now=True)
    assert fold.state.outage is outage is fold.state.incidents[-1]


def test_putting_right_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a node whose clock is behind every event is late."""
    fold = folding.Fold(RunState(1))
    monkeypatch.setattr(folding, "FIRST_SECONDS", -1.0)
    fold.take(event(12.0, step=1, committed=True))
    fold.take(event(11.0, step=0, committed=False))
    fold.correct()
    assert fold.state.groups[0].failed_since_commit == 1, "not yet"
    fold.correct(now=True)
    assert fold.state.groups[0].failed_since_commit == 0


def test_an_event_from_a_clock_that_is_ahead_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "SETTLE", 0.0)
    ahead = {"t": time.time() + 300, "kind": "exit", "replica": 0, "code": 1, "reason": "x"}
    path = tmp_path / "a_0.events.jsonl"
    path.write_text(json.dumps(ahead) + "\n")
    with Watcher.of_files(None, [path]) as watcher:
        watcher.look()
        watcher.look()
        assert watcher.state.groups[0].ended


def size_after(steps: int) -> int:
    state = RunState(2, None)
    for step in range(steps):
        for replica in (0, 1):
            t = 1000.0 + step
            fields: dict[str, Any] = {"step": step, "committed": True, "rank": 0}
            state.apply(Event(t=t, kind="commit", replica=replica, fields=fields))
            fields = {"step": step, "rank": 0, "hash": f"{step:016x}"}
            state.apply(Event(t=t, kind="weights", replica=replica, fields=fields))
    return len(pickle.dumps(state))


def test_the_state_after_many_steps_is_no_larger_than_after_few() -> None:
    few, many = size_after(1_000), size_after(20_000)
    assert many < few * 1.02  # (its numbers have more digits)
