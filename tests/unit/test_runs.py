"""Lists of runs, their end, and their size, with a Slurm that refuses what it does not know."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher import lease, runs
from launcher.lock import acquire
from launcher.model import BlindError, UsageError
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.slurm import Slurm
from launcher.watcher import Watcher
from tests.conftest import FakeRun

LINE = "{job}|50|{task}|{state}|worker-{task}|N/A|None\n"

QUEUED = ("squeue", "--noheader", "--format=%F")


def tasks(*states: str) -> str:
    return "".join(LINE.format(job=50 + n, task=n, state=state) for n, state in enumerate(states))


@pytest.fixture
def elastic(tmp_path: Path) -> RunDir:
    run = Outputs(tmp_path).run_of_array(50)
    run.create(
        Manifest(run="tft-50", array_job_id=50, group_size=4, replicas=2, ranks_per_group=1,
                 config="c.toml", extra_args=("--a", "b c"), lighthouse="http://127.0.0.1:1")
    )  # fmt: skip
    return run


class Remembering:
    """A Slurm whose environment is remembered."""

    def __init__(self, run: FakeRun) -> None:
        self.run = run
        self.env: dict[str, str] = {}

    def __call__(self, env: Mapping[str, str]) -> Slurm:
        self.env = dict(env)
        return Slurm(self.run)


def test_a_run_grows_by_a_job_that_joins_it(elastic: RunDir, fake_run: FakeRun) -> None:
    fake_run.on("squeue", out=tasks("RUNNING", "RUNNING"))
    fake_run.on("sbatch", out="61\n")
    told, slurm_with = list[str](), Remembering(fake_run)
    env = {"HOME": "/h", "TORCHFT_LIGHTHOUSE": "http://elsewhere:1"}
    runs.scale(elastic, 4, Slurm(fake_run), env, say=told.append, slurm_with=slurm_with)
    (call,) = [call for call in fake_run.calls if call[0] == "sbatch"]
    assert "--array=2,3" in call
    assert any(word.startswith("--output=") and word.endswith("/tft-50_%a.out") for word in call)
    assert slurm_with.env["TFT_RUN"] == "tft-50"
    assert slurm_with.env["TFT_EXTRA_ARGS"] == "--a 'b c'"
    assert slurm_with.env["HOME"] == "/h"
    assert "TORCHFT_LIGHTHOUSE" not in slurm_with.env, "the run's own, wherever it is now"
    assert elastic.arrays() == [50, 61]
    assert runs._size(elastic, elastic.manifest()) == 4
    assert told == ["tft-50: job 61 brings replicas 2, 3"]


def test_a_job_that_slurm_refuses_leaves_the_run_as_it_was(
    elastic: RunDir, fake_run: FakeRun
) -> None:
    fake_run.on("squeue", out=tasks("RUNNING", "RUNNING"))
    fake_run.on("sbatch", err="no", code=1)
    with pytest.raises(Exception, match="no"):
        runs.scale(elastic, 3, Slurm(fake_run), {}, say=print, slurm_with=Remembering(fake_run))
    assert runs._size(elastic, elastic.manifest()) == 2
    assert elastic.arrays() == [50]


def test_what_was_submitted_by_us_grows_with_the_same_flags(
    elastic: RunDir, fake_run: FakeRun
) -> None:
    record = {
        "flags": ["--array=0-1", "--export=ALL", "--partition=p", "--dependency=x"],
        "job": ["slurm/replica-group.sbatch", "mine.py", "--its flag"],
        "environment": {"TFT_DEVICE": "cpu", "TORCHFT_LIGHTHOUSE": "http://old:1"},
    }
    elastic.submission.write_text(json.dumps(record))
    fake_run.on("squeue", out=tasks("RUNNING", "RUNNING"))
    fake_run.on("sbatch", out="61\n")
    slurm_with = Remembering(fake_run)
    runs.scale(elastic, 3, Slurm(fake_run), {}, say=lambda line: None, slurm_with=slurm_with)
    (call,) = [call for call in fake_run.calls if call[0] == "sbatch"]
    assert "--partition=p" in call
    assert call[-3:] == ("slurm/replica-group.sbatch", "mine.py", "--its flag")
    assert "--dependency=x" not in call
    assert [word for word in call if word.startswith("--array")] == ["--array=2"]
    assert slurm_with.env == {"TFT_DEVICE": "cpu", "TFT_RUN": "tft-50"}


@pytest.mark.parametrize(
    ("replicas", "states", "words"),
    [
        (5, ("RUNNING",), "can have 1 to 4 replica groups"),
        (3, ("COMPLETED", "CANCELLED"), "has ended: nothing of it is in the queue"),
    ],
)
def test_a_size_that_cannot_be(
    elastic: RunDir, fake_run: FakeRun, replicas: int, states: tuple[str, ...], words: str
) -> None:
    fake_run.on("squeue", out=tasks(*states))
    with pytest.raises(UsageError, match=words):
        runs.scale(elastic, replicas, Slurm(fake_run), {}, say=print)
    assert not elastic.guardian_events.exists()


def test_a_finished_run_is_not_scaled(elastic: RunDir, fake_run: FakeRun) -> None:
    elastic.finished.write_text("{}")
    with pytest.raises(UsageError, match="has finished"):
        runs.scale(elastic, 1, Slurm(fake_run), {}, say=print)


def test_groups_that_are_not_there_are_taken_out_of_the_queue(
    elastic: RunDir, fake_run: FakeRun
) -> None:
    fake_run.on("squeue", out=tasks("RUNNING", "PENDING"))
    fake_run.on("scancel")
    told = list[str]()
    runs.scale(elastic, 1, Slurm(fake_run), {}, say=told.append)
    assert ("scancel", "50_1") in fake_run.calls
    assert ("scancel", "50_0") not in fake_run.calls
    assert told == ["replica 1 was not training; its task is cancelled"]


def test_the_same_size_again_brings_back_what_is_missing(
    elastic: RunDir, fake_run: FakeRun
) -> None:
    fake_run.on("squeue", out=tasks("RUNNING", "CANCELLED"))
    fake_run.on("sbatch", out="61\n")
    told = list[str]()
    runs.scale(elastic, 2, Slurm(fake_run), {}, say=told.append, slurm_with=Remembering(fake_run))
    assert told == ["tft-50: job 61 brings replicas 1"]
    assert not elastic.guardian_events.exists(), "its size is the same"
    joined = "61|61|1|RUNNING|worker-1|N/A|None\n"
    fake_run.on("squeue", out=tasks("RUNNING", "CANCELLED") + joined)
    runs.scale(elastic, 2, Slurm(fake_run), {}, say=told.append)
    assert "has 2 replica groups" in told[-1]


def test_every_job_of_a_run_is_cancelled(elastic: RunDir, fake_run: FakeRun) -> None:
    elastic.join(61)
    live = tasks("RUNNING", "RUNNING") + "61|61|2|RUNNING|worker-2|N/A|None\n"
    answers = iter([live, ""])

    def run(argv: object) -> object:
        answer = fake_run(argv)  # type: ignore[arg-type]
        if argv[0] == "scancel":  # type: ignore[index]
            fake_run.on("squeue", out=live if len(cancelled()) < 2 else "")
        return answer

    def cancelled() -> list[tuple[str, ...]]:
        return [call for call in fake_run.calls if call[0] == "scancel"]

    fake_run.on("squeue", out=next(answers))
    fake_run.on("scancel")
    told = list[str]()
    runs.cancel(elastic, Slurm(run), told.append)  # type: ignore[arg-type]
    assert cancelled() == [("scancel", "50"), ("scancel", "61")]
    assert told == ["run tft-50: cancelled"]


def test_a_list_needs_slurms_word(elastic: RunDir, fake_run: FakeRun) -> None:
    fake_run.on("squeue", err="Unable to contact slurm controller", code=1)
    outputs = Outputs(elastic.path.parent.parent)
    (row,) = runs.listed(outputs, Slurm(fake_run))
    assert row.state == runs.UNSEEN, "which is not the same as ended"
    assert len(fake_run.calls) == 1, "whoever does not answer is not asked again for each run"
    fake_run.on("squeue", out=tasks("RUNNING", "PENDING"))
    fake_run.on(*QUEUED, out="7\n50\n50\n")
    (row,) = runs.listed(outputs, Slurm(fake_run))
    assert (row.run, row.state, row.groups) == ("tft-50", "runs", "0/2")
    fake_run.on(*QUEUED, out="7\n")
    assert list(runs.listed(outputs, Slurm(fake_run))) == []
    (row,) = runs.listed(outputs, Slurm(fake_run), every=True)
    assert row.state == "ended early"


def test_the_task_that_runs_a_group_is_requeued(elastic: RunDir, fake_run: FakeRun) -> None:
    fake_run.on("squeue", out=tasks("RUNNING", "RUNNING", "RUNNING"))
    fake_run.on("scontrol", "requeue")
    runs.requeue(elastic, 1, Slurm(fake_run))
    lease.take(elastic.lease(1), replica=1, task=2, host="w2")  # a spare has taken its place
    runs.requeue(elastic, 1, Slurm(fake_run))
    assert [call[2] for call in fake_run.calls if call[0] == "scontrol"] == ["50_1", "50_2"]
    with pytest.raises(UsageError, match="has replica groups 0 to 3"):
        runs.requeue(elastic, 4, Slurm(fake_run))
    with pytest.raises(UsageError, match="no task that is known any more"):
        runs.requeue(elastic, 3, Slurm(fake_run))


def test_two_at_once_do_not_submit_the_same_tasks(elastic: RunDir, fake_run: FakeRun) -> None:
    fake_run.on("squeue", out=tasks("RUNNING", "RUNNING"))
    held = acquire(elastic.path / ".scale.lock")
    assert held is not None
    with held, pytest.raises(UsageError, match="is being scaled by another command"):
        runs.scale(elastic, 4, Slurm(fake_run), {}, say=print)
    assert not elastic.guardian_events.exists(), "nobody is told of a size that is refused"


def test_who_cannot_be_seen_is_not_cancelled(
    elastic: RunDir, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_run.on("squeue", out=tasks("RUNNING", "RUNNING"))
    monkeypatch.setattr(Watcher, "look", lambda self, final=False: self.blind.update(log="no"))
    with pytest.raises(BlindError, match="cannot be seen: log: no"):
        runs.scale(elastic, 1, Slurm(fake_run), {}, say=print)
    assert not [call for call in fake_run.calls if call[0] == "scancel"]
    assert not elastic.guardian_events.exists()


def test_a_damaged_run_is_a_row_like_any(elastic: RunDir, fake_run: FakeRun) -> None:
    manifest = json.loads(elastic.manifest_path.read_text())
    elastic.manifest_path.write_text(json.dumps({**manifest, "cluster": "moon"}))
    fake_run.on("squeue", out=tasks("RUNNING"))
    fake_run.on(*QUEUED, out="50\n")
    (row,) = runs.listed(Outputs(elastic.path.parent.parent), Slurm(fake_run))
    assert row.run == "tft-50"
    elastic.manifest_path.write_text(json.dumps({**manifest, "group_size": "2"}))
    (row,) = runs.listed(Outputs(elastic.path.parent.parent), Slurm(fake_run))
    assert row.state.startswith(("damaged", "runs"))
