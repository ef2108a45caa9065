"""Drills on a real run: a soak of mixed failures, and single ones that pass and that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.drill import whole
from launcher.sandbox import Sandbox
from tests.e2e.conftest import Workspace, eventually
from tests.e2e.test_recovery import Training, training

pytestmark = pytest.mark.slurm
PORT = "29647"
KINDS = "kill-rank,node-down,hang,lighthouse-host,stop"


@pytest.fixture(scope="module")
def drilled(workspace: Workspace, sandbox: Sandbox) -> Iterator[tuple[Workspace, Training]]:
    """A run of three replica groups that may be broken."""
    shell = workspace.having(
        {
            **sandbox.environment(),
            "TFT_LIGHTHOUSE_PORT": PORT,
            "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{PORT}",
            "TFT_RANKS_PER_NODE": "1",
            "TFT_MIN_STEP_SECONDS": "0.3",
            "TFT_EXTRA_ARGS": "--training.steps 50000",
            "TFT_DRILLS": "1",
        }
    )
    shell.launcher("lighthouse", "up", "--detach")
    try:
        with training(shell, sandbox, 3) as going:
            going.full(3)
            yield shell, going
    finally:
        shell.launcher("lighthouse", "down")


@pytest.mark.timeout(600)
def test_a_soak_of_mixed_failures(drilled: tuple[Workspace, Training], tmp_path: Path) -> None:
    shell, going = drilled
    words = ["drill", "loop", f"--kinds={KINDS}", "--count=5", "--mtbf=2s", "--seed=5"]
    words += [f"--run={going.job}", "--yes", f"--json={tmp_path / 'soak.json'}"]
    told = shell.launcher(*words, timeout=580)
    assert "soak: PASSED" in told
    result = json.loads((tmp_path / "soak.json").read_text())
    assert sorted(drill["kind"] for drill in result["drills"]) == sorted(KINDS.split(","))
    assert all(drill["passed"] for drill in result["drills"])
    assert result["false_alarms"] == []
    assert result["held"]["grown"] == []
    assert set(result["held"]["after"]) == {"supervisor", "lighthouse", "guardian"}
    assert result["weights"]["differences"] == 0
    assert result["time_to_recover_s"]["worst"] < 300
    # What a soak has broken, the report of the run tells as well.
    assert len(going.state.incidents) == 5


@pytest.mark.timeout(300)
def test_a_drill_that_fails_says_so_and_leaves_nothing_broken(
    drilled: tuple[Workspace, Training], sandbox: Sandbox
) -> None:
    shell, going = drilled
    eventually(lambda: not whole(going.state), 90, "the run is whole")
    attempt = going.state.groups[0].attempt
    choice = (f"--run={going.job}", "--node", going.state.groups[0].host)
    # Whole nodes are not touched unasked.
    assert "add --yes" in shell.launcher("drill", "node-down", *choice, code=2)
    # Nothing follows within a thousandth of the deadlines: the node is given back all the same.
    told = shell.launcher("drill", "node-down", *choice, "--yes", "--patience=0.001", code=3)
    assert "verdict: FAILED" in told
    assert "not within" in told
    state = {node.name: node.state for node in sandbox.slurm().nodes()}
    assert not state[choice[2]].startswith("down"), state
    eventually(lambda: going.state.groups[0].attempt > attempt, 60, "it is started again")
    eventually(lambda: not whole(going.state), 180, "the run is whole again")
    # Interrupted, it puts back what it has changed.
    rank = going.rank(2)
    with subprocess.Popen(
        [sys.executable, "-m", "launcher", "drill", "stop", "--replica=2", choice[0]],
        cwd=shell.root,
        env=shell.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as drill:
        eventually(lambda: rank.status() == "stopped", 20, "the rank is stopped")
        drill.terminate()
        assert drill.wait(20) == 130
    assert rank.status() != "stopped"
