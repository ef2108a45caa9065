"""Nodes that Slurm cannot reach, as the cause of a loss."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher import watcher as watcher_module
from launcher.events import Event
from launcher.model import GroupState
from launcher.rundir import Outputs, RunDir
from launcher.slurm import Node, Slurm
from launcher.state import RunState
from launcher.watcher import Watcher
from tests.conftest import FIXTURES, FakeRun, apply_all

DOWN = Node(name="worker-1", state="down*", reason="Not responding")
UP = Node(name="worker-1", state="mix", reason="none")


def membership(t: float, *replicas: int) -> Event:
    members = [(replica, f"uuid-{replica}", 10, "x") for replica in replicas]
    return Event(t=t, kind="membership", fields={"quorum_id": int(t), "members": members})


def said(t: float, kind: str, replica: int = 1, **fields: Any) -> Event:
    return Event(t=t, kind=kind, replica=replica, fields=fields)


def cancelled(t: float, due: str | None) -> Event:
    """As slurmstepd on the node prints it into the log of the copy there."""
    return said(t, "slurm_cancelled", host="worker-1", due=due)


def lost(*before: Event) -> RunState:
    """Two groups train, and at 100 s the second is gone."""
    state = RunState(2)
    for replica in (0, 1):
        state.apply(said(1.0, "launch", replica, attempt=1, host=f"worker-{replica}"))
    state.apply(membership(2.0, 0, 1))
    for event in before:
        state.apply(event)
    state.apply(membership(100.0, 0))
    return state


@pytest.mark.parametrize("state", ["down*", "mix*", "idle*", "alloc*", "drain*"])
def test_a_star_is_a_node_that_does_not_respond(state: str) -> None:
    assert not Node(name="w", state=state, reason="").responds
    assert Node(name="w", state=state.removesuffix("*"), reason="").responds


def test_the_node_of_a_lost_group_does_not_respond() -> None:
    state = lost()
    assert apply_all(state, state.observe_nodes([UP], 101.0)) == []
    (notice,) = apply_all(
        state, state.observe_nodes([Node(name="worker-1", state="mix*", reason="")], 103.0)
    )
    assert notice.text == "node worker-1 of replica 1 does not respond (Slurm: mix*)"
    assert apply_all(state, state.observe_nodes([DOWN], 105.0)) == [], "told once"
    (incident,) = state.incidents
    assert (incident.why, incident.first_sign) == ("node unreachable", 100.0)
    assert [sign.text for sign in incident.evidence] == ["Slurm: node worker-1 does not respond"]


def test_a_node_of_nobody_who_is_lost_is_no_sign() -> None:
    state = RunState(2)
    state.apply(said(1.0, "launch", attempt=1, host="worker-1"))
    state.apply(membership(2.0, 0, 1))
    assert apply_all(state, state.observe_nodes([DOWN], 3.0)) == []
    assert state.incidents == []


def test_what_the_old_copy_prints_when_the_network_heals_is_a_consequence() -> None:
    for due in ("NODE FAILURE", "JOB REQUEUE", None):
        state = lost()
        apply_all(state, state.observe_nodes([DOWN], 130.0))
        state.apply(said(150.0, "launch", attempt=2, host="worker-2"))
        state.apply(cancelled(200.0, due))
        told = state.apply(said(201.0, "exit", attempt=1, host="worker-1", code=143, reason="TERM"))
        assert [n.text for n in told] == [
            "the copy of replica 1 before (attempt 1) ended on worker-1: TERM"
        ]
        (incident,) = state.incidents
        assert incident.why == "node unreachable", due
        group = state.groups[1]
        assert (group.state, group.attempt, group.signs) == (GroupState.STARTING, 2, [])


def test_a_node_that_could_say_it_first_went_down() -> None:
    for before in (True, False):  # printed before the quorum noticed, or after it
        line = cancelled(99.0 if before else 101.0, "NODE FAILURE")
        state = lost(line) if before else lost()
        state.apply(line)
        resumed = Node(name="worker-1", state="idle*", reason="")  # it has not registered yet
        assert apply_all(state, state.observe_nodes([resumed, DOWN], 160.0)) == []
        (incident,) = state.incidents
        assert incident.why == "node down"
        assert len(incident.evidence) == 1


@pytest.mark.parametrize(
    ("reason", "cause"),
    [("rank 0 was killed by SIGKILL", "process crash: "), ("stopped by SIGTERM", "unknown: ")],
)
def test_a_node_that_could_tell_and_falls_silent_later_is_no_cause(reason: str, cause: str) -> None:
    state = lost(said(99.0, "exit", attempt=1, host="worker-1", code=1, reason=reason))
    assert apply_all(state, state.observe_nodes([DOWN], 900.0)) == []
    assert state.incidents[0].why == cause + reason


def test_errors_of_a_copy_that_was_cut_off_are_not_the_cause() -> None:
    state = lost(said(98.0, "exception", text="RuntimeError: Connection reset by peer"))
    apply_all(state, state.observe_nodes([DOWN], 104.0))
    assert state.incidents[0].why == "node unreachable"


def test_after_a_recovery_nothing_is_added() -> None:
    state = lost()
    state.apply(said(150.0, "launch", attempt=2, host="worker-2"))
    state.apply(membership(160.0, 0, 1))
    state.apply(said(161.0, "commit", step=20, committed=True, rank=0, attempt=2))
    assert state.incidents[0].recovered_at == 161.0
    assert apply_all(state, state.observe_nodes([DOWN], 170.0)) == []


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = Outputs(tmp_path).run_of_array(5183502)
    shutil.copytree(FIXTURES / "node-down", run.path)
    return run


def test_the_watcher_asks_for_nodes_more_often_while_a_group_is_lost(
    run: RunDir, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watcher_module, "ASK_EVERY", 0.0)
    fake_run.on("squeue", out="1|1|0|RUNNING|w|2026-11-20T15:00:00|None\n")

    def asked() -> int:
        return sum(call[0] == "sinfo" for call in fake_run.calls)

    lines = run.events(1).read_text().splitlines(keepends=True)
    gone = next(i for i, text in enumerate(lines) if '"exit"' in text)
    run.events(1).write_text("".join(lines[:-1]))  # all but the last: not finished, none lost
    with Watcher.of_run(run, Slurm(fake_run)) as watcher:
        for _ in range(4):
            watcher.look(final=True)
        assert asked() == 1
    fake_run.calls.clear()
    run.events(1).write_text("".join(lines[:gone]))
    log = run.lighthouse_log.read_bytes()
    third = log.index(b"Quorum! Quorum { quorum_id: 3,")
    run.lighthouse_log.write_bytes(log[: log.rindex(b"\n", 0, third) + 1])
    with Watcher.of_run(run, Slurm(fake_run)) as watcher:
        told = [notice.text for _ in range(4) for notice in watcher.look(final=True)]
        assert asked() == 4
        assert watcher.state.incidents[0].why == "node unreachable"
    assert told.count("node worker-1 of replica 1 does not respond (Slurm: down*)") == 1


def test_of_several_nodes_the_silent_one_is_named() -> None:
    state = RunState(2, nodes_per_group=2)
    names = ["worker-7", "worker-1"]
    (launched,) = state.apply(said(1.0, "launch", attempt=1, host=names[0], nodes=names))
    assert launched.text == "replica 1 launched (attempt 1) on worker-7, worker-1"
    group = state.groups[1]
    assert (group.host, group.nodes, group.where) == ("worker-7", tuple(names), "worker-7 +1")
    state.apply(membership(2.0, 0, 1))
    state.apply(membership(100.0, 0))
    (incident,) = state.incidents
    assert (incident.host, incident.where) == ("", "worker-7, worker-1")
    silent = Node(name="worker-1", state="mix*", reason="")
    (notice,) = apply_all(
        state, state.observe_nodes([Node(name="worker-7", state="mix", reason=""), silent], 103.0)
    )
    assert notice.text == "node worker-1 of replica 1 does not respond (Slurm: mix*)"
    assert (incident.host, incident.why) == ("worker-1", "node unreachable")
