"""The demo: a node goes down under a replica group, on a real Slurm, with real training."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.sandbox import Sandbox
from tests.e2e.conftest import Workspace, eventually, processes_mentioning

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(os.geteuid() != 0, reason="a Slurm sandbox needs root"),
]
FOLDER = f"/run/tft-test-demo-{os.getpid()}"


@pytest.mark.timeout(420)
def test_a_lost_node_is_survived_and_the_weights_stay_identical(workspace: Workspace) -> None:
    said = workspace.launcher("demo", "--dir", FOLDER, "--steps", "90", timeout=400)
    assert "verdict: RECOVERED" in said
    assert "FAILED" not in said
    assert re.search(r"^report: outputs/torchft/tft-\d+/report\.html$", said, re.M)
    assert "$ sbatch --parsable --array=0-1 llama3.1-8b-pretraining-torchft.sh" in said
    assert not Path(FOLDER).exists()
    assert not processes_mentioning(FOLDER)

    run = workspace.outputs.find(None)
    assert "trained to the last step" in run.report(".html").read_text()
    events = [
        json.loads(text)
        for replica in (0, 1)
        for text in run.events(replica).read_text().splitlines()
    ]
    survivor, lost = run.log(0, "out").read_text(), run.log(1, "out").read_text()

    # The survivor's own log shows at most one failed commit.
    assert survivor.count("/0 - step") > 80
    assert survivor.count("should_commit=False") <= 1
    # Nothing was truncated over the requeue.
    starts = re.findall(r"^\[[-0-9]+ [:0-9]+\] launching replica 1 \(attempt (\d)\)", lost, re.M)
    assert starts == ["1", "2"]
    # (a) the loss in the text log is the mean of the groups' own.
    local: dict[int, list[float]] = {}
    for event in events:
        if event["kind"] == "metrics" and event.get("participants") == 2:
            local.setdefault(event.get("titan_step"), []).append(event.get("local_loss"))
    printed = {
        int(step): float(loss)
        for step, loss in re.findall(r"step: +(\d+) +loss: +([\d.]+)", survivor)
    }
    pairs = [(printed[step], sum(v) / 2) for step, v in local.items() if len(v) == 2]
    assert len(pairs) > 20
    assert all(shown == pytest.approx(mean, abs=1e-4) for shown, mean in pairs)
    # (d) the restarted replica lowered its timeout too, after it had healed.
    after_heal = lost[lost.index("healed: took the state of replica 0") :]
    assert "adjusting timeout for all ProcessGroups to 0:01:00" in after_heal
    # (e) dataloader states do not pile up.
    for folder in (run.path / "dataloader").iterdir():
        assert len(list(folder.glob("step-*"))) <= 3, folder
    # The whole story can be told again from the files.
    assert "RECOVERED" in workspace.launcher("monitor", "--once")


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seconds", [0.4, 3.0, 14.0])
def test_ctrl_c_leaves_nothing_behind(workspace: Workspace, seconds: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "demo", "--dir", FOLDER],
        cwd=workspace.root,
        env=workspace.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # As on a terminal, also where these tests run in the background with it ignored.
        preexec_fn=_heed_interrupts,
    )
    try:
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        left = Sandbox(Path(FOLDER)).down()  # a failure here must not stay for other tests
    assert process.returncode == 130, out
    assert not left
    eventually(lambda: not processes_mentioning(FOLDER), 10, "every process of the demo ends")
