"""A run of one machine, without Slurm and without root: a whole task is lost, and comes back."""

from __future__ import annotations

import json
import os
import signal
import sys

import psutil
import pytest

from launcher import find
from launcher.hands import whole_task
from launcher.rundir import RunDir
from launcher.scheduler import scheduler_of
from launcher.watcher import Watcher
from tests.e2e.conftest import Workspace, eventually, processes_mentioning

#: Steps of the run: at most this many, for it ends when it has done what is looked at.
STEPS = 60


@pytest.fixture
def shell(workspace: Workspace) -> Workspace:
    kept = {k: v for k, v in workspace.env.items() if k != "PATH"}
    settings = {
        "PATH": "/nonexistent",  # neither Slurm's commands nor anybody else's
        "TFT_DEVICE": "cpu",
        "TFT_RANKS_PER_NODE": "1",
        "TFT_WEIGHT_HASH_EVERY": "1",
        "TFT_MIN_STEP_SECONDS": "0.3",
    }
    return Workspace(workspace.root, kept | settings)


def start(shell: Workspace, steps: int) -> RunDir:
    config = ("configs/debug-cpu.toml", "--cluster", "local", "--replicas", "2")
    said = shell.launcher("submit", *config, "--", "--training.steps", str(steps))
    name = said.split(":")[0].removeprefix("run ")
    return shell.outputs.find(name)


def start_from_python(shell: Workspace, steps: int) -> RunDir:
    call = (
        "from launcher import submit; print(submit('configs/debug-cpu.toml', replicas=2, "
        f"cluster='local', flags=['--training.steps={steps}']).name)"
    )
    name = shell.sh(sys.executable, "-c", call).strip()
    return shell.outputs.find(name)


def rank(run: RunDir, replica: int) -> int:
    lines = run.events(replica).read_text().splitlines()
    return int([e for e in map(json.loads, lines) if e["kind"] == "start"][-1]["pid"])


@pytest.mark.timeout(150)
def test_a_task_that_is_killed_whole_comes_back_and_the_run_finishes(shell: Workspace) -> None:
    run = start_from_python(shell, STEPS)
    try:
        eventually(run.manifest_path.is_file, 30, "the run starts")
        with Watcher.of_run(run, scheduler_of(run)) as watcher:

            def looked(condition: bool) -> bool:
                watcher.look()
                return condition

            state = watcher.state
            eventually(
                lambda: looked(
                    len(state.members) == 2 and min(g.step for g in state.groups.values()) > 5
                ),
                60,
                "both train",
            )
            lost = whole_task(rank(run, 1))
            assert len(lost) >= 3, "launcher, torchrun and the rank"
            for pid in lost:
                os.kill(pid, signal.SIGKILL)
            eventually(
                lambda: looked(any(i.recovered_at is not None for i in state.incidents)),
                60,
                "it is requeued, heals and commits again",
            )
            eventually(lambda: looked(state.finished), 60, "both train to the last step")
            watcher.look(final=True)
            (incident,) = state.incidents
            assert (incident.replica, incident.healed_from) == (1, 0)
            assert "its launcher was killed" in incident.why
            assert [g.attempt for g in state.groups.values()] == [1, 2]
            assert state.groups[0].failed_commits <= 1
            weights = state.weights
            assert weights.compared > incident.compared_before
            assert not weights.differences
        # Everything ends by itself, and can be told again.
        eventually(lambda: not processes_mentioning(run.name), 20, "nothing of it is left")
        told = shell.launcher("monitor", run.name, "--once")
        for part in ("replica 1 is requeued", "RECOVERED", "DONE"):
            assert part in told
        assert [job.state for job in scheduler_of(run).jobs(run.number)] == ["COMPLETED"] * 2
        found = find(run.name, shell.outputs.root)
        assert found.wait(10)
        assert [job.result().attempts for job in found.jobs] == [1, 2]
        assert shell.launcher("report", run.name).strip().endswith("report.html")
        assert run.manifest().cluster == "local"
    finally:
        shell.launcher("cancel", run.name)


@pytest.mark.timeout(150)
def test_down_leaves_no_process(shell: Workspace) -> None:
    run = start(shell, 5000)
    try:
        events = run.events(1)
        eventually(lambda: events.is_file() and '"start"' in events.read_text(), 60, "up")
        assert psutil.pid_exists(rank(run, 1))
        assert "is ended" in shell.launcher("cancel", run.name)
        assert not processes_mentioning(run.name)
        assert [job.state for job in scheduler_of(run).jobs(run.number)] == ["CANCELLED"] * 2
    finally:
        shell.launcher("cancel", run.name)
