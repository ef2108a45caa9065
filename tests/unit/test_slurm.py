import pytest

from launcher.model import BlindError
from launcher.process import run
from launcher.slurm import Job, Slurm, SlurmError
from tests.conftest import FakeRun

SQUEUE = ("squeue", "--noheader", "--array", "--states=all")


def test_array_tasks_are_parsed(fake_run: FakeRun) -> None:
    fake_run.on(
        *SQUEUE,
        out="51|50|0|RUNNING|worker-0|2026-11-20T15:00:00|None\n50|50|1|PENDING||2026-11-20T15:00:00|BeginTime\n7|7|N/A|FAILED|w|2026-11-20T15:00:00|x|y\n",
    )
    jobs = Slurm(fake_run).jobs(50)
    assert jobs[0] == Job(
        job_id=51,
        array_job_id=50,
        task=0,
        state="RUNNING",
        node="worker-0",
        reason="None",
        start="2026-11-20T15:00:00",
    )
    assert jobs[1].task == 1
    assert jobs[1].reason == "BeginTime"
    assert jobs[1].live
    assert jobs[2].task is None
    assert jobs[2].reason == "x|y"
    assert not jobs[2].live


def test_a_job_the_controller_does_not_know_is_no_job(fake_run: FakeRun) -> None:
    fake_run.on("squeue", code=1, err="slurm_load_jobs error: Invalid job id specified\n")
    assert Slurm(fake_run).jobs(50) == []


@pytest.mark.parametrize(
    "said",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "slurm_load_jobs error: Socket timed out on send/recv operation",
        "",
    ],
)
def test_a_scheduler_that_cannot_be_asked_is_never_no_jobs(fake_run: FakeRun, said: str) -> None:
    fake_run.on("squeue", code=1, err=said)
    with pytest.raises(BlindError, match="squeue could not be asked"):
        Slurm(fake_run).jobs(50)


def test_a_line_that_is_not_understood_is_not_skipped(fake_run: FakeRun) -> None:
    fake_run.on("squeue", out="some new format\n")
    with pytest.raises(BlindError, match="not understood"):
        Slurm(fake_run).jobs(50)


def test_nodes(fake_run: FakeRun) -> None:
    fake_run.on(
        "sinfo", out="w-0|idle|none\nw-0|idle|none\nw-1|down*|Not responding\nw-2|mix|none\n"
    )
    nodes = {node.name: node for node in Slurm(fake_run).nodes()}
    assert [nodes[name].up for name in ("w-0", "w-1", "w-2")] == [True, False, True]
    assert nodes["w-1"].reason == "Not responding"


def test_submit_takes_the_id_and_refuses_anything_else(fake_run: FakeRun) -> None:
    fake_run.on("sbatch", "--parsable", out="123;cluster\n")
    assert Slurm(fake_run).submit(["--array=0-1"], "job.sh") == 123
    fake_run.on("sbatch", out="queued!\n")
    with pytest.raises(SlurmError, match="queued!"):
        Slurm(fake_run).submit([], "job.sh")


def test_a_refusal_carries_slurms_words(fake_run: FakeRun) -> None:
    fake_run.on("scontrol", code=1, err="slurm_update error: Invalid node name specified")
    with pytest.raises(SlurmError, match="Invalid node name"):
        Slurm(fake_run).set_node_state("nope", "DOWN", "drill")


def test_node_address(fake_run: FakeRun) -> None:
    fake_run.on("scontrol", out="NodeName=w-0 Arch=x86_64 NodeAddr=10.0.0.7 NodeHostName=w-0\n")
    assert Slurm(fake_run).node_address("w-0") == "10.0.0.7"


def test_a_command_that_is_missing_or_hangs_is_blindness() -> None:
    with pytest.raises(BlindError, match="not on this machine's PATH"):
        run(["no-such-command-at-all"])
    with pytest.raises(BlindError, match="did not answer within"):
        run(["sleep", "5"], timeout=0.1)


def test_only_a_task_of_an_array_is_released(fake_run: FakeRun) -> None:
    fake_run.on("scontrol", "release", "60_1")
    Slurm(fake_run).release("60_1")
    with pytest.raises(ValueError, match="not an array task"):
        Slurm(fake_run).release("60")


def test_what_a_drill_asks_before_it_acts(fake_run: FakeRun) -> None:
    fake_run.on("squeue", "--noheader", "--nodelist=w-0", out="60\n60\n71\n")
    assert Slurm(fake_run).arrays_on("w-0") == [60, 71]
    fake_run.on("scontrol", out="JobId=61 ArrayJobId=60 TimeLimit=1-00:00:00 TimeMin=N/A\n")
    assert Slurm(fake_run).time_limit("60_1") == "1-00:00:00"
    fake_run.on("squeue", code=1, err="slurm_load_jobs error: Unable to contact slurm controller")
    with pytest.raises(BlindError):
        Slurm(fake_run).arrays_on("w-0")
