"""Real failures of a real run, and that nobody has to do anything about them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from launcher import spares
from launcher.incidents import Incident
from launcher.lighthouse import LighthouseDir
from launcher.rundir import RunDir
from launcher.sandbox import Sandbox
from launcher.state import RunState
from launcher.terms import Terms
from launcher.watcher import Watcher
from tests.conftest import copy_of
from tests.e2e.conftest import Workspace, eventually

pytestmark = pytest.mark.slurm
SCRIPT = "llama3.1-8b-pretraining-torchft.sh"
PORT = "29631"
#: Read by every Python of these runs: a rank hangs on SIGUSR1, as in a deadlock, and its
#: heartbeats go on.
HANGS = """
import signal, time
def hang_in_a_test(*arguments): time.sleep(600)
signal.signal(signal.SIGUSR1, hang_in_a_test)
"""


class Training:
    """A run that goes on while things happen to it."""

    def __init__(self, workspace: Workspace, sandbox: Sandbox, job: int) -> None:
        self.workspace, self.sandbox, self.job = workspace, sandbox, job
        self.run: RunDir = workspace.outputs.run_of_array(job)
        eventually(self.run.manifest_path.is_file, 30, "the run starts")
        self.watcher = Watcher.of_run(self.run, sandbox.slurm())

    @property
    def state(self) -> RunState:
        self.watcher.look()
        return self.watcher.state

    def full(self, groups: int = 2) -> None:
        """Wait until all groups are in the quorum, and go on a few steps."""
        eventually(lambda: len(self.state.members) == groups, 90, "all are in the quorum")
        at = self.state.step
        eventually(
            lambda: min(g.step for g in self.state.groups.values()) > at + 3, 60, "all go on"
        )

    def rank(self, replica: int, node: int = 0) -> psutil.Process:
        lines = self.run.events(replica, node).read_text().splitlines()
        starts = [e for e in map(json.loads, lines) if e["kind"] == "start"]
        return psutil.Process(starts[-1]["pid"])

    def after(self, happening: Callable[[], object], replica: int = 1) -> Incident:
        """Let something happen, and wait until the group is back; its incident."""
        self.full()
        before = len([i for i in self.state.incidents if i.replica == replica])
        happening()

        def back() -> list[Incident]:
            found = [i for i in self.state.incidents if i.replica == replica][before:]
            return [i for i in found if i.recovered_at is not None]

        eventually(back, 120, "the lost group is back")
        (incident,) = back()
        weights = self.state.weights
        eventually(
            lambda: self.state.weights.compared > incident.compared_before + 2, 30, "compared"
        )
        assert not weights.differences
        return incident


def submitted(cluster: Workspace, *words: str) -> int:
    """Array job id of what `launcher submit` has submitted."""
    said = cluster.launcher("submit", *words)
    found = re.search(r"^run tft-(\d+): ", said, re.M)
    assert found is not None, said
    return int(found[1])


@contextlib.contextmanager
def training(
    cluster: Workspace,
    sandbox: Sandbox,
    tasks: int = 2,
    flags: Sequence[str] = (),
    submit: Sequence[str] = (),
) -> Iterator[Training]:
    """``flags``: sbatch's; ``submit``: the run is submitted by `launcher submit`, with those words."""
    if submit:
        words = ("configs/debug-cpu.toml", f"--replicas={tasks}", *submit)
        job = submitted(cluster, *words)
    else:
        job = int(cluster.sh("sbatch", "--parsable", f"--array=0-{tasks - 1}", *flags, SCRIPT))
    going = Training(cluster, sandbox, job)
    try:
        with going.watcher:
            yield going
    finally:
        sandbox.slurm().cancel(job)
        eventually(lambda: not any(j.live for j in sandbox.slurm().jobs(job)), 30, "it ends")


@pytest.fixture
def shell(cluster: Workspace, tmp_path: Path) -> Iterator[Workspace]:
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    shell = cluster.having(
        {
            "PYTHONPATH": str(tmp_path),
            "TFT_LIGHTHOUSE_PORT": PORT,
            "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{PORT}",
            "TFT_RANKS_PER_NODE": "1",
            "TFT_MIN_STEP_SECONDS": "0.3",
            "TFT_TIME_LIMIT_NOTICE": "4",
            "TFT_EXTRA_ARGS": "--training.steps 5000",
        }
    )
    shell.launcher("lighthouse", "up", "--detach")
    yield shell
    shell.launcher("lighthouse", "down")


def supervisor(shell: Workspace) -> psutil.Process:
    address = LighthouseDir.of(shell.outputs, f"http://127.0.0.1:{PORT}").address()
    assert address is not None
    return psutil.Process(address.pid)


def lighthouse_process(shell: Workspace) -> psutil.Process:
    children = supervisor(shell).children()
    return next(c for c in children if "lighthouse_process" in " ".join(c.cmdline()))


@pytest.mark.timeout(400)
def test_a_run_survives_whatever_happens_to_its_processes(
    shell: Workspace, sandbox: Sandbox
) -> None:
    with training(shell, sandbox) as going:
        going.full()
        # A rank dies: started again in place, under the same task.
        crash = going.after(lambda: going.rank(1).kill())
        assert "was killed by SIGKILL" in crash.why
        assert (going.state.groups[1].attempt, going.state.groups[1].host) == (2, crash.host)

        # The lighthouse dies: nobody else does, and no commit is lost.
        attempts = [g.attempt for g in going.state.groups.values()]
        failed = [g.failed_commits for g in going.state.groups.values()]
        quorum, starts = going.state.quorum_id, going.state.lighthouse_starts
        lighthouse_process(shell).kill()
        eventually(lambda: going.state.lighthouse_starts > starts, 20, "it is started again")
        going.full()
        assert [g.attempt for g in going.state.groups.values()] == attempts
        assert [g.failed_commits for g in going.state.groups.values()] == failed
        assert going.state.quorum_id > quorum + 50, "past every id that managers have had"

        # Its host dies, supervisor and all: a group's launcher stands in until it is back.
        terms = Terms(going.run.terms)
        supervisor(shell).kill()
        eventually(lambda: terms.newest().serving, 20, "a replica group stands in")
        going.full()
        assert going.state.stand_in is not None
        shell.launcher("lighthouse", "up", "--detach")
        eventually(lambda: not terms.newest().serving, 20, "the login node has it again")
        going.full()
        assert going.state.stand_in is None
        assert [g.attempt for g in going.state.groups.values()] == attempts
        assert [g.failed_commits for g in going.state.groups.values()] == failed

        # A rank hangs, with heartbeats: it is killed with its stacks kept.
        hung = going.after(lambda: going.rank(1).send_signal(signal.SIGUSR1))
        assert hung.why.startswith("hang: did not join the quorum that others waited")
        stacks = going.run.ranks(1, 2) / "stacks.0.txt"
        assert "hang_in_a_test" in stacks.read_text()
        assert hung.survivor_stall_s < 40

        # Its time limit is near, Slurm says: it leaves between two steps, and is requeued.
        failed = [g.failed_commits for g in going.state.groups.values()]
        near = ("scancel", "--batch", "--signal=USR2", f"{going.job}_1")  # as Slurm itself would
        limit = going.after(lambda: shell.sh(*near))
        assert limit.why.startswith("time limit")
        assert [g.failed_commits for g in going.state.groups.values()] == failed

        # The launcher of the task is killed: the guardian requeues it.
        gone = going.after(lambda: copy_of(going.rank(1).pid)[0].kill())
        assert "its launcher was killed: Slurm says FAILED" in gone.why
        assert going.state.groups[1].attempt == 5
        assert going.state.groups[0].attempt == 1, "the survivor is the same all along"
        # The whole story can be told again from the files, actions included.
        again = shell.launcher("monitor", str(going.job), "--once")
        for part in ("restarted in place", "guardian: replica 1 is requeued", "starts now"):
            assert part in again


@pytest.mark.timeout(240)
def test_a_spare_takes_a_lost_nodes_place_and_the_lost_task_becomes_a_spare(
    shell: Workspace, sandbox: Sandbox
) -> None:
    with training(shell, sandbox, submit=["--spares=1"]) as going:
        going.full()
        eventually(lambda: spares.ready(going.run.groups), 60, "the spare stands ready")
        node = going.state.groups[1].host

        def lose() -> None:
            sandbox.slurm().set_node_state(node, "DOWN", "test")
            sandbox.slurm().set_node_state(node, "RESUME")

        lost = going.after(lose)
        assert lost.why == "node down"
        group = going.state.groups[1]
        assert (group.task, group.attempt) == (2, 2)
        assert group.host != node
        eventually(lambda: spares.ready(going.run.groups), 60, "the lost task is a spare")
        assert [spare.task for spare in spares.ready(going.run.groups)] == [1]


@pytest.mark.timeout(120)
def test_a_mistake_in_the_configuration_ends_the_run_clearly(
    shell: Workspace, sandbox: Sandbox
) -> None:
    shell = shell.having({"TFT_EXTRA_ARGS": "--model.flavor nonsense"})
    job = int(shell.sh("sbatch", "--parsable", "--array=0-0", SCRIPT))
    eventually(lambda: not any(j.live for j in sandbox.slurm().jobs(job)), 90, "it ends")
    (task,) = sandbox.slurm().jobs(job)
    assert task.state == "FAILED"
    last = shell.outputs.run_of_array(job).log(0, "err").read_text().splitlines()[-1]
    assert "replica 0 (attempt 2)" in last
    assert "is given up (the same error twice before the first step" in last
    time.sleep(3)  # the guardian leaves it so
    assert sandbox.slurm().jobs(job)[0].state == "FAILED"


@pytest.mark.timeout(240)
def test_an_unfit_node_is_left_out_of_the_next_start(shell: Workspace, sandbox: Sandbox) -> None:
    check = shell.root / "slurm" / "node-check.sh"
    check.write_text('[ "$SLURMD_NODENAME" != worker-1 ] || { echo "the fan is off"; exit 1; }\n')
    try:
        with training(shell, sandbox) as going:
            going.full()
            group = going.state.groups[1]
            assert (group.host, group.attempt) == ("worker-2", 2)
            out = shell.sh("scontrol", "show", "job", f"{going.job}_1")
            assert "ExcNodeList=worker-1" in out
            told = shell.launcher("monitor", str(going.job), "--once")
            assert "unfit node: slurm/node-check.sh says: the fan is off; requeued" in told
            assert "starts now (Slurm's requeue delay is cut short, without worker-1)" in told
    finally:
        check.unlink()


@pytest.mark.timeout(240)
def test_the_lighthouse_as_a_job_moves_to_another_node(
    cluster: Workspace, sandbox: Sandbox
) -> None:
    settings = {
        "TFT_LIGHTHOUSE_PORT": PORT,
        "TFT_RANKS_PER_NODE": "1",
        "TFT_MIN_STEP_SECONDS": "0.3",
        "TFT_EXTRA_ARGS": "--training.steps 5000",
    }
    shell = cluster.having(settings)
    job = int(shell.sh("sbatch", "--parsable", "slurm/lighthouse.sbatch"))
    folder = LighthouseDir(shell.outputs.lighthouses / "job")
    try:
        eventually(lambda: folder.path.exists() and folder.address(), 30, "it is published")
        shell = shell.having({"TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{PORT}"})
        with training(shell, sandbox) as going:
            going.full()
            before = folder.address()
            shell.sh("scontrol", "requeue", str(job))
            eventually(
                lambda: (now := folder.address()) and before and now.pid != before.pid,
                60,
                "it is published anew",
            )
            going.full()
            assert [g.attempt for g in going.state.groups.values()] == [1, 1]
            assert [g.failed_commits for g in going.state.groups.values()] == [0, 0]
    finally:
        sandbox.slurm().cancel(job)
        eventually(lambda: not any(j.live for j in sandbox.slurm().jobs(job)), 30, "it ends")
    assert os.listdir(folder.path)
