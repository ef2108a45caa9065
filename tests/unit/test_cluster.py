"""What Slurm shows of a cluster, as it was recorded in the sandbox and in other versions' shapes."""

from __future__ import annotations

import pytest

from launcher import cluster
from launcher.model import BlindError
from launcher.slurm import Slurm, SlurmError
from tests.conftest import FIXTURES, FakeRun

CONFIG = (FIXTURES / "slurm-config.txt").read_text()
PARTITIONS = (FIXTURES / "slurm-partitions.txt").read_text()


def test_a_recorded_configuration(fake_run: FakeRun) -> None:
    fake_run.on("scontrol", "show", "config", out=CONFIG)
    config = Slurm(fake_run).config()
    assert config["SLURM_VERSION"] == "22.05.8"
    assert config["KillWait"] == "5 sec"
    assert cluster.option(config["AuthInfo"], "cred_expire") == "5"
    assert cluster.option(config["AuthInfo"], "ttl") is None
    assert "MaxBatchRequeue" not in config  # newer versions show it


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("30 sec", 30),
        ("5 min", 300),
        ("2000 usec", 0.002),
        ("7", 7),
        ("INFINITE", None),
        ("", None),
    ],
)
def test_durations(value: str, seconds: float | None) -> None:
    assert cluster.seconds(value) == (None if seconds is None else pytest.approx(seconds))


def test_a_configuration_that_is_none_is_blindness(fake_run: FakeRun) -> None:
    fake_run.on("scontrol", "show", "config", out="something = else\n")
    with pytest.raises(BlindError, match="no configuration"):
        Slurm(fake_run).config()
    fake_run.on(
        "scontrol", code=1, err="slurm_load_ctl_conf error: Unable to contact slurm controller"
    )
    with pytest.raises(BlindError):
        Slurm(fake_run).config()


def test_recorded_partitions(fake_run: FakeRun) -> None:
    fake_run.on("scontrol", "--oneliner", "show", "partition", out=PARTITIONS)
    main, urgent = Slurm(fake_run).partitions()
    assert (main.name, main.default, main.state, main.max_time) == ("main", True, "UP", "UNLIMITED")
    assert not urgent.default
    assert main.settings["PreemptMode"] == "REQUEUE"
    with pytest.raises(BlindError, match="without 'Default'"):
        cluster.partitions("PartitionName=x State=UP MaxTime=1:00:00")


@pytest.mark.parametrize(
    ("gres", "count"),
    [
        ("gpu:8", 8),
        ("gpu:h100:8(S:0-1)", 8),
        ("gpu:h100:4(S:0,2),gpu:a100:2(S:1),nvme:3", 6),
        ("gpu", 1),
        ("(null)", 0),
        ("nvme:2", 0),
    ],
)
def test_gpus_of_a_node(gres: str, count: int) -> None:
    assert cluster.gpus(gres) == count


def test_nodes_of_a_partition(fake_run: FakeRun) -> None:
    lines = "w-0|idle|128|1000000|gpu:8|none\nw-0|idle|128|1000000|gpu:8|none\nw-1|drain*|64+|9|(null)|bad|x\n"
    fake_run.on("sinfo", "--noheader", "--Node", "--partition=p", out=lines)
    one, other = Slurm(fake_run).resources("p")
    assert (one.name, one.cpus, one.gpus, one.up) == ("w-0", 128, 8, True)
    assert (other.cpus, other.up, other.reason) == (64, False, "bad|x")
    with pytest.raises(BlindError, match="not understood"):
        cluster.resources("w-0|idle|many|1|gpu:8|none")


def test_accounts(fake_run: FakeRun) -> None:
    fake_run.on("sacctmgr", out="lab||normal,high\nother|gpu|\n")
    lab, other = Slurm(fake_run).associations("me")
    assert (lab.account, lab.partition, lab.qos) == ("lab", "", ("normal", "high"))
    assert (other.partition, other.qos) == ("gpu", ())
    fake_run.on("sacctmgr", code=1, err="You are not running a supported accounting_storage plugin")
    with pytest.raises(BlindError, match="supported accounting_storage"):
        Slurm(fake_run).associations("me")
    with pytest.raises(BlindError, match="not understood"):
        cluster.associations("odd")


def test_a_submission_is_tried_only(fake_run: FakeRun) -> None:
    said = "sbatch: Job 7 to start at 2026-11-21T16:41:36 using 128 processors on nodes w-0"
    fake_run.on("sbatch", "--test-only", "--array=0-1", "job.sh", err=said + "\n")
    assert Slurm(fake_run).would_start(["--array=0-1"], "job.sh").startswith("Job 7 to start")
    refusal = "sbatch: error: invalid partition specified: nope\nallocation failure: Invalid name"
    fake_run.on("sbatch", code=1, err=refusal)
    with pytest.raises(SlurmError, match="allocation failure: Invalid name"):
        Slurm(fake_run).would_start([], "job.sh")


def test_jobs_by_name(fake_run: FakeRun) -> None:
    fake_run.on("squeue", "--me", "--noheader", "--name=x", out="71\n72\n")
    assert Slurm(fake_run).queued("x") == [71, 72]
    fake_run.on("squeue", code=1, err="slurm_load_jobs error: Socket timed out")
    with pytest.raises(BlindError):
        Slurm(fake_run).queued("x")
    fake_run.on("scancel", "--me", "--name=x")
    Slurm(fake_run).cancel_named("x")
