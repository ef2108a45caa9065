"""A run from Python: submitit jobs whose state is Slurm's word and whose result is the run's."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import submitit

from launcher import jobs, lease
from launcher.jobs import GroupJob, Run, outcome
from launcher.model import BlindError, UsageError
from launcher.rundir import RunDir
from launcher.slurm import Slurm
from tests.conftest import REPOSITORY, FakeRun

LINE = "{job}|50|{task}|{state}|worker-{task}|N/A|None\n"


def answer(fake_run: FakeRun, *states: str) -> None:
    lines = (LINE.format(job=50 + n, task=n, state=state) for n, state in enumerate(states))
    fake_run.on("squeue", out="".join(lines))


def say(run: RunDir, replica: int, *events: dict[str, object]) -> None:
    with run.events(replica).open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


@pytest.fixture
def two(run: RunDir, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(jobs, "ASK_EVERY", 0.0)
    answer(fake_run, "RUNNING", "PENDING")
    return Run(run, Slurm(fake_run))


def test_each_group_is_a_submitit_job(two: Run, run: RunDir) -> None:
    first, second = two.jobs
    assert isinstance(first, submitit.Job)
    assert (first.job_id, first.state, first.done()) == ("50_0", "RUNNING", False)
    assert (second.job_id, second.state, second.done()) == ("50_1", "PENDING", False)
    run.log(1, "out").write_text("hello\n")
    assert (first.stdout(), second.stdout()) == (None, "hello\n")
    assert 'state="PENDING"' in repr(second)


def test_a_job_is_done_when_slurm_says_so_and_its_result_is_the_runs(
    two: Run, run: RunDir, fake_run: FakeRun
) -> None:
    first, second = two.jobs
    answer(fake_run, "COMPLETED", "CANCELLED")
    say(run, 0, {"kind": "launch", "attempt": 1}, {"kind": "exit", "code": 75, "reason": "x"},
        {"kind": "launch", "attempt": 2},
        {"kind": "commit", "committed": True, "step": 6, "rank": 0},
        {"kind": "exit", "code": 0, "reason": "finished", "attempt": 2})  # fmt: skip
    found = first.result()
    assert (found.code, found.reason, found.attempts, found.step) == (0, "finished", 2, 7)
    assert first.exception() is None
    say(run, 1, {"kind": "launch", "attempt": 1}, {"kind": "exit", "code": 143, "reason": "TERM"})
    with pytest.raises(submitit.core.utils.FailedJobError, match="TERM"):
        second.result()
    assert not two.wait(timeout=1), "nobody has written that the run has finished"


def test_what_is_requeued_is_the_same_job(
    two: Run, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = two.jobs[0]
    answer(fake_run, "FAILED", "RUNNING")
    assert not job.done(), "the guardian may requeue it"
    answer(fake_run, "PENDING", "RUNNING")
    assert not job.done()
    monkeypatch.setattr(jobs, "FAILED_SECONDS", -1.0)
    answer(fake_run, "FAILED", "RUNNING")
    assert job.done()


def test_a_slurm_that_cannot_be_asked_is_no_state(two: Run, fake_run: FakeRun) -> None:
    job = two.jobs[0]
    fake_run.on("squeue", err="Unable to contact slurm controller", code=1)
    with pytest.raises(BlindError):
        job.done()


def test_what_slurm_has_forgotten_has_ended(two: Run, fake_run: FakeRun) -> None:
    job = two.jobs[0]
    assert not job.done()
    fake_run.on("squeue", err="slurm_load_jobs error: Invalid job id specified", code=1)
    assert job.done()
    with pytest.raises(submitit.core.utils.UncompletedJobError, match="without a word of its own"):
        job.result()


def test_a_run_that_slurm_had_forgotten_before_anybody_asked(
    run: RunDir, fake_run: FakeRun
) -> None:
    fake_run.on("squeue", err="slurm_load_jobs error: Invalid job id specified", code=1)
    say(run, 1, {"kind": "launch", "attempt": 1}, {"kind": "exit", "code": 0, "reason": "finished"})
    late = Run(run, Slurm(fake_run))
    assert [job.job_id for job in late.jobs] == ["50_0", "50_1"]
    assert all(job.done() for job in late.jobs)
    assert late.jobs[1].result().reason == "finished"


def test_a_spare_that_was_not_needed_has_no_outcome(
    two: Run, run: RunDir, fake_run: FakeRun
) -> None:
    lines = "".join(LINE.format(job=50 + n, task=n, state="COMPLETED") for n in range(3))
    fake_run.on("squeue", out=lines)
    spare = two.jobs[2]
    assert spare.replica is None
    assert spare.result() is None
    lease.take(run.lease(1), replica=1, task=2, host="w2")
    assert spare.replica == 1


def test_one_task_is_cancelled_and_no_other(two: Run, fake_run: FakeRun) -> None:
    fake_run.on("scancel")
    two.jobs[1].cancel()
    assert [call for call in fake_run.calls if call[0] == "scancel"] == [("scancel", "50_1")]


def test_a_group_is_preempted_as_submitit_does_it(two: Run, fake_run: FakeRun) -> None:
    fake_run.on("scontrol", "requeue")
    two.jobs[1]._interrupt()
    assert [call for call in fake_run.calls if call[0] == "scontrol"] == [
        ("scontrol", "requeue", "50_1")
    ]
    with pytest.raises(UsageError, match="drill time-limit"):
        two.jobs[1]._interrupt(timeout=True)
    with pytest.raises(UsageError, match=r"no pickled function: see .*run\.json"):
        two.jobs[1].submission()


def test_jobs_can_be_kept(two: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    job = GroupJob(two._run, Slurm(), two._watcher, "50_1")
    two._watcher._slurm = Slurm()
    again = pickle.loads(pickle.dumps(job))
    assert (again.job_id, again.replica, again.paths.stdout) == ("50_1", 1, job.paths.stdout)


def test_waiting_has_an_end(two: Run) -> None:
    with pytest.raises(TimeoutError, match="still runs after 0"):
        two.wait(timeout=0)


def test_an_attempt_that_runs_has_no_outcome(tmp_path: Path) -> None:
    assert outcome(tmp_path / "none", 0) is None
    lines = [{"kind": "launch", "attempt": 1}, {"kind": "exit", "code": 1, "attempt": 1},
             {"kind": "launch", "attempt": 2}, "torn"]  # fmt: skip
    path = tmp_path / "e"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "ex')
    assert outcome(path, 0) is None


def test_only_clusters_that_there_are() -> None:
    with pytest.raises(UsageError, match="cluster must be"):
        jobs.submit(cluster="moon")


def test_the_package_gives_submit_and_pays_for_it_only_then() -> None:
    code = (
        "import sys, launcher, launcher.cli\nassert 'submitit' not in sys.modules\n"
        "from launcher import submit, find\nassert 'torch' not in sys.modules\n"
        "assert submit.__module__ == 'launcher.jobs'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, timeout=60, check=True)
