"""The monitor's story and the verdict, on the logs of a real run that lost a node."""

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import events
from launcher.events import Event
from launcher.model import CriticalError, GroupState
from launcher.monitor import Watcher, follow, line, read
from launcher.rundir import Outputs, RunDir
from launcher.slurm import Job, Slurm
from launcher.state import RunState
from launcher.verdict import compare_weights, judge, longest_pause, seconds_below_full
from tests.conftest import FIXTURES, FakeRun


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = Outputs(tmp_path).run_of_array(5183502)
    shutil.copytree(FIXTURES / "node-down", run.path)
    return run


@pytest.fixture
def recorded(run: RunDir) -> list[Event]:
    return read(run)[1]


def fold(story: list[Event]) -> RunState:
    state = RunState(2, 120)
    for event in story:
        state.apply(event)
    return state


def test_the_story_of_a_lost_node(run: RunDir) -> None:
    with Watcher(run) as watcher:
        said = [line(notice) for notice in watcher.look()]
    told = "\n".join(said)
    for part in (
        "quorum 1 at step 0: 2 of 2 replica groups; replica 0 joined, replica 1 joined",
        "14:05:31  replica 0 failed to commit step 10",
        "replica 1 (attempt 1) on worker-1 ended with exit code 143: stopped by SIGTERM",
        "14:05:33  quorum 2 at step 10: 1 of 2 replica groups; replica 1 LOST",
        "14:05:37  replica 1 launched (attempt 2) on worker-1",
        "quorum 3 at step 36: 2 of 2 replica groups; replica 1 joined (behind: will heal)",
        "replica 1 healed from replica 0 at step 36",
        "replica 1 RECOVERED: commits again at step 37, 17.5 s after the quorum lost it",
    ):
        assert part in told
    assert len(said) == 12, told


def test_the_state_at_the_end(recorded: list[Event]) -> None:
    state = fold(recorded)
    assert state.finished
    assert [group.step for group in state.groups.values()] == [119, 119]
    assert [group.failed_commits for group in state.groups.values()] == [1, 0]
    assert [group.attempt for group in state.groups.values()] == [1, 2]
    (incident,) = state.incidents
    assert (incident.replica, incident.healed_from, incident.lost_at_step) == (1, 0, 10)
    assert incident.cause == "stopped by SIGTERM"
    assert incident.recovered_at_step == 37


def test_the_states_on_the_way(recorded: list[Event]) -> None:
    state, seen = RunState(2, 120), []
    for event in recorded:
        state.apply(event)
        seen.append(state.groups[1].state)
    assert [key.value for key, _ in itertools.groupby(seen)] == (
        ["PENDING", "STARTING", "TRAINING", "LOST", "STARTING", "HEALING", "TRAINING", "DONE"]
    )


def test_slurm_says_what_a_lost_group_waits_for(recorded: list[Event]) -> None:
    state = RunState(2, 120)
    for event in recorded:
        state.apply(event)
        if event.kind == "exit":
            break
    waiting = Job(job_id=2, array_job_id=1, task=1, state="PENDING", node="", reason="BeginTime")
    assert [n.text for n in state.observe([waiting], 1.0)] == [
        "replica 1 requeued by Slurm, waiting (BeginTime)"
    ]
    assert state.groups[1].state is GroupState.REQUEUED
    assert state.observe([waiting], 2.0) == []


def test_the_verdict_of_a_recovery(recorded: list[Event]) -> None:
    verdict = judge(fold(recorded), recorded, lost=1)
    assert verdict.recovered, verdict.lines()
    assert verdict.lines()[0] == "verdict: RECOVERED"
    assert compare_weights(recorded).compared == 186
    assert longest_pause(recorded, 0) == pytest.approx(2.8, abs=0.1)
    assert seconds_below_full(recorded, 2) == pytest.approx(16.2, abs=0.1)


def without(story: list[Event], *kinds: str) -> list[Event]:
    return [event for event in story if event.kind not in kinds]


def test_one_different_weight_fails_the_verdict(recorded: list[Event]) -> None:
    last = max(i for i, e in enumerate(recorded) if e.kind == "weights" and e.replica == 1)
    bad = dict(recorded[last].fields) | {"hash": "0" * 16}
    story = [*recorded]
    story[last] = Event(t=recorded[last].t, kind="weights", replica=1, fields=bad)
    verdict = judge(fold(story), story, lost=1)
    assert not verdict.recovered
    assert "weights DIFFER between replica groups at 1 of 186" in "\n".join(verdict.lines())


def test_no_weights_compared_fails_the_verdict(recorded: list[Event]) -> None:
    story = without(recorded, "weights")
    assert not judge(fold(story), story, lost=1).recovered


def test_a_run_that_never_lost_anything_fails_the_verdict(recorded: list[Event]) -> None:
    verdict = judge(fold(recorded), recorded, lost=0)
    assert "replica 0 never left the quorum" in "\n".join(verdict.lines())
    assert not verdict.recovered


def test_a_second_failed_commit_of_the_survivor_fails_the_verdict(recorded: list[Event]) -> None:
    failed = next(e for e in recorded if e.kind == "commit" and not e.get("committed"))
    story = sorted([*recorded, failed], key=lambda e: e.t)
    assert not judge(fold(story), story, lost=1).recovered


def test_a_cut_short_run_fails_the_verdict(recorded: list[Event]) -> None:
    story = without(recorded, "exit", "end")
    assert not judge(fold(story), story, lost=1).recovered


def test_following_ends_with_the_run(run: RunDir, fake_run: FakeRun) -> None:
    fake_run.on("squeue", out="1|1|0|COMPLETED|w|None\n")
    said: list[str] = []
    follow(run, say=said.append, slurm=Slurm(fake_run))
    assert said[-1].startswith("replica 1  DONE      step   119  attempt 2  failed commits 0")


def test_following_a_run_that_died_is_critical(
    run: RunDir, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.monitor.SETTLE", 0.0)
    events_file = run.events(1)
    lines = events_file.read_text().splitlines(keepends=True)
    events_file.write_text("".join(lines[:-8]))
    fake_run.on("squeue", out="1|1|1|FAILED|w|NonZeroExitCode\n")
    with pytest.raises(CriticalError, match="ended before its last step"):
        follow(run, say=lambda text: None, slurm=Slurm(fake_run))


def test_a_blind_look_says_so(run: RunDir, fake_run: FakeRun) -> None:
    fake_run.on("squeue", code=1, err="Unable to contact slurm controller")
    with Watcher(run, Slurm(fake_run)) as watcher:
        watcher.look()
    assert "squeue could not be asked" in watcher.blind
    assert watcher.live_tasks is None


def test_lines_that_are_no_events_are_none() -> None:
    for junk in (b"", b"{}", b"null", b"[1]", b"\xff", b'{"t":"x","kind":"commit","replica":0}'):
        assert events.parse_replica_event(junk) is None
    assert events.parse_replica_event(b'{"t":1,"kind":"unheard of","replica":0}') is None
    assert events.parse_lighthouse_line(b"Quorum! but not as we know it") is None


def test_lighthouse_lines_of_older_versions_too() -> None:
    """Without reconfigure_handles, as torchft wrote it before 2026."""
    line = (
        b"2025-07-16T13:51:42.123 [INFO] [torchft::lighthouse] - Quorum! Quorum { quorum_id: 4, "
        b'participants: [QuorumMember { replica_id: "torchtitan_ft_1:3f-a", address: "http://w-1:1", '
        b'store_address: "w-1:2", step: 302, world_size: 8, shrink_only: false, commit_failures: 0, '
        b'data: "" }], created: Some(Timestamp { seconds: 1752673902, nanos: 1 }) }'
    )
    event = events.parse_lighthouse_line(line)
    assert event is not None
    assert event.fields == {"quorum_id": 4, "members": {1: ("3f-a", 302)}}
    assert event.t == pytest.approx(1752673902.123)


def _lines(path: Path) -> Iterator[bytes]:
    yield from path.read_bytes().splitlines()


def test_every_recorded_line_of_a_replica_is_an_event() -> None:
    for path in (FIXTURES / "node-down").glob("*.events.jsonl"):
        for recorded_line in _lines(path):
            assert events.parse_replica_event(recorded_line) is not None
            assert json.loads(recorded_line)["host"].startswith("worker-")
