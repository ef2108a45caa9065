"""What cannot be read is never "nothing there": logs that are gone, a Slurm that does not answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import monitor, sources
from launcher.model import BlindError, GroupState
from launcher.rundir import Outputs, RunDir
from launcher.slurm import Slurm
from launcher.watcher import Watcher
from launcher.witness import Witness
from tests.conftest import FIXTURES, FakeRun
from tests.unit.conftest import MANIFEST

RUNNING = "1|1|0|RUNNING|w|2026-11-20T15:00:00|None\n"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = Outputs(tmp_path).run_of_array(5183502)
    shutil.copytree(FIXTURES / "node-down", run.path)
    return run


def cut_short(run: RunDir) -> None:
    lines = run.events(1).read_text().splitlines(keepends=True)
    run.events(1).write_text("".join(lines[:-8]))


def owned_lighthouse(run: RunDir) -> None:
    values = json.loads(run.manifest_path.read_text())
    run.manifest_path.write_text(json.dumps({**values, "lighthouse_name": "host-29510"}))


def leased(run: RunDir) -> None:
    run.groups.mkdir()
    run.lease(1).write_text("{}")


@pytest.mark.parametrize(
    ("spoil", "named", "said"),
    [
        (lambda run: run.lighthouse_log.unlink(), "lighthouse.log", "have met in a quorum"),
        (lambda run: run.events(1).unlink(), "_1.events.jsonl", "1.lease.json says"),
        (lambda run: run.lighthouse_log.chmod(0), "", ""),  # (root may read it)
    ],
)
def test_a_log_that_was_promised_is_missed(
    run: RunDir, fake_run: FakeRun, spoil: Callable[[RunDir], None], named: str, said: str
) -> None:
    fake_run.on("squeue", out=RUNNING)
    owned_lighthouse(run)
    leased(run)
    cut_short(run)
    spoil(run)
    with Watcher.of_run(run, Slurm(fake_run)) as watcher:
        code = monitor.once(watcher, say=lambda text: None, as_json=False)
        told = [f.message for f in watcher.findings() if f.kind == "monitor_blind"]
    assert (code == BlindError.exit_code) is bool(named)
    assert [named in text and said in text for text in told] == ([True] if named else [])


def test_a_log_that_was_read_and_is_gone_is_missed_after_a_while(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at once: a log that is rotated is not there for a moment."""
    cut_short(run)
    with Watcher.of_run(run) as watcher:
        watcher.look()
        run.lighthouse_log.rename(run.path / "elsewhere")
        watcher.look()
        assert not watcher.blind
        monkeypatch.setattr(sources, "MISSING_SECONDS", 0.0)
        watcher.look()
        assert watcher.blind == {str(run.lighthouse_log): "it is gone: it was read before"}
        (run.path / "elsewhere").rename(run.lighthouse_log)
        watcher.look()
        assert not watcher.blind
        shutil.rmtree(run.path)
        watcher.look()
        assert watcher.blind == {str(run.path): "the run's folder is gone"}


def test_nodes_that_cannot_be_asked_about_are_a_blind_spot(run: RunDir, fake_run: FakeRun) -> None:
    cut_short(run)
    fake_run.on("squeue", out=RUNNING)
    fake_run.on("sinfo", code=1, err="slurm_load_node: Unable to contact slurm controller")
    with Watcher.of_run(run, Slurm(fake_run)) as watcher:
        watcher.look(final=True)
    assert "its nodes: " in watcher.blind["Slurm"]


def test_a_run_that_has_finished_with_a_log_unread_is_not_called_fine(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Watcher.of_run(run) as watcher:
        watcher.look(final=True)
        assert watcher.state.finished
        monitor.conclude(watcher, run)
        watcher.blind = {"lighthouse.log": "Permission denied"}
        with pytest.raises(BlindError, match=r"lighthouse\.log: Permission denied"):
            monitor.conclude(watcher, run)


def test_before_a_run_has_started_a_silent_slurm_is_asked_again(
    tmp_path: Path, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Outputs(tmp_path).run_of_array(5)
    said: list[str] = []
    fake_run.on("squeue", code=1, err="Unable to contact slurm controller")
    monkeypatch.setattr("time.sleep", lambda seconds: run.create(MANIFEST))
    monitor.await_start(run, say=said.append, slurm=Slurm(fake_run))
    assert "Slurm cannot be asked" in said[0]
    run.manifest_path.unlink()
    monkeypatch.setattr(monitor, "BLIND_SECONDS", -1.0)
    with pytest.raises(BlindError):
        monitor.await_start(run, say=said.append, slurm=Slurm(fake_run))


def test_the_newest_run_that_lives_comes_before_a_newer_one_that_ended(
    tmp_path: Path, fake_run: FakeRun
) -> None:
    outputs = Outputs(tmp_path)
    for number in (5, 6, 7):
        run = outputs.run_of_array(number)
        run.create(replace(MANIFEST, run=run.name, array_job_id=number, created=float(number)))
    fake_run.on("squeue", "--me", out="")
    fake_run.on("squeue", "--noheader", out="5\n6\n99\n")
    assert monitor.choose(outputs, None, Slurm(fake_run)).name == "tft-6"
    fake_run.on("squeue", "--noheader", out="99\n")
    assert monitor.choose(outputs, None, Slurm(fake_run)).name == "tft-7"


# -- what Slurm said is recorded -------------------------------------------------------------


def test_what_slurm_said_is_part_of_the_story_later(run: RunDir, fake_run: FakeRun) -> None:
    """Of a group that waited in the queue, with a monitor that was there only then."""
    whole = run.events(1).read_text().splitlines(keepends=True)
    gone = next(i for i, text in enumerate(whole) if '"exit"' in text)
    run.events(1).write_text("".join(whole[:gone]))
    log = run.lighthouse_log.read_bytes()
    third = log.index(b"Quorum! Quorum { quorum_id: 3,")
    run.lighthouse_log.write_bytes(log[: log.rindex(b"\n", 0, third) + 1])
    fake_run.on("squeue", out="1|1|1|PENDING||2026-11-20T14:09:00|BeginTime\n")
    with Watcher.of_run(run, Slurm(fake_run)) as watcher:
        watcher.witness = Witness(run)
        watcher.look(final=True)
        # Somebody else sees the same, and leaves the record to the first.
        with Watcher.of_run(run, Slurm(fake_run)) as other:
            other.witness = Witness(run)
            other.look(final=True)
            other.look(final=True)
    kinds = [json.loads(line)["kind"] for line in run.observed.read_text().splitlines()]
    assert sorted(kinds) == ["node", "queued"]
    with Watcher.of_run(run) as later:
        told = [notice.text for notice in later.look(final=True)]
        (incident,) = later.state.incidents
        assert incident.requeued_at is not None
        assert incident.why == "node unreachable"
        assert later.state.groups[1].state is GroupState.REQUEUED
    assert "replica 1 requeued by Slurm, waiting (BeginTime)" in told
    assert other.state.incidents == watcher.state.incidents == later.state.incidents


def test_where_nothing_can_be_written_each_monitor_sees_for_itself(
    run: RunDir, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_short(run)
    fake_run.on("squeue", out="1|1|1|PENDING||2026-11-20T14:09:00|BeginTime\n")
    run.observed.mkdir()  # (root may write anywhere else)
    with Watcher.of_run(run, Slurm(fake_run)) as watcher:
        watcher.witness = Witness(run)
        told = [notice.text for notice in watcher.look(final=True)]
    assert "replica 1 requeued by Slurm, waiting (BeginTime)" in told


def test_a_folder_or_a_manifest_that_cannot_be_read_is_not_an_absent_one(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.manifest_path.unlink()
    run.manifest_path.mkdir()  # (to root, everything else can be read)
    with pytest.raises(BlindError, match=r"run\.json cannot be read: Is a directory"):
        run.manifest()

    def refused(path: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.listdir", refused)
    with pytest.raises(BlindError, match="torchft cannot be read: Permission denied"):
        Outputs(run.path.parent.parent).find(None)


@pytest.mark.parametrize("recorded_by", ["us", "another"])
def test_who_acts_knows_at_once_what_slurm_said(
    run: RunDir, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch, recorded_by: str
) -> None:
    """Else the guardian would start a requeued task while its old copy still ends."""
    cut_short(run)
    fake_run.on("squeue", out="1|1|1|PENDING||2026-11-20T14:09:00|BeginTime\n")
    monkeypatch.setattr("launcher.watcher.ASK_EVERY", 0.0)
    other = Witness(run)
    if recorded_by == "another":
        assert other.record([])
    with Watcher.of_run(run, Slurm(fake_run)) as watcher:
        watcher.eager, watcher.witness = True, Witness(run)
        watcher.look()  # asks
        while not watcher.jobs:
            watcher.look()
        assert watcher.state.groups[1].state is GroupState.REQUEUED
    other.close()
