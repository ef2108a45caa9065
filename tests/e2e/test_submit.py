"""A run as its owner has it: submitted, listed, grown, shrunk, and cancelled."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.events import Event
from launcher.model import GroupState
from launcher.rundir import Outputs, RunDir
from launcher.sandbox import Sandbox
from launcher.state import RunState
from launcher.watcher import Watcher
from tests.e2e.conftest import Workspace, eventually, processes_mentioning

pytestmark = pytest.mark.slurm
NASTY = "a 'b' \"c\" $(touch oops) `touch oops` é 漢"
SECRET = "https://hooks.example/s3cr3t"
SCRIPT = "llama3.1-8b-pretraining-torchft.sh"


def run_of(said: str) -> str:
    return next(line for line in said.splitlines() if line.startswith("run tft-"))[4:].split(":")[0]


@pytest.fixture
def shell(cluster: Workspace, hostile: Path) -> Workspace:
    return cluster.having(
        {
            "TFT_OUTPUTS": str(hostile / "out"),
            "TFT_LIGHTHOUSE_HOST": "127.0.0.1",
            "TFT_MIN_STEP_SECONDS": "0.2",
            "TFT_WEBHOOK": SECRET,
            "TFT_RANKS_PER_NODE": "1",
        }
    )


@pytest.mark.timeout(240)
def test_a_run_grows_and_shrinks_and_ends_and_leaves_nothing(
    shell: Workspace, sandbox: Sandbox, hostile: Path
) -> None:
    """Every name, path and value is such that whatever forgets to quote it breaks."""
    outputs = Outputs(hostile / "out")
    (hostile / "env").symlink_to(shell.env["TFT_ENV"])
    shutil.copy(shell.root / "configs" / "debug-cpu.toml", hostile / "c.toml")
    shutil.copy(shell.root / "configs" / "clusters" / "sandbox.yaml", hostile / "p.yaml")
    settings: dict[str, Any] = {
        "config": str(hostile / "c.toml"),
        "profile": str(hostile / "p.yaml"),
        "environment": str(hostile / "env"),
        "variables": {"NOTE": f"{NASTY}\nand more"},
    }
    (hostile / "run.yaml").write_text(json.dumps(settings))
    free = {k: v for k, v in shell.env.items() if k not in ("TFT_ENV", "TFT_CONFIG")}
    said = Workspace(shell.root, free).launcher(
        "submit", str(hostile / "run.yaml"), "--replicas=1", "--max-replicas=2", f"--name={NASTY}", f"--comment={NASTY}",
        "--", f"--job.description={NASTY}\nand a second line", "--training.steps=100000",
    )  # fmt: skip
    name = run_of(said)
    run = outputs.find(name)
    assert run.manifest().extra_args[0].endswith("and a second line")
    assert run.manifest().config == str(hostile / "c.toml")

    with Watcher.of_run(run, sandbox.slurm()) as watcher:
        state = watcher.state

        def look() -> RunState:
            watcher.look()
            return state

        left: list[Event] = []
        watcher.on_event = lambda _, event: left.append(event) if event.kind == "leave" else None
        eventually(lambda: look().step > 3, 60, "it trains")
        _tell_no_secret(shell, run)
        environ = psutil.Process(_rank(run)).environ()
        assert environ["NOTE"] == settings["variables"]["NOTE"]
        assert environ["VIRTUAL_ENV"] == shell.env["TFT_ENV"]
        assert not list(shell.root.glob("**/oops"))
        assert not list(hostile.glob("**/oops"))
        assert name in shell.launcher("list")
        assert re.search(r"^ +0 +TRAINING", shell.launcher("status", name), re.MULTILINE)
        code = (
            f"from launcher import find; r = find(outputs={str(outputs.root)!r}); j = r.jobs[0];"
            "print(r.name, j.state, j.done(), 'launching replica 0' in j.stdout())"
        )
        assert shell.sh(sys.executable, "-c", code).split() == [name, "RUNNING", "False", "True"]

        shell.launcher("scale", name, "--replicas=3", code=2)
        assert "brings replicas 1" in shell.launcher("scale", name, "--replicas=2")
        eventually(lambda: len(look().members) == 2, 60, "it grows")
        at = state.step
        eventually(lambda: look().step > at + 5, 30, "both go on")
        assert "replica 1 left at step" in shell.launcher("scale", name, "--replicas=1", timeout=90)
        at = state.step
        eventually(lambda: look().step > at + 5, 30, "the other goes on")
        assert left
        assert state.groups[1].state is GroupState.DONE
        assert sum(group.failed_commits for group in state.groups.values()) == 0
        assert state.incidents == []
        assert state.weights.compared > 0
        assert state.weights.differences == 0

    lighthouse = shell.launcher("lighthouse", "status", "--port=29510", "--host=127.0.0.1")
    assert f"claimed by run {name}" in lighthouse
    assert "is ended" in shell.launcher("cancel", name)
    assert name not in shell.launcher("list")
    eventually(lambda: not processes_mentioning(str(run.path)), 20, "nothing of it is left")
    shell.launcher("lighthouse", "status", "--port=29510", "--host=127.0.0.1", code=1)


def _rank(run: RunDir) -> int:
    lines = run.events(0).read_text().splitlines()
    return int([e for e in map(json.loads, lines) if e["kind"] == "start"][-1]["pid"])


def _tell_no_secret(shell: Workspace, run: RunDir) -> None:
    job = shell.sh("scontrol", "show", "job", str(run.number))
    assert NASTY[:5] in job
    lines = [
        " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])
    ]
    assert SECRET not in job
    assert not [line for line in lines if SECRET in line]
    for path in run.path.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_two_runs_have_two_lighthouses_and_a_refused_one_leaves_none(
    shell: Workspace, sandbox: Sandbox
) -> None:
    words = ["submit", "configs/debug-cpu.toml", "--replicas=1", "--sbatch=--hold"]
    first, second = (shell.launcher(*words) for _ in range(2))
    urls = {line.split(" (")[0] for said in (first, second) for line in said.splitlines()
            if line.startswith("lighthouse up")}  # fmt: skip
    assert len(urls) == 2
    refused = shell.launcher(*words, "--partition=nowhere", code=1)
    assert "invalid partition" in refused.lower()
    assert "its lighthouse is ended again" in refused
    for said in (first, second):
        shell.launcher("cancel", run_of(said))
    eventually(lambda: not processes_mentioning("--with-run"), 10, "no lighthouse is left")
    assert sandbox.slurm().own_arrays(str(shell.root), SCRIPT) == []


def test_bad_input_is_refused_before_anything_is_started(shell: Workspace) -> None:
    bad = shell.root / "bad.yaml"
    bad.write_text("config: configs/debug-cpu.toml\nreplicas: 1\npartion: x\n")
    said = shell.launcher("submit", str(bad), code=2)
    assert f"{bad}:3: partion is not a setting: did you mean partition?" in said
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "submit", "configs/debug-cpu.toml", "--replicas=1"],
        cwd="/", env={**os.environ, "PYTHONPATH": str(shell.root)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is not the root of the repository" in done.stderr
    assert not processes_mentioning("--with-run")
