"""Where the demo plays: a Slurm of three nodes on this machine, or this machine without Slurm."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import psutil

from launcher import assets, hands, local_run, packages, stacks
from launcher.children import send
from launcher.groups import Group
from launcher.local import Local
from launcher.model import KitError
from launcher.monitor import SCRIPT
from launcher.rundir import Outputs, RunDir
from launcher.sandbox import JOB_SETTINGS, Sandbox
from launcher.scheduler import Scheduler

NODES, REPLICAS = 3, 2
#: A demo's sandbox is in a folder of its own, named after its process.
FOLDERS, PREFIX = Path("/run"), "tft-demo-"
#: A step lasts at least this long, so that on a fast machine too there is training left
#: to come back to.
PACE_SECONDS = 0.4
#: Seconds that one of the README's lines may take.
COMMAND_SECONDS = 60.0

Tell = Callable[[str], None]


class Stage(Protocol):
    """A place with nodes, on which two replica groups train and one of them is lost."""

    title: str

    def set_up(self, tell: Tell) -> None:
        """Make the place; raises KitError when it cannot be made."""

    def start(self, tell: Tell) -> RunDir:
        """Start the lighthouse and the replica groups."""

    def scheduler(self, run: RunDir) -> Scheduler: ...

    def loss(self, group: Group) -> str:
        """What is going to happen to a replica group, in words."""

    def lose(self, run: RunDir, group: Group, tell: Tell) -> None:
        """Let its node be lost."""

    def mend(self, tell: Tell) -> None:
        """Give the node back."""

    def clean_up(self) -> None:
        """End everything; whatever there is of it."""


def no_slurm() -> str:
    """Why there cannot be a Slurm on this machine; empty when there can (now it is installed)."""
    if os.geteuid() != 0:
        return "a Slurm of this machine's own needs root"
    try:
        packages.install()
    except KitError as error:
        return f"Slurm cannot be installed: {error}"
    return ""


class SandboxStage:
    """A real Slurm, one node of which is set DOWN."""

    title = "A Slurm of three nodes on this machine, and text to train on"

    def __init__(self, outputs: Outputs, folder: Path | None, steps: int) -> None:
        self._outputs, self._steps = outputs, steps
        self._sandbox = Sandbox(folder or FOLDERS / f"{PREFIX}{os.getpid()}")
        self._slurm = self._sandbox.slurm()
        self._env: dict[str, str] = {}
        self._array: int | None = None
        self._node = ""

    def set_up(self, tell: Tell) -> None:
        clear_stale_folders()
        self._sandbox.up(NODES)
        assets.debug(Path("outputs"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._env = _environment(self._outputs) | {
            **self._sandbox.environment(),
            "TFT_EXTRA_ARGS": f"--training.steps {self._steps}",
            "TFT_LIGHTHOUSE_PORT": str(port),
            "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}",
        }
        tell(_exports(self._env, (*self._sandbox.environment(), "TFT_EXTRA_ARGS")))

    def start(self, tell: Tell) -> RunDir:
        command("python -m launcher lighthouse up --detach", self._env, tell)
        array = command(f"sbatch --parsable --array=0-{REPLICAS - 1} {SCRIPT}", self._env, tell)
        self._array = int(array.strip())
        return self._outputs.run_of_array(self._array)

    def scheduler(self, run: RunDir) -> Scheduler:
        return self._slurm

    def loss(self, group: Group) -> str:
        return f"Node {group.host} goes down under replica {group.replica}"

    def lose(self, run: RunDir, group: Group, tell: Tell) -> None:
        self._node = group.host
        command(f"scontrol update NodeName={self._node} State=DOWN Reason=drill", self._env, tell)

    def mend(self, tell: Tell) -> None:
        command(f"scontrol update NodeName={self._node} State=RESUME", self._env, tell)

    def clean_up(self) -> None:
        if self._env:
            with contextlib.suppress(KitError, OSError):
                if self._array is not None and self._sandbox.running():
                    self._slurm.cancel(self._array)
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                subprocess.run(
                    [sys.executable, "-m", "launcher", "lighthouse", "down"],
                    env=self._env,
                    capture_output=True,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    timeout=30,
                    check=False,
                )
        self._sandbox.down()


class LocalStage:
    """Processes of this machine; all of a replica group's are killed at once."""

    def __init__(self, outputs: Outputs, steps: int, why: str) -> None:
        self.title = f"No Slurm here ({why}): the same with processes of this machine"
        self._outputs, self._steps = outputs, steps
        self._env: dict[str, str] = {}
        self._run: RunDir | None = None

    def set_up(self, tell: Tell) -> None:
        assets.debug(Path("outputs"))
        names = ("TFT_DEVICE", "TFT_RANKS_PER_NODE", "TFT_WEIGHT_HASH_EVERY")
        settings = {name: JOB_SETTINGS[name] for name in names}
        self._env = _environment(self._outputs) | settings
        tell(_exports(self._env, names))

    def start(self, tell: Tell) -> RunDir:
        config, flags = JOB_SETTINGS["TFT_CONFIG"], ["--training.steps", str(self._steps)]
        words = f"{config} --cluster local --replicas {REPLICAS} -- {shlex.join(flags)}"
        tell(f"$ python -m launcher submit {words}")
        # Not by a command of its own: one that is interrupted would leave a run that nobody knows.
        self._run = local_run.up(
            self._outputs, Path(config), replicas=REPLICAS, flags=flags, env=self._env
        )
        for text in local_run.next_steps(self._run):
            tell(f"  {text}")
        return self._run

    def scheduler(self, run: RunDir) -> Scheduler:
        return Local(run)

    def loss(self, group: Group) -> str:
        return f"Every process of replica {group.replica} is killed, as if its node had died"

    def lose(self, run: RunDir, group: Group, tell: Tell) -> None:
        ranks = stacks.rank_pids(run.events(group.replica), group.attempt)
        pids = list(dict.fromkeys(one for rank in ranks.values() for one in hands.whole_task(rank)))
        tell(f"$ kill -KILL {' '.join(map(str, pids))}")
        send(pids, signal.SIGKILL)  # not by the command: one that is gone is none of its errors

    def mend(self, tell: Tell) -> None:
        """There is nothing to be given back."""

    def clean_up(self) -> None:
        if self._run is not None:
            with contextlib.suppress(KitError, OSError):
                local_run.down(self._run, lambda line: None)


def clear_stale_folders() -> None:
    """Take down the sandboxes of demos that were killed before they could clean up."""
    for folder in FOLDERS.glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX)
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            Sandbox(folder).down()


def command(line: str, env: Mapping[str, str], tell: Tell) -> str:
    """Run one of the README's lines, shown as it is typed; what it prints.

    Raises:
        KitError: it failed, or took too long.
    """
    tell(f"$ {line}")
    try:
        done = subprocess.run(
            shlex.split(line),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise KitError(f"`{line}` did not end within {error.timeout:g} s") from error
    for text in done.stdout.splitlines():
        tell(f"  {text}")
    if done.returncode != 0:
        raise KitError(f"`{line}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _environment(outputs: Outputs) -> dict[str, str]:
    """What a person's shell has, without settings of other runs, and the demo's pace."""
    binaries = Path(sys.executable).parent
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("TFT_", "SLURM_", "WANDB_"))
    }
    return {
        **inherited,
        "PATH": f"{binaries}:{inherited.get('PATH', '')}",
        "TFT_ENV": str(binaries.parent),
        "TFT_OUTPUTS": str(outputs.root),
        "TFT_MIN_STEP_SECONDS": str(PACE_SECONDS),
    }


def _exports(env: Mapping[str, str], names: tuple[str, ...]) -> str:
    return "export " + " ".join(f"{name}={shlex.quote(env[name])}" for name in names)
