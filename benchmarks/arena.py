"""A sandbox with a lighthouse and one run in it, for benchmarks: what a user does, as methods."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from launcher import assets
from launcher.monitor import SCRIPT
from launcher.rundir import Outputs, RunDir
from launcher.sandbox import Sandbox
from launcher.state import RunState
from launcher.watcher import Watcher

REPOSITORY = Path(__file__).parent.parent
#: Read by every Python of a run: a rank hangs on SIGUSR1, as in a deadlock; heartbeats go on.
HOOKS = "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *a: time.sleep(600))\n"
#: Seconds that anything may take before a benchmark gives up.
PATIENCE = 240.0


class Arena:
    """One sandbox; runs follow each other in it."""

    def __init__(self, *, nodes: int = 4, network: bool = False, requeue_delay: int = 121) -> None:
        self.sandbox = Sandbox(Path(f"/run/tft-bench-{os.getpid()}"))
        self._resources = contextlib.ExitStack()
        self._up = (nodes, network, requeue_delay)

    def __enter__(self) -> Arena:
        nodes, network, delay = self._up
        # Told to end (`timeout` does), it takes the sandbox down like at any other end.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        with contextlib.ExitStack() as stack:
            stack.callback(self.sandbox.down)
            self.sandbox.up(nodes, network=network, requeue_delay=delay)
            hooks = stack.enter_context(tempfile.TemporaryDirectory(prefix="tft-bench-"))
            Path(hooks, "sitecustomize.py").write_text(HOOKS)
            assets.debug(REPOSITORY / "outputs")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = int(probe.getsockname()[1])
            settings = self.sandbox.environment()
            self.url = f"http://{settings['TFT_LIGHTHOUSE_HOST']}:{self.port}"
            inherited = {
                k: v for k, v in os.environ.items() if not k.startswith(("TFT_", "SLURM_", "WANDB"))
            }
            self.env = {
                **inherited,
                **settings,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "TFT_ENV": str(Path(sys.executable).parent.parent),
                "PYTHONPATH": hooks,
                "TFT_LIGHTHOUSE_PORT": str(self.port),
                "TORCHFT_LIGHTHOUSE": self.url,
                "TFT_RANKS_PER_NODE": "1",
            }
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *details: object) -> None:
        self._resources.close()

    @contextlib.contextmanager
    def lighthouse(self, *flags: str) -> Iterator[None]:
        """This kit's lighthouse under its supervisor."""
        argv = [sys.executable, "-m", "launcher", "lighthouse"]
        self.sh(*argv, "up", "--detach", *flags)
        try:
            yield
        finally:
            self.sh(*argv, "down")
            shutil.rmtree(
                REPOSITORY / "outputs/torchft/lighthouses" / self.url[7:].replace(":", "-")
            )

    def sh(self, *argv: str, env: Mapping[str, str] | None = None) -> str:
        done = subprocess.run(
            argv,
            env={**self.env, **(env or {})},
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"{argv} failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    @contextlib.contextmanager
    def run(
        self, tasks: int, settings: Mapping[str, str], steps: int = 100_000, script: str = SCRIPT
    ) -> Iterator[Training]:
        """One run of the job script, cancelled at the end."""
        env = {"TFT_EXTRA_ARGS": f"--training.steps {steps}", **settings}
        job = int(self.sh("sbatch", "--parsable", f"--array=0-{tasks - 1}", script, env=env))
        run = Outputs(REPOSITORY / "outputs").run_of_array(job)
        try:
            until(run.manifest_path.is_file, "the run starts")
            with Watcher.of_run(run, self.sandbox.slurm()) as watcher:
                yield Training(self, run, watcher)
        finally:
            self.sandbox.slurm().cancel(job)
            until(lambda: not any(j.live for j in self.sandbox.slurm().jobs(job)), "the run ends")
            shutil.rmtree(run.path, ignore_errors=True)


class Training:
    """A run that goes on."""

    def __init__(self, arena: Arena, run: RunDir, watcher: Watcher) -> None:
        self.arena, self.dir, self.watcher = arena, run, watcher

    @property
    def state(self) -> RunState:
        self.watcher.look()
        return self.watcher.state

    def full(self, groups: int, more_steps: int = 8) -> None:
        """Wait until all groups have made some more steps (those who commit, do so together)."""
        until(lambda: len(self.state.groups) >= groups and self.state.step > 0, "training begins")
        at = self.state.step
        until(
            lambda: min(g.step for g in self.state.groups.values()) >= at + more_steps,
            f"{groups} groups make {more_steps} steps",
        )

    def rank(self, replica: int) -> psutil.Process:
        """Process of rank 0 of a replica group's newest attempt."""
        lines = self.dir.events(replica).read_text().splitlines()
        starts = [e for e in map(json.loads, lines) if e["kind"] == "start"]
        return psutil.Process(starts[-1]["pid"])

    def commits(self, replica: int) -> list[tuple[float, bool]]:
        """(time, whether it succeeded) of every try of a replica group to commit."""
        found = []
        for line in self.dir.events(replica).read_text().splitlines():
            if '"kind":"commit"' in line:
                event = json.loads(line)
                found.append((event["t"], event["committed"]))
        return found

    def hold_lighthouse(self, seconds: float) -> None:
        """Kill the lighthouse and keep it away for so long."""
        address = next(
            (REPOSITORY / "outputs/torchft/lighthouses").glob(
                f"{self.arena.url[7:].replace(':', '-')}/address.json"
            )
        )
        supervisor = psutil.Process(json.loads(address.read_text())["pid"])
        (child,) = [c for c in supervisor.children() if "lighthouse_process" in str(c.cmdline())]
        supervisor.send_signal(signal.SIGSTOP)
        try:
            child.kill()
            time.sleep(seconds)
        finally:
            supervisor.send_signal(signal.SIGCONT)


def until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait for it.

    Raises:
        TimeoutError: it did not come true.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.1)
