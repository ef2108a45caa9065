"""The doctor on a real Slurm: all is well, then something is not, and no node is free."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.sandbox import Sandbox
from tests.e2e.conftest import Workspace, eventually

pytestmark = pytest.mark.slurm


@pytest.fixture
def shell(cluster: Workspace, sandbox: Sandbox) -> Iterator[Workspace]:
    """A shell in which the doctor is called; it leaves no job and no file behind."""
    yield cluster.having({"TFT_LIGHTHOUSE_PORT": "29741"})
    eventually(lambda: not doctors_jobs(cluster), 10, "the doctor's jobs are gone")
    assert not cluster.outputs.visits()


def doctors_jobs(shell: Workspace) -> list[str]:
    listed = shell.sh("squeue", "--noheader", "--format=%j").split()
    return [name for name in listed if name.startswith("tft-doctor")]


def checks(text: str) -> dict[str, dict[str, Any]]:
    """The rows of the table, by name."""
    sections = json.loads(text)["sections"]
    return {row["check"]: row for section in sections for row in section["checks"]}


@pytest.mark.timeout(180)
def test_all_is_well_in_the_sandbox(shell: Workspace) -> None:
    # What a node must know comes from the profile alone, and not from this shell.
    profile = shell.root / "there.yaml"
    here = {name: shell.env[name] for name in shell.env if name not in ("TFT_ENV", "TFT_DEVICE")}
    profile.write_text(
        f"environment: {shell.env['TFT_ENV']}\ndevice: cpu\nlighthouse_host: 127.0.0.1\n"
        "gpus_per_node: 8\ncpus_per_node: 128\nranks_per_node: 1\n"
    )
    words = ("doctor", f"--profile={profile}", "--deep", "--json")
    rows = checks(Workspace(shell.root, here).launcher(*words, timeout=170))
    # Its KillWait is shorter than a cluster's, so that drills are.
    assert [name for name, row in rows.items() if row["result"] != "passed"] == ["KillWait"]
    assert rows["KillWait"]["result"] == "warning"
    assert "worker-0 answered a change of a file" in rows["shared file system"]["found"]
    assert "torch 2.13.0" in rows["environment on a node"]["found"]
    assert "9 ports of 127.0.0.1 answer" in rows["lighthouse from a node"]["found"]
    assert rows["all-reduce"]["found"].startswith("2 ranks on 2 nodes by gloo: ")
    assert "using 128 processors on nodes" in rows["job script"]["found"]


@pytest.mark.timeout(120)
def test_what_is_broken_is_told_with_its_remedy(shell: Workspace) -> None:
    told = shell.launcher("doctor", "--no-job", "--partition=mian", code=1)
    assert "failed         partition: there is no partition mian" in told
    assert "remedy: did you mean main?" in told
    # The lighthouse is sought where the nodes cannot find it, and the interface as well.
    settings = {"TFT_INTERFACE": "ib7", "TFT_LIGHTHOUSE_HOST": "nowhere.invalid"}
    rows = checks(shell.having(settings).launcher("doctor", "--json", code=1, timeout=100))
    broken = {name: row for name, row in rows.items() if row["result"] == "failed"}
    assert set(broken) == {"interface", "lighthouse from a node"}
    assert "has no ib7 that is up; it has lo (127.0.0.1)" in broken["interface"]["found"]
    assert "set TFT_INTERFACE to one of those" in broken["interface"]["remedy"]
    assert "cannot reach nowhere.invalid:29741" in broken["lighthouse from a node"]["found"]
    # An environment that this machine has, and a node would not.
    rows = checks(shell.having({"TFT_ENV": "/nowhere"}).launcher("doctor", "--json", code=1))
    assert "no virtual environment at /nowhere" in rows["environment on a node"]["found"]


@pytest.mark.timeout(120)
def test_a_busy_cluster_is_no_failure_and_is_not_waited_for(
    shell: Workspace, sandbox: Sandbox
) -> None:
    flags = ["--parsable", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 100"]
    busy = int(shell.sh("sbatch", *flags))
    try:
        eventually(lambda: sandbox.slurm().jobs(busy)[0].state == "RUNNING", 20, "nodes are busy")
        told = shell.launcher("doctor", "--wait=1", code=4)
        assert "could not look a node: no node came free in time: the job waits" in told
        with subprocess.Popen(
            [sys.executable, "-m", "launcher", "doctor"],
            cwd=shell.root,
            env=shell.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        ) as doctor:
            eventually(lambda: doctors_jobs(shell), 20, "its job waits")
            doctor.send_signal(signal.SIGTERM)
            assert doctor.wait(20) == 130
        assert not doctors_jobs(shell)
    finally:
        sandbox.slurm().cancel(busy)
