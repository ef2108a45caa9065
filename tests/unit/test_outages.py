"""The loss of the lighthouse as an incident, and of groups because of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.alarms import alarms
from launcher.events import Event
from launcher.findings import Snapshot, judge
from launcher.lighthouse_log import LighthouseReader
from launcher.model import ReportFormat
from launcher.publish import publish
from launcher.rundir import Outputs
from launcher.sinks import Delivery, Update
from launcher.slurm import Slurm
from launcher.snapshot import as_data, figures
from launcher.state import RunState
from launcher.wandb_sink import _table
from launcher.watcher import Watcher
from tests.conftest import FIXTURES, FakeRun

SCENE = FIXTURES / "lighthouse-killed"


def membership(t: float, *replicas: int) -> Event:
    members = [(replica, f"uuid-{replica}", 10, "x") for replica in replicas]
    return Event(t=t, kind="membership", fields={"quorum_id": int(t), "members": members})


def said(t: float, kind: str, replica: int, **fields: Any) -> Event:
    return Event(t=t, kind=kind, replica=replica, fields=fields)


def commit(t: float, replica: int, committed: bool = True) -> Event:
    return said(t, "commit", replica, step=int(t), committed=committed, rank=0)


def unreachable(t: float, replica: int) -> Event:
    return said(t, "heartbeat_failed", replica, text="transport error")


def listening(t: float, last: float | None = None) -> Event:
    return Event(t=t, kind="listening", fields={"last": last})


def training(groups: int = 3) -> RunState:
    state = RunState(groups)
    state.apply(listening(0.5))
    for replica in range(groups):
        state.apply(said(1.0, "launch", replica, attempt=1, host=f"worker-{replica}"))
    state.apply(membership(2.0, *range(groups)))
    for replica in range(groups):
        state.apply(commit(10.0 + replica / 10, replica))
    assert state.incidents == []
    return state


def tell(state: RunState, *events: Event) -> str:
    return "\n".join(notice.text for event in events for notice in state.apply(event))


def test_the_recorded_one() -> None:
    """Killed between two of its lines; started again by its supervisor in half a second."""
    with Watcher.of_files(SCENE / "lighthouse.log", sorted(SCENE.glob("tft-*"))) as watcher:
        watcher.look(final=True)
        state = watcher.state
    (data,) = as_data(state, [])["incidents"]
    assert data == {
        "replica": None,
        "kind": "lighthouse_lost",
        "cause": "lighthouse lost",
        "first_sign": "2026-11-20T15:31:32.471+00:00",
        "detected_at": "2026-11-20T15:31:32.924+00:00",
        "recovered_at": "2026-11-20T15:31:33.532+00:00",
        "steps_lost": 0,
        "survivor_stall_s": 0.817,
    }
    assert figures(state)["time_to_recover_s"] is None, "that is of replica groups"


def test_started_again() -> None:
    state = training()
    told = tell(state, commit(11.0, 0), listening(12.0, last=10.9), commit(12.1, 1))
    (incident,) = state.incidents
    assert told == "the lighthouse was started again"
    assert (incident.first_sign, incident.detected_at, incident.recovered_at) == (10.9, 12.0, None)
    told = tell(state, membership(15.0, 0, 1, 2), commit(20.0, 0), commit(21.0, 2))
    assert (
        "the lighthouse is back: replica 0 commits again at step 21, 9.1 s after the first" in told
    )
    assert (incident.recovered_at, incident.recovered_at_step) == (20.0, 21)
    assert incident.survivor_stall_s == pytest.approx(10.8), "of replica 2: 10.2 to 21"
    tell(state, commit(90.0, 1))
    assert incident.survivor_stall_s == pytest.approx(77.9), "it too had waited since before"
    tell(state, commit(500.0, 0), commit(600.0, 1))
    assert incident.survivor_stall_s == pytest.approx(77.9), "what came later is its own affair"
    assert len(state.incidents) == 1


def test_dying_again_before_it_is_back_is_one_incident() -> None:
    state = training()
    tell(state, listening(12.0), membership(13.0, 0, 1, 2), listening(14.0), commit(14.1, 0))
    (incident,) = state.incidents
    assert (incident.started_at, incident.recovered_at) == (14.0, None)
    tell(state, membership(15.0, 0, 1, 2), commit(16.0, 0))
    assert incident.recovered_at == 16.0
    tell(state, listening(40.0))
    assert len(state.incidents) == 2


def test_its_first_start_and_one_after_the_end_are_none() -> None:
    state = RunState(1)
    tell(state, listening(1.0), listening(2.0), membership(3.0, 0), commit(4.0, 0))
    tell(state, said(5.0, "exit", 0, code=0, reason=""), listening(6.0))
    assert state.incidents == []


def test_more_than_half_must_say_so() -> None:
    state = training()
    tell(state, unreachable(12.0, 0), unreachable(12.1, 0), unreachable(30.0, 1))
    assert state.incidents == [], "one and one, at different times"
    told = tell(state, unreachable(31.0, 2), unreachable(32.0, 0))
    assert told == "the replica groups cannot reach the lighthouse"
    (incident,) = state.incidents
    assert (incident.first_sign, incident.detected_at) == (30.0, 31.0)
    assert {sign.text[:9] for sign in incident.evidence} == {"replica 0", "replica 1", "replica 2"}


def test_one_that_commits_meanwhile_can_reach_it() -> None:
    state = training(2)
    tell(state, unreachable(12.0, 0), commit(12.5, 0), unreachable(13.0, 1), commit(13.5, 1))
    assert state.incidents == []


def test_nobody_answering_in_time_may_be_the_other_groups() -> None:
    state = training()
    text = 'status: Cancelled, message: "Timeout expired"'
    tell(state, *(said(60.0 + r, "quorum_failed", r, text=text) for r in (0, 1, 2)))
    assert state.incidents == []
    text = "status: Unavailable, tcp connect error"
    tell(state, *(said(70.0 + r, "quorum_failed", r, text=text) for r in (0, 1, 2)))
    assert [i.kind for i in state.incidents] == ["lighthouse_lost"]


def test_cut_off_and_back_without_a_restart() -> None:
    state = training(2)
    tell(state, unreachable(12.0, 0), unreachable(12.1, 1), commit(12.2, 0))
    (incident,) = state.incidents
    assert incident.recovered_at is None, "agreed on before"
    tell(state, unreachable(13.0, 0), unreachable(30.0, 0), commit(40.0, 0), commit(40.1, 1))
    assert incident.recovered_at is None
    tell(state, commit(41.0, 0))
    assert incident.recovered_at == 41.0
    assert incident.survivor_stall_s == pytest.approx(30.0), "of replica 1: 10.1 to 40.1"


def test_steps_that_were_lost_by_it() -> None:
    state = training(2)
    tell(state, listening(12.0), commit(12.5, 0, committed=False), membership(13.0, 0, 1))
    tell(state, commit(14.0, 0, committed=False), commit(15.0, 0), commit(15.1, 1))
    assert state.incidents[0].steps_lost == 2


@pytest.mark.parametrize(
    "last_words",
    [
        said(70.0, "quorum_failed", 1, text="status: Unavailable"),
        said(70.0, "exception", 1, text="RuntimeError: lighthouse unreachable"),
    ],
    ids=lambda event: event.kind,
)
def test_a_group_that_ends_of_it(last_words: Event) -> None:
    state = training(2)
    tell(state, listening(12.0), last_words, said(70.1, "exception", 1, text="RuntimeError: x"))
    tell(state, said(71.0, "exit", 1, code=1, attempt=1, reason="rank 0 exited with code 1"))
    tell(state, membership(73.0, 0), commit(74.0, 0))
    assert [(i.replica, i.why) for i in state.incidents] == [
        (None, "lighthouse lost"),
        (1, "lighthouse lost"),
    ]


def test_a_crash_while_it_is_lost_is_a_crash() -> None:
    state = training(2)
    tell(state, listening(12.0), unreachable(12.1, 1))
    tell(state, said(13.0, "exit", 1, code=1, attempt=1, reason="rank 0 was killed by SIGKILL"))
    tell(state, membership(15.0, 0))
    assert state.incidents[-1].why == "process crash: rank 0 was killed by SIGKILL"


def test_a_cut_off_node_is_not_the_lighthouse() -> None:
    """Its group complains of the lighthouse too, alone."""
    state = training()
    tell(state, unreachable(12.0, 2), said(13.0, "quorum_failed", 2, text="Unavailable"))
    tell(state, said(70.0, "exit", 2, code=1, attempt=1, reason="lighthouse quorum failed"))
    (incident,) = state.incidents
    assert (incident.replica, incident.why) == (2, "process crash: lighthouse quorum failed")


def test_a_group_that_got_over_it_and_is_lost_later_is_not_lost_by_it() -> None:
    state = training(2)
    tell(state, listening(12.0), said(12.5, "quorum_failed", 1, text="Unavailable"))
    tell(state, membership(13.0, 0, 1), commit(14.0, 0), commit(14.1, 1), membership(20.0, 0))
    assert state.incidents[-1].why == "unknown"


def test_a_group_that_is_late_when_it_is_back() -> None:
    state = training(2)
    tell(state, listening(12.0), membership(13.0, 0), commit(13.5, 0), membership(14.0, 0, 1))
    tell(state, commit(15.0, 1))
    lighthouse, late = state.incidents
    assert lighthouse.recovered_at == 13.5
    assert (late.replica, late.recovered_at) == (1, 15.0)
    assert late.why == "lighthouse lost", "it was not stopped, though it is the same process"


def test_no_storm_and_no_bad_node() -> None:
    state = training(1)
    for t in (20.0, 30.0, 40.0, 50.0):
        tell(state, listening(t), membership(t + 1, 0), commit(t + 2, 0))
    assert len(state.incidents) == 4
    assert judge(Snapshot(state=state, now=60.0)) == []


LINE = "2026-11-20T14:05:{:02d}.000 [INFO] [torchft::lighthouse] - {}\n"


def log(*lines: str) -> bytes:
    return "".join(LINE.format(n, text) for n, text in enumerate(lines)).encode()


def quorum(number: int, *replicas: int) -> str:
    member = (
        'QuorumMember {{ replica_id: "t_{}:u", address: "http://w:1", store_address: "w:2", '
        'step: 3, world_size: 8, shrink_only: false, commit_failures: 0, data: "" }}'
    )
    members = ", ".join(member.format(replica) for replica in replicas)
    return f"Quorum! Quorum {{ quorum_id: {number}, participants: [{members}], created: Some(x) }}"


def events(data: bytes, cut: int = 0) -> list[Event]:
    reader = LighthouseReader("l")
    parts = [data[:cut], data[cut:]] if cut else [data]
    found = [event for part in parts if part for event in reader.read(0, part)]
    return [event for event in found if event.kind != "steps"]


def test_the_last_line_before_a_restart_and_who_had_asked_before() -> None:
    """However it is cut, and also of a log that was set aside meanwhile."""
    data = log(
        "Lighthouse listening on: http://x:1",
        quorum(1, 0, 1),
        quorum(1, 0, 1),
        "Received quorum request for replica t_0:u",
        "Lighthouse listening on: http://x:1",
        "Received quorum request for replica t_0:u",
        quorum(1, 0),
    )
    data = data.replace(b"14:05:06", b"14:09:06").replace(b"14:05:05", b"14:09:05")
    whole = events(data)
    first, again = (event for event in whole if event.kind == "listening")
    assert first.get("last") is None
    assert again.t - again.get("last") == 1.0
    waited = whole[-1].get("waited")
    assert whole[-1].t - waited.since == 1.0, "the request before the restart is not counted"
    state = RunState(2)
    for event in whole:
        state.apply(event)
    assert [i.why for i in state.incidents] == ["lighthouse lost"] * 2, "and no hang is seen in it"
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]

    def plain(found: list[Event]) -> list[Any]:
        return [(event.t, event.kind, event.fields) for event in found]

    for end in ends[:-1]:
        assert plain(events(data, end)) == plain(whole)
    direct = log("Lighthouse listening on: http://x:1", *[quorum(1, 0)] * 3) + log(
        *["x"] * 0, "Lighthouse listening on: http://x:1", quorum(1, 0)
    ).replace(b"14:05", b"14:06")
    assert events(direct)[-2].get("last") == events(direct)[0].t + 3.0


def test_what_is_sent_and_written_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_run: FakeRun
) -> None:
    fake_run.on("squeue", out="")
    monkeypatch.setattr("launcher.scheduler.Slurm", lambda: Slurm(fake_run))
    run = Outputs(tmp_path).run_of_array(5188682)
    shutil.copytree(SCENE, run.path)
    page = publish(run, ReportFormat.HTML).read_text()
    assert '<td class="mark">1</td><td>lighthouse</td>' in page
    text = publish(run, ReportFormat.MARKDOWN).read_text()
    assert "| 1 | lighthouse |  | lighthouse lost |" in text
    got: list[Update] = []

    class Keep:
        name = "keep"

        def deliver(self, update: Update) -> None:
            got.append(update)

        def close(self) -> None:
            pass

    state = training(2)
    delivery = Delivery([Keep()], clock=lambda: state.last_event)
    for event in (listening(12.0), membership(13.0, 0, 1), commit(14.0, 0)):
        delivery.deliver(state, state.apply(event), [], blind=False)
    assert delivery.close() == []
    told = [alarm.text for update in got for alarm in alarms(update)]
    assert told == [
        "the lighthouse LOST at step 11: lighthouse lost; 2 of 2 replica groups are in the quorum",
        "the lighthouse RECOVERED at step 15; 2 of 2 replica groups are in the quorum",
    ]
    titles = [alarm.title for update in got for alarm in alarms(update)]
    assert titles == ["the lighthouse lost", "the lighthouse recovered"]
    (row,) = _table(got[-1].history)
    assert (row["replica"], row["kind"], row["host"]) == (None, "lighthouse_lost", "")
    assert got[-1].causes == {"lighthouse lost": 1}
    assert got[-1].last_recovery is None


def test_who_stands_in_for_the_lighthouse_is_a_finding() -> None:
    state = RunState(group_size=2)
    (notice,) = state.apply(said(10.0, "stand_in", 1, host="worker-1", serves=True, attempt=1))
    assert notice.text == "replica 1 on worker-1 stands in for the lighthouse"
    (finding,) = judge(Snapshot(state=state, now=70.0))
    assert (finding.kind, "for 60 s" in finding.message) == ("lighthouse_stand_in", True)
    assert "lighthouse up --detach" in finding.message
    state.apply(said(80.0, "stand_in", 0, host="worker-0", serves=False, attempt=1))
    assert state.stand_in is not None, "another one's"
    state.apply(said(90.0, "stand_in", 1, host="worker-1", serves=False, attempt=1))
    assert judge(Snapshot(state=state, now=91.0)) == []
