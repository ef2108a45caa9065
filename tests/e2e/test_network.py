"""Nodes with networks of their own: a node that is cut off, while everything on it goes on."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import slurm_conf
from launcher.sandbox import Sandbox
from launcher.watcher import Watcher
from tests.conftest import REPOSITORY, copy_of
from tests.e2e.conftest import Workspace, eventually, processes_mentioning

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(os.geteuid() != 0, reason="a Slurm sandbox needs root"),
]
SCRIPT = "llama3.1-8b-pretraining-torchft.sh"
PORT = 29617


@pytest.fixture(scope="module")
def network() -> Iterator[Sandbox]:
    sandbox = Sandbox(Path(f"/run/tft-test-net-{os.getpid()}"))
    sandbox.up(3, network=True)
    yield sandbox
    sandbox.down()


@pytest.fixture
def shell(workspace: Workspace, network: Sandbox) -> Workspace:
    return workspace.having(network.environment())


@pytest.fixture
def training(shell: Workspace) -> Iterator[Workspace]:
    training = shell.having(
        {
            "TFT_LIGHTHOUSE_PORT": str(PORT),
            "TFT_RANKS_PER_NODE": "1",
            "TFT_MIN_STEP_SECONDS": "0.4",
            "TFT_EXTRA_ARGS": "--training.steps 5000",
        }
    )
    training.launcher("lighthouse", "up", "--detach")
    yield training
    training.launcher("lighthouse", "down")


def state_of(sandbox: Sandbox, node: str) -> str:
    return next(n.state for n in sandbox.slurm().nodes() if n.name == node)


def reached(address: str, port: int = slurm_conf.NODE_PORT) -> bool:
    """Whether slurmd of the node at ``address``, or who else, accepts a connection from here."""
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def traces(folder: Path, address: str) -> list[str]:
    """What this machine still has of the sandbox in ``folder``, where it is ``address``."""
    found = processes_mentioning(str(folder))
    found += [str(folder)] if folder.exists() else []
    done = subprocess.run(["ip", "-4", "address"], capture_output=True, text=True, check=True)
    found += [line for line in done.stdout.splitlines() if f" {address}/" in line]
    # A namespace lives while a process is in it (all have ended) or a mount holds it, in the
    # mount namespace of any process.
    for mounts in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            found += [line for line in mounts.read_text().splitlines() if str(folder) in line]
        except OSError:
            continue  # it has ended
    return found


def test_a_node_works_again_after_its_network_was_cut(shell: Workspace, network: Sandbox) -> None:
    address = network.slurm().node_address("worker-1")
    other = network.slurm().node_address("worker-2")
    assert reached(address)
    for _ in range(2):  # a second time changes nothing
        network.cut("worker-1")
    assert not reached(address)
    assert reached(other)
    for _ in range(2):
        network.heal("worker-1")
    eventually(lambda: reached(address), 5, "the node is reached")
    names = "getent ahostsv4 $(hostname) worker-0 | grep STREAM"
    out = shell.sh("srun", "-N2", "-w", "worker-[1-2]", "sh", "-c", names)
    assert sorted({line.split()[0] for line in out.splitlines()}) == sorted(
        [address, other, network.slurm().node_address("worker-0")]
    ), out


@pytest.mark.timeout(180)
def test_the_classic_job_trains_over_two_networks(shell: Workspace, network: Sandbox) -> None:
    shell = shell.having({"TFT_RANKS_PER_NODE": "1", "TFT_EXTRA_ARGS": "--training.steps 3"})
    job = int(shell.sh("sbatch", "--parsable", "-N", "2", "llama3.1-8b-pretraining.sh"))
    eventually(
        lambda: not any(j.live for j in network.slurm().jobs(job)), 120, "the classic job ends"
    )
    folder = shell.root / "outputs" / "classic" / str(job)
    log = (folder / f"classic-{job}.out").read_text()
    assert "step:  3" in log, (folder / f"classic-{job}.err").read_text()


@pytest.mark.timeout(240)
def test_a_cut_nodes_replica_recovers_elsewhere_and_its_old_copy_is_fenced(
    training: Workspace, network: Sandbox, tmp_path: Path
) -> None:
    """The old copy lives on, and cannot see that it has been replaced until long after its
    network is back: as with a shared file system that comes back late."""
    assert reached(training.env["TFT_LIGHTHOUSE_HOST"], PORT)
    assert not reached("127.0.0.1", PORT), "the lighthouse serves the sandbox only"
    slurm = network.slurm()
    job = int(training.sh("sbatch", "--parsable", "--array=0-1", SCRIPT))
    run = training.outputs.run_of_array(job)
    eventually(run.manifest_path.is_file, 30, "the run starts")
    twice: list[int] = []
    try:
        with Watcher.of_run(run, slurm) as watcher:
            state = watcher.state

            def step(replica: int) -> int:
                watcher.look()
                twice.extend(state.second_copies)
                return state.groups[replica].step

            def recovered() -> bool:
                step(1)
                return any(i.recovered_at is not None for i in state.incidents)

            eventually(lambda: min(step(0), step(1)) >= 5, 90, "both groups train")
            node = state.groups[1].host
            told = map(json.loads, run.events(1).read_text().splitlines())
            old = copy_of(next(event["pid"] for event in told if event["kind"] == "start"))
            network.cut(node)
            inside = ["nsenter", f"--mount=/proc/{old[0].pid}/ns/mnt"]
            subprocess.run([*inside, "mount", "--bind", tmp_path, run.groups], check=True)
            alone = step(0)
            eventually(lambda: step(0) > alone + 5, 30, "the survivor trains on")
            assert 1 not in state.members
            eventually(lambda: state_of(network, node).startswith("down"), 45, "Slurm notices")
            eventually(recovered, 90, "the replica recovers on the spare node")
            group = state.groups[1]
            assert (group.attempt, group.host not in (node, state.groups[0].host)) == (2, True)
            assert all(process.is_running() for process in old), "the old copy has not ended"

            network.heal(node)
            at = step(1)
            eventually(lambda: min(step(0), step(1)) > at + 15, 60, "both train on")
            assert not twice, "the old copy has come back into the quorum"
            subprocess.run([*inside, "umount", run.groups], check=False)
            eventually(lambda: not any(p.is_running() for p in old), 20, "the old copy ends")
            at = step(1)
            eventually(lambda: min(step(0), step(1)) > at + 3, 30, "both train on")
            eventually(lambda: state_of(network, node) == "idle", 60, "the node comes back")
            notices = watcher.look(final=True)
            assert not twice, notices
    finally:
        slurm.cancel(job)
    (incident,) = state.incidents
    assert (incident.replica, incident.healed_from, incident.started_over) == (1, 0, False)
    assert incident.why == "node unreachable"
    assert state.weights.compared >= 10
    assert not state.weights.differences


def test_down_leaves_nothing_also_with_a_node_cut_off(tmp_path: Path) -> None:
    sandbox = Sandbox(Path(f"/run/tft-test-down-{os.getpid()}"))
    try:
        sandbox.up(2, network=True)
        env = {**os.environ, **sandbox.environment()}
        submit = ["sbatch", "--nodelist=worker-1", "--output=/dev/null", "--wrap=sleep 300"]
        subprocess.run(submit, env=env, cwd=tmp_path, check=True, timeout=30, capture_output=True)
        eventually(lambda: state_of(sandbox, "worker-1") != "idle", 20, "the job runs")
        address = env["TFT_LIGHTHOUSE_HOST"]
        assert traces(sandbox.folder, address)
        sandbox.cut("worker-1")
    finally:
        sandbox.down()
    eventually(lambda: not traces(sandbox.folder, address), 10, "all is gone")


def test_down_removes_what_a_killed_up_has_left() -> None:
    folder = Path(f"/run/tft-test-killed-{os.getpid()}")
    argv = [sys.executable, "-m", "launcher", "sandbox", "up", "--network", f"--dir={folder}"]
    with subprocess.Popen(argv, cwd=REPOSITORY, start_new_session=True) as process:
        try:
            eventually((folder / "net" / "worker-1").exists, 20, "the network is half made")
            process.send_signal(signal.SIGKILL)
            process.wait(10)
            left = (folder / "net" / "hosts").read_text().splitlines()
            address = next(line.split()[0] for line in left if line.endswith(socket.gethostname()))
        finally:
            process.kill()
            Sandbox(folder).down()
    eventually(lambda: not traces(folder, address), 10, "all is gone")
