"""Job scripts on a real Slurm: the classic job, a killed rank, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from launcher.rundir import Outputs
from launcher.sandbox import Sandbox
from launcher.watcher import Watcher
from tests.e2e.conftest import Workspace, eventually

pytestmark = pytest.mark.slurm
SCRIPT = "llama3.1-8b-pretraining-torchft.sh"


@pytest.fixture
def lighthouse(cluster: Workspace) -> Iterator[None]:
    cluster.launcher("lighthouse", "up", "--detach", "--port", "29613")
    yield
    cluster.launcher("lighthouse", "down", "--port", "29613")


def final_state(sandbox: Sandbox, job: int, task: int | None = None) -> str:
    jobs = [j for j in sandbox.slurm().jobs(job) if task is None or j.task == task]
    return jobs[0].state if jobs and not any(j.live for j in jobs) else ""


@pytest.mark.timeout(180)
def test_the_classic_job_trains_over_two_nodes(cluster: Workspace, sandbox: Sandbox) -> None:
    job = int(
        cluster.having({"TFT_EXTRA_ARGS": "--training.steps 5"}).sh(
            "sbatch", "--parsable", "-N", "2", "llama3.1-8b-pretraining.sh"
        )
    )
    eventually(lambda: final_state(sandbox, job), 120, "the classic job ends")
    folder = cluster.root / "outputs" / "classic" / str(job)
    log = (folder / f"classic-{job}.out").read_text()
    assert final_state(sandbox, job) == "COMPLETED", (folder / f"classic-{job}.err").read_text()
    assert "launching node 0 of 2 on worker-" in log
    assert "launching node 1 of 2 on worker-" in log
    assert "step:  5" in log
    assert "dp_shard=4" in log


@pytest.mark.timeout(180)
@pytest.mark.usefixtures("lighthouse")
def test_one_rank_a_group_stays_identical_and_a_killed_rank_is_never_silent(
    cluster: Workspace, sandbox: Sandbox
) -> None:
    """Shard degree 1: without the gradient hook the groups would drift apart at once."""
    cluster = cluster.having(
        {
            "TFT_RANKS_PER_NODE": "1",
            "TFT_EXTRA_ARGS": "--training.steps 5000",
            "TFT_NODE_ADDRESS": "",
            "TFT_RESTARTS": "0",
            "TFT_REQUEUES": "0",
        }
    )
    job = int(cluster.sh("sbatch", "--parsable", "--array=0-1", SCRIPT))
    run = cluster.outputs.run_of_array(job)
    eventually(run.manifest_path.is_file, 30, "the run starts")
    try:
        with Watcher.of_run(run) as watcher:

            def steps(replica: int) -> int:
                watcher.look()
                return watcher.state.groups[replica].step

            eventually(lambda: min(steps(0), steps(1)) >= 8, 90, "both groups train")
            # A second run on the same lighthouse is refused while the first lives.
            other = int(cluster.sh("sbatch", "--parsable", "--array=0-0", SCRIPT))
            eventually(lambda: final_state(sandbox, other), 30, "the second run is refused")
            refused = cluster.outputs.run_of_array(other).log(0, "err").read_text()
            assert final_state(sandbox, other) == "FAILED"
            assert f"already serves run tft-{job}" in refused
            # Also one of another clone, which knows nothing of our files: by our heartbeats.
            settings = {"TFT_OUTPUTS": "elsewhere", "TORCHFT_LIGHTHOUSE": "http://127.0.0.1:29613"}
            stranger = int(
                cluster.having(settings).sh("sbatch", "--parsable", "--array=0-0", SCRIPT)
            )
            eventually(lambda: final_state(sandbox, stranger), 30, "the stranger is refused")
            elsewhere = Outputs(cluster.root / "elsewhere").run_of_array(stranger)
            assert "torchtitan_ft_1 send heartbeats" in elsewhere.log(0, "err").read_text()

            told = map(json.loads, run.events(1).read_text().splitlines())
            pid = next(event["pid"] for event in told if event["kind"] == "start")
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: final_state(sandbox, job, task=1), 30, "the killed task ends")
            alone = steps(0)
            eventually(lambda: steps(0) > alone + 3, 30, "the survivor trains on")
            assert watcher.state.groups[0].failed_commits <= 1
            (incident,) = watcher.state.incidents
            assert incident.why == f"process crash: rank 0 (pid {pid}) was killed by SIGKILL"
            weights = watcher.state.weights
    finally:
        sandbox.slurm().cancel(job)
    assert final_state(sandbox, job, task=1) == "FAILED"
    why = run.log(1, "err").read_text().splitlines()[-2]
    assert (
        f"replica 1 (attempt 1) on worker-1 failed: rank 0 (pid {pid}) was killed by SIGKILL" in why
    )
    assert weights.compared >= 8
    assert not weights.differences
    eventually(lambda: final_state(sandbox, job, task=0), 30, "the cancelled task ends")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"TFT_ENV": "/nonexistent"},
            "error: no virtual environment at /nonexistent: run 'make setup'",
        ),
        (
            {"TFT_CONFIG": "configs/no such.toml"},
            "error: config file configs/no such.toml does not",
        ),
        (
            {"TORCHFT_LIGHTHOUSE": "http://127.0.0.1:9"},
            "error: the lighthouse http://127.0.0.1:9 can",
        ),
    ],
)
def test_what_is_missing_ends_the_task_with_one_line(
    cluster: Workspace, sandbox: Sandbox, settings: dict[str, str], says: str
) -> None:
    job = int(cluster.having(settings).sh("sbatch", "--parsable", "--array=0-0", SCRIPT))
    eventually(lambda: final_state(sandbox, job), 30, "the task ends")
    assert final_state(sandbox, job) == "FAILED"
    (line,) = cluster.outputs.run_of_array(job).log(0, "err").read_text().splitlines()
    assert says in line


def test_outside_an_array_the_script_says_how_to_submit(
    cluster: Workspace, sandbox: Sandbox
) -> None:
    job = int(cluster.sh("sbatch", "--parsable", SCRIPT))
    eventually(lambda: final_state(sandbox, job), 30, "the task ends")
    assert final_state(sandbox, job) == "FAILED"
    (log,) = (cluster.root / "outputs" / "torchft" / ".slurm").glob(f"tft-{job}_*.err")
    assert "sbatch --array=0-3" in log.read_text()
