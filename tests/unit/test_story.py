"""The monitor's story and the verdict, on the logs of a real run that lost a node."""

import io
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from launcher import events, findings
from launcher.events import Event
from launcher.findings import Severity, Snapshot
from launcher.model import BlindError, CriticalError, GroupState
from launcher.monitor import SCRIPT, choose, follow, line, once
from launcher.rundir import Outputs, RunDir
from launcher.screen import view
from launcher.slurm import Job, Slurm
from launcher.snapshot import figures
from launcher.state import RunState
from launcher.verdict import judge
from launcher.watcher import Watcher
from launcher.weights import WeightLedger
from tests.conftest import FIXTURES, FakeRun, apply_all
from tests.unit.test_guardian import say, training


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = Outputs(tmp_path).run_of_array(5183502)
    shutil.copytree(FIXTURES / "node-down", run.path)
    return run


@pytest.fixture
def recorded(run: RunDir) -> list[Event]:
    """Every event of the run, in the order in which it is folded."""
    seen: list[Event] = []
    with Watcher.of_run(run) as watcher:
        watcher.on_event = lambda state, event: seen.append(event)
        watcher.look(final=True)
    return seen


def fold(story: list[Event]) -> RunState:
    state = RunState(2, 120)
    for event in story:
        state.apply(event)
    return state


def test_a_group_that_is_back_before_it_is_missed() -> None:
    """Its next start had been waiting: no quorum was ever without it."""
    state = training()
    for number, t in enumerate((112.0, 120.0), start=2):
        # torchrun stamps failures in whole seconds, and its line is read after the next launch.
        say(state, t + 0.7, "commit", 0, rank=0, step=20, committed=False)
        say(state, t + 0.8, "exit", 1, code=1, reason="rank 0 was killed by SIGKILL")
        say(state, t + 0.8, "launch", 1, attempt=number, host="w1")
        say(state, t, "rank_failed", 1, rank=0, exit_code=-9)
        members = [(0, "u0", 20, ""), (1, f"v{number}", 0, "")]
        say(state, t + 1.9, "membership", None, quorum_id=number, members=members)
        for replica in (0, 1):
            say(state, t + 2.5, "commit", replica, rank=0, step=20, committed=True)
        incident = state.incidents[-1]
        assert (incident.first_sign, incident.lost_at) == (t, t + 0.8)
        assert incident.detected_at == incident.rejoined_at == t + 1.9
        assert incident.recovered_at == t + 2.5
        assert incident.steps_lost == 1
        assert incident.survivor_stall_s == pytest.approx(5.0 if number == 2 else 8.0)
        assert "killed by SIGKILL" in incident.why
    assert len(state.incidents) == 2


def test_steps_trained_again_are_not_compared_with_the_training_before() -> None:
    ledger = WeightLedger()
    for replica in (0, 1):
        for step in range(5):
            assert not ledger.add(replica, step, 0, f"first {step}")
    # All groups are lost at once, and start over: other data, other weights.
    for step in range(2, 5):
        for replica in (1, 0):
            assert not ledger.add(replica, step, 0, f"second {step}")
    ledger.add(0, 7, 0, "x")
    assert ledger.add(1, 7, 0, "y"), "what differs is still found"


def test_the_story_of_a_lost_node(run: RunDir) -> None:
    with Watcher.of_run(run) as watcher:
        said = [line(notice) for notice in watcher.look(final=True)]
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
    assert incident.why == "unknown: stopped by SIGTERM"
    assert (incident.steps_lost, round(incident.survivor_stall_s, 1)) == (1, 2.8)
    assert incident.host == "worker-1"
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
    assert [n.text for n in apply_all(state, state.observe([waiting], state.last_event + 1))] == [
        "replica 1 requeued by Slurm, waiting (BeginTime)"
    ]
    assert state.groups[1].state is GroupState.REQUEUED
    assert apply_all(state, state.observe([waiting], state.last_event + 2)) == []


def test_the_verdict_of_a_recovery(recorded: list[Event]) -> None:
    verdict = judge(fold(recorded), lost=1)
    assert verdict.recovered, verdict.lines()
    assert verdict.lines()[0] == "verdict: RECOVERED"
    state = fold(recorded)
    assert state.weights.compared == 186
    assert state.groups[0].longest_pause == pytest.approx(2.8, abs=0.1)
    assert state.seconds_below_full == pytest.approx(16.2, abs=0.1)


def test_the_figures(recorded: list[Event]) -> None:
    values = figures(fold(recorded))
    assert values["time_to_recover_s"] == pytest.approx(17.5, abs=0.1)
    assert values["steps_lost"] == 1
    assert values["participation"] == pytest.approx(0.92, abs=0.01)
    assert values["step_efficiency"] == pytest.approx(211 / 212, abs=0.001)


def without(story: list[Event], *kinds: str) -> list[Event]:
    return [event for event in story if event.kind not in kinds]


def test_a_run_that_lost_nothing_participated_in_full() -> None:
    scene = FIXTURES / "lighthouse-killed"
    logs = sorted(scene.glob("*.events.jsonl"))
    with Watcher.of_files(scene / "lighthouse.log", logs) as watcher:
        watcher.look(final=True)
        assert figures(watcher.state)["participation"] == 1.0
    assert figures(RunState(2))["participation"] is None


def test_one_different_weight_fails_the_verdict(recorded: list[Event]) -> None:
    last = max(i for i, e in enumerate(recorded) if e.kind == "weights" and e.replica == 1)
    bad = dict(recorded[last].fields) | {"hash": "0" * 16}
    story = [*recorded]
    story[last] = Event(t=recorded[last].t, kind="weights", replica=1, fields=bad)
    verdict = judge(fold(story), lost=1)
    assert not verdict.recovered
    assert "weights DIFFER between replica groups at 1 of 186" in "\n".join(verdict.lines())


def test_no_weights_compared_fails_the_verdict(recorded: list[Event]) -> None:
    story = without(recorded, "weights")
    assert not judge(fold(story), lost=1).recovered


def test_a_run_that_never_lost_anything_fails_the_verdict(recorded: list[Event]) -> None:
    verdict = judge(fold(recorded), lost=0)
    assert "replica 0 never left the quorum" in "\n".join(verdict.lines())
    assert not verdict.recovered


def test_training_again_alone_is_not_a_recovery(recorded: list[Event]) -> None:
    """As when its peers have finished meanwhile: it finds nobody to heal from."""
    story, restarted = [], False
    for event in recorded:
        restarted = restarted or (event.kind == "launch" and event.get("attempt") == 2)
        if restarted and event.replica == 1 and event.kind == "commit":
            fields = {**event.fields, "step": int(event.get("step")) - 36}
            event = Event(t=event.t, kind="commit", replica=1, fields=fields)
        if event.get("step", 0) < 46:
            story.append(event)
    state, told = RunState(2, 120), []
    for event in story:
        told += [notice.text for notice in state.apply(event)]
    assert not any("RECOVERED" in text for text in told)
    assert "replica 1 STARTED OVER at step 1 (lost at step 10)" in "\n".join(told)
    kinds = [finding.kind for finding in findings.judge(Snapshot(state=state, now=0.0))]
    assert "started_over" in kinds
    assert not judge(state, lost=1).recovered


def test_a_second_failed_commit_of_the_survivor_fails_the_verdict(recorded: list[Event]) -> None:
    failed = next(e for e in recorded if e.kind == "commit" and not e.get("committed"))
    story = sorted([*recorded, failed], key=lambda e: e.t)
    assert not judge(fold(story), lost=1).recovered


def test_a_cut_short_run_fails_the_verdict(recorded: list[Event]) -> None:
    story = without(recorded, "exit", "end")
    assert not judge(fold(story), lost=1).recovered


def test_following_ends_with_the_run(run: RunDir, fake_run: FakeRun) -> None:
    fake_run.on("squeue", out="1|1|0|COMPLETED|w|2026-11-20T15:00:00|None\n")
    said: list[str] = []
    follow(run, say=said.append, slurm=Slurm(fake_run))
    assert re.search(r"^ +1 +DONE +\d+ \w+ +worker-1 +2 +119 .* 0$", said[-3])
    assert "#1 " in said[-2]
    assert "replica 1 on worker-1 lost: unknown: stopped by SIGTERM; back after 17.5 s" in said[-2]
    assert "time to recover 17.5 s" in said[-1]


def test_a_run_in_the_queue_is_waited_for_and_not_mistaken_for_the_last_one(
    run: RunDir, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = Outputs(run.path.parent.parent)
    queue = f"77|{Path.cwd()}|/spool/{SCRIPT}\n"
    fake_run.on("squeue", "--me", out=queue + f"78|/elsewhere|/spool/{SCRIPT}\n")
    chosen = choose(outputs, None, Slurm(fake_run))
    assert chosen.name == "tft-77"
    # A second later Slurm has given up on it.
    monkeypatch.setattr("time.sleep", lambda seconds: fake_run.on("squeue", "--noheader", out=""))
    fake_run.on("squeue", "--noheader", out="77|77|0|PENDING||2026-11-20T15:00:00|Resources\n")
    said: list[str] = []
    chosen.path.mkdir()
    chosen.log(0, "err").write_text("error: no lighthouse is published: do this\n")
    with pytest.raises(CriticalError, match="did not start: error: no lighthouse is published"):
        follow(chosen, say=said.append, slurm=Slurm(fake_run))
    assert "has not started yet: PENDING (Resources)" in said[0]
    fake_run.on("squeue", "--me", code=1, err="Unable to contact slurm controller")
    assert choose(outputs, "5183502", Slurm(fake_run)).name == "tft-5183502"


def cut_short(run: RunDir) -> None:
    lines = run.events(1).read_text().splitlines(keepends=True)
    run.events(1).write_text("".join(lines[:-8]))


def test_following_a_run_that_died_is_critical(
    run: RunDir, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.monitor.QUIET_SECONDS", 0.0)
    cut_short(run)
    fake_run.on("squeue", out="1|1|1|FAILED|w|2026-11-20T15:00:00|NonZeroExitCode\n")
    with pytest.raises(CriticalError, match="ended before its last step"):
        follow(run, say=lambda text: None, slurm=Slurm(fake_run))


def test_a_blind_monitor_does_not_look_healthy(run: RunDir, fake_run: FakeRun) -> None:
    cut_short(run)
    fake_run.on("squeue", code=1, err="Unable to contact slurm controller")
    said: list[str] = []
    with Watcher.of_run(run, Slurm(fake_run)) as watcher:
        code = once(watcher, say=said.append, as_json=True)
        assert watcher.live_tasks is None
    assert code == BlindError.exit_code
    (finding,) = json.loads(said[0])["findings"]
    assert (finding["kind"], finding["severity"]) == ("monitor_blind", Severity.CRITICAL.value)
    assert "Unable to contact" in finding["message"]


def test_the_interface_for_tools_on_bare_logs() -> None:
    """A contract: these keys, these types, whatever else changes."""
    folder = FIXTURES / "node-down"
    said: list[str] = []
    with Watcher.of_files(
        folder / "lighthouse.log", sorted(folder.glob("*.events.jsonl"))
    ) as watcher:
        assert once(watcher, say=said.append, as_json=True) == 0
    data = json.loads("\n".join(said))
    assert set(data) == {"quorum_id", "step", "replicas", "incidents", "findings"}
    assert (data["quorum_id"], data["step"], data["findings"]) == (3, 119, [])
    assert data["replicas"] == [
        {"id": 0, "state": "DONE", "step": 119, "failed_commits": 1, "attempts": 1},
        {"id": 1, "state": "DONE", "step": 119, "failed_commits": 0, "attempts": 2},
    ]
    assert data["incidents"] == [
        {
            "replica": 1,
            "kind": "replica_lost",
            "cause": "unknown: stopped by SIGTERM",
            "first_sign": "2026-11-20T14:05:32.035+00:00",
            "detected_at": "2026-11-20T14:05:33.248+00:00",
            "recovered_at": "2026-11-20T14:05:50.698+00:00",
            "steps_lost": 1,
            "survivor_stall_s": 2.82,
        }
    ]


def test_lines_that_are_no_events_are_none() -> None:
    for junk in (b"", b"{}", b"null", b"[1]", b"\xff", b'{"t":"x","kind":"commit","replica":0}'):
        assert events.parse_replica_event(junk) is None
    assert events.parse_replica_event(b'{"t":1,"kind":"unheard of","replica":0}') is None


def test_every_recorded_line_of_a_replica_is_an_event() -> None:
    for path in (FIXTURES / "node-down").glob("*.events.jsonl"):
        for recorded_line in path.read_bytes().splitlines():
            assert events.parse_replica_event(recorded_line) is not None
            assert json.loads(recorded_line)["host"].startswith("worker-")


def test_the_live_view_shows_every_group_and_what_slurm_says(
    run: RunDir, fake_run: FakeRun
) -> None:
    cut_short(run)
    fake_run.on("squeue", out="1|1|1|PENDING||2026-11-20T14:09:00|BeginTime\n")
    screen = io.StringIO()
    with Watcher.of_run(run, Slurm(fake_run)) as watcher:
        watcher.look(final=True)
        now = watcher.state.last_event + 5
        Console(file=screen, width=180).print(view(watcher, run.name, now))
    text = screen.getvalue()
    assert "tft-5183502  quorum 3 (" in text
    assert "2 of 2  step 119 of 120  loss 5.4061" in text
    assert re.search(r"0 +DONE +\S+ \w+ +worker-0 +1 +119", text)
    assert re.search(r"1 +REQUEUED .*worker-1 +2 +\d+", text)
    assert "PENDING (BeginTime), start expected 14:09:00; node down* (Not responding)" in text
    assert "INFO waiting_begin_time: replica 1 waits" in text
    assert "time to recover 17.5 s" in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (60, 16)])
def test_the_screen_fits_the_terminal_with_what_matters(
    run: RunDir, width: int, height: int
) -> None:
    """Of many groups those that train are left out, and not what comes below them."""
    with Watcher.of_run(run) as watcher:
        watcher.look(final=True)
        state = watcher.state
        for replica in range(2, 64):
            state.group(replica).state = GroupState.TRAINING
        state.group(40).state = GroupState.LOST
        screen = io.StringIO()
        shown = view(watcher, run.name, state.last_event, width=width, height=height)
        Console(file=screen, width=width, highlight=False).print(shown)
    text = screen.getvalue()
    assert len(text.splitlines()) <= height
    assert re.search(r"^ *40 +LOST", text, re.MULTILINE)
    assert re.search(r"… and \d+ TRAINING", text)
    assert "time to recover 17.5 s" in text.replace("\n", " ")
