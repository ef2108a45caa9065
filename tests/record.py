"""Records the logs of real failures, for tests/fixtures. Root; a sandbox; a minute a scene.

    python -m tests.record kill-replica hang …      (default: every scene)

Each scene is a run of the real parts in a sandbox: Slurm, lighthouse, torchft, torchtitan. Its
lighthouse log, text logs and structured events go to tests/fixtures/<scene>/, with paths made
anonymous. The incidents expected of it are in ``expected.json`` there, written by hand.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil

from launcher.lighthouse_log import LighthouseReader
from launcher.monitor import SCRIPT
from launcher.rundir import Outputs, RunDir
from launcher.sandbox import Sandbox
from launcher.state import RunState
from launcher.watcher import Watcher
from tests.conftest import FIXTURES, REPOSITORY, copy_of

with socket.socket() as _probe:  # a free one: somebody else may be recording
    _probe.bind(("127.0.0.1", 0))
    PORT = int(_probe.getsockname()[1])
#: Bytes that a process whose memory ends still gets: enough for its last words.
HEADROOM = 3 << 20
#: Read by every Python of a scene: a rank hangs on SIGUSR1, as in a deadlock; its heartbeats
#: go on.
HOOKS = "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *a: time.sleep(600))\n"


class Scene:
    """One run that something happens to."""

    def __init__(self, sandbox: Sandbox, env: dict[str, str], steps: int, groups: int) -> None:
        self.sandbox = sandbox
        self.env = env | {
            "TFT_EXTRA_ARGS": f"--training.steps {steps}",
            "TFT_RANKS_PER_NODE": "1",
            "TFT_MIN_STEP_SECONDS": "0.4",
        }
        self.job = int(self.sh("sbatch", "--parsable", f"--array=0-{groups - 1}", SCRIPT))
        self.run: RunDir = Outputs(REPOSITORY / "outputs").run_of_array(self.job)
        self.wait(self.run.manifest_path.is_file)
        self.watcher = Watcher.of_run(self.run, sandbox.slurm())

    @property
    def state(self) -> RunState:
        self.watcher.look()
        return self.watcher.state

    def sh(self, *argv: str) -> str:
        done = subprocess.run(
            argv,
            env=self.env,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.strip()

    def wait(self, condition: Callable[[], bool], seconds: float = 150.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit("the scene did not go on as expected")
            time.sleep(0.2)

    def steps(self, replica: int) -> int:
        return self.state.groups[replica].step

    def all_train(self, groups: int) -> bool:
        return min(self.steps(replica) for replica in range(groups)) >= 8

    def ended(self) -> bool:
        return self.state.finished or self.watcher.live_tasks == 0

    def rank(self, replica: int) -> psutil.Process:
        lines = self.run.events(replica).read_text().splitlines()
        starts = [e for e in map(json.loads, lines) if e["kind"] == "start"]
        return psutil.Process(starts[-1]["pid"])

    def bring_back(self, replica: int) -> None:
        """What a person does when a task has failed: requeue it, and cut Slurm's delay."""
        task = f"{self.job}_{replica}"

        def ended() -> bool:
            jobs = self.sandbox.slurm().jobs(self.job)
            return not any(job.live for job in jobs if job.task == replica)

        self.wait(ended)
        self.sh("scontrol", "requeue", task)
        self.recovered(replica)

    def recovered(self, replica: int) -> None:
        self.wait(
            lambda: any(
                i.replica == replica and i.recovered_at is not None for i in self.state.incidents
            )
        )


def kill_replica(scene: Scene) -> None:
    scene.rank(1).kill()
    scene.bring_back(1)


def kill_request(scene: Scene) -> None:
    reader = LighthouseReader("x")
    members = [
        e.get("members")
        for e in reader.read(0, scene.run.lighthouse_log.read_bytes())
        if e.kind == "membership"
    ][-1]
    uuid = next(m[1] for m in members if m[0] == 1)
    request = urllib.request.Request(
        f"{scene.env['TORCHFT_LIGHTHOUSE']}/replica/torchtitan_ft_1:{uuid}/kill", method="POST"
    )
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        error.close()  # it answers 500 on success
    scene.bring_back(1)


def stop(scene: Scene) -> None:
    rank = scene.rank(1)
    rank.send_signal(signal.SIGSTOP)
    scene.wait(lambda: 1 not in scene.state.members)
    time.sleep(5)
    rank.send_signal(signal.SIGCONT)
    scene.recovered(1)


def hang(scene: Scene) -> None:
    rank = scene.rank(1)
    rank.send_signal(signal.SIGUSR1)
    time.sleep(30)
    rank.kill()
    scene.bring_back(1)


def node_down(scene: Scene) -> None:
    node = scene.state.groups[1].host
    scene.sh("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=drill")
    scene.wait(lambda: 1 not in scene.state.members)
    scene.sh("scontrol", "update", f"NodeName={node}", "State=RESUME")
    scene.recovered(1)


def network_cut(scene: Scene) -> None:
    """Nobody of the old copy is left when its node is connected again."""
    node = scene.state.groups[1].host
    old = copy_of(scene.rank(1).pid)
    scene.sandbox.cut(node)
    scene.recovered(1)
    for process in old:
        process.kill()
    scene.sandbox.heal(node)


def lighthouse_killed(scene: Scene) -> None:
    pid = json.loads(
        next(
            (REPOSITORY / "outputs/torchft/lighthouses").glob(f"127.0.0.1-{PORT}/address.json")
        ).read_text()
    )["pid"]
    (child,) = psutil.Process(pid).children()
    child.kill()
    before = scene.steps(0)
    scene.wait(lambda: scene.steps(0) > before + 5)


#: Scenes whose nodes have a network of their own.
NETWORK = {"network-cut"}


def out_of_memory(scene: Scene) -> None:
    """The rank may not grow any more: the next step asks for tensors that it cannot have."""
    rank = scene.rank(1)
    least = min(_sizes(rank, seconds=3.0)) + HEADROOM  # between two steps
    rank.rlimit(psutil.RLIMIT_AS, (least, least))
    scene.bring_back(1)


def _sizes(process: psutil.Process, seconds: float) -> Iterator[int]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield process.memory_info().vms
        time.sleep(0.01)


#: Scene: (what happens, steps, replica groups).
SCENES: dict[str, tuple[Callable[[Scene], None], int, int]] = {
    "kill-replica": (kill_replica, 110, 2),
    "kill-request": (kill_request, 110, 2),
    "stop": (stop, 80, 2),
    "hang": (hang, 110, 2),
    "out-of-memory": (out_of_memory, 110, 2),
    "lighthouse-killed": (lighthouse_killed, 60, 2),
    "three-replicas": (node_down, 110, 3),
    "network-cut": (network_cut, 170, 2),
}


def keep(run: RunDir, scene: str) -> None:
    """Copy what the monitor reads, anonymous and without the bulk of the text logs."""
    folder = FIXTURES / scene
    folder.mkdir(exist_ok=True)
    places = [sysconfig.get_path("purelib"), sys.prefix, str(REPOSITORY)]
    # A task activates the environment by its real path, which may be a linked one's.
    places += [*map(os.path.realpath, places), sysconfig.get_path("stdlib")]
    for path in [run.manifest_path, run.lighthouse_log, *sorted(run.path.glob(f"{run.name}_*.*"))]:
        text = path.read_text(errors="replace")
        for place in places:
            text = text.replace(f"{place}/", "")
        (folder / path.name).write_text(text)


def record(name: str, sandbox: Sandbox, hook: str) -> None:
    sandbox.up(4, network=name in NETWORK)
    settings = sandbox.environment()
    env = {
        **os.environ,
        **settings,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": hook,
        "TFT_LIGHTHOUSE_PORT": str(PORT),
        # What a failure looks like when nobody mends it.
        "TFT_RESTARTS": "0",
        "TFT_REQUEUES": "0",
        # Every large tensor comes from the system, and none from what the C library kept.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20),
        "TORCHFT_LIGHTHOUSE": f"http://{settings['TFT_LIGHTHOUSE_HOST']}:{PORT}",
    }
    lighthouse = [sys.executable, "-m", "launcher", "lighthouse"]
    try:
        subprocess.run(
            [*lighthouse, "up", "--detach", "--no-act"], env=env, cwd=REPOSITORY, check=True
        )
        act, steps, groups = SCENES[name]
        scene = Scene(sandbox, env, steps, groups)
        scene.wait(partial(scene.all_train, groups))
        print(f"{name}: trains, now it happens", flush=True)
        act(scene)
        scene.wait(scene.ended)
        keep(scene.run, name)
        scene.watcher.close()
        print(f"{name}: recorded", flush=True)
    finally:
        subprocess.run([*lighthouse, "down"], env=env, cwd=REPOSITORY, check=False)
        sandbox.down()


def main(names: list[str]) -> None:
    sandbox = Sandbox(Path(f"/run/tft-record-{os.getpid()}"))
    with tempfile.TemporaryDirectory() as hook:
        Path(hook, "sitecustomize.py").write_text(HOOKS)
        for name in names:
            record(name, sandbox, hook)


if __name__ == "__main__":
    main(sys.argv[1:] or list(SCENES))
