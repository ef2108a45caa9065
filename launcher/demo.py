"""The README's steps on a sandbox: lose a node, train on, come back, and a verdict."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from launcher import assets
from launcher.history import History
from launcher.interrupts import signals_ignored, stop_on_signals
from launcher.model import CriticalError, KitError, ReportFormat
from launcher.monitor import SCRIPT, line
from launcher.publish import write
from launcher.rundir import Outputs
from launcher.sandbox import Sandbox
from launcher.state import Notice
from launcher.verdict import judge
from launcher.watcher import Watcher

NODES, REPLICAS, LOST = 3, 2, 1
#: A demo's sandbox is in a folder of its own, named after its process.
FOLDERS, PREFIX = Path("/run"), "tft-demo-"
#: Steps that both replica groups train before the node is lost.
STEPS_BEFORE = 10
#: A step lasts at least this long, so that on a fast machine too there is training left
#: to come back to.
PACE_SECONDS = 0.4
#: Seconds each stage may take before the demo gives up (imports dominate on two cores).
DEADLINES = {"submit": 60, "train": 180, "survive": 60, "requeue": 45, "recover": 150, "end": 300}
#: Seconds of silence after which the demo says how far training is.
QUIET = 5.0


def own_folder() -> Path:
    """The sandbox folder of this very process, so that two demos never meet."""
    return FOLDERS / f"{PREFIX}{os.getpid()}"


def clear_stale_folders() -> None:
    """Take down the sandboxes of demos that were killed before they could clean up."""
    for folder in FOLDERS.glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX)
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            Sandbox(folder).down()


class Demo:
    """One pass; ``say`` gets every line."""

    def __init__(self, outputs: Path, folder: Path, steps: int, say: Callable[[str], None]) -> None:
        self._outputs = Outputs(outputs.absolute())
        self._sandbox = Sandbox(folder)
        self._slurm = self._sandbox.slurm()
        self._steps = steps
        self._say = say
        self._env: dict[str, str] = {}
        self._array: int | None = None
        self._watcher: Watcher | None = None
        self._spoke = time.monotonic()
        self._resources = contextlib.ExitStack()

    def run(self) -> bool:
        """The whole story; True when the run recovered. Leaves nothing behind."""
        try:
            with stop_on_signals():
                return self._run()
        finally:
            with signals_ignored(), self._resources:
                self._clean_up()

    def _run(self) -> bool:
        self._title("A Slurm of three nodes on this machine, and text to train on")
        clear_stale_folders()
        self._sandbox.up(NODES)
        assets.debug(Path("outputs"))
        self._env = self._environment()
        shown = {k: self._env[k] for k in (*self._sandbox.environment(), "TFT_EXTRA_ARGS")}
        self._tell("export " + " ".join(f"{k}={shlex.quote(v)}" for k, v in shown.items()))

        self._title("The lighthouse, then two replica groups")
        self._command("python -m launcher lighthouse up --detach")
        array = int(self._command(f"sbatch --parsable --array=0-{REPLICAS - 1} {SCRIPT}").strip())
        self._array = array
        run = self._outputs.run_of_array(array)
        self._wait("submit", run.manifest_path.is_file)
        watcher = self._watcher = self._resources.enter_context(Watcher.of_run(run, self._slurm))
        state, history = watcher.state, History()
        watcher.on_event = history.note
        self._wait(
            "train",
            lambda: (
                len(state.members) == REPLICAS
                and all(group.step >= STEPS_BEFORE for group in state.groups.values())
            ),
        )

        node = state.groups[LOST].host
        attempt = state.groups[LOST].attempt
        self._title(f"Node {node} goes down under replica {LOST}")
        self._command(f"scontrol update NodeName={node} State=DOWN Reason=drill")
        survivor = state.groups[1 - LOST]
        at = survivor.step
        self._wait("survive", lambda: LOST not in state.members and survivor.step > at + 2)
        self._tell(f"replica {1 - LOST} trains on alone (step {survivor.step})")
        self._wait(
            "requeue",
            lambda: bool(state.groups[LOST].waiting) or state.groups[LOST].attempt > attempt,
        )
        self._command(f"scontrol update NodeName={node} State=RESUME")
        self._wait(
            "recover",
            lambda: (
                state.groups[LOST].attempt > attempt
                and any(i.replica == LOST and i.recovered_at is not None for i in state.incidents)
            ),
        )

        self._title("Both train to the last step")
        self._wait("end", lambda: state.finished)
        watcher.look(final=True)
        verdict = judge(state, LOST)
        self._say("")
        for text in verdict.lines():
            self._say(text)
        self._say(f"logs and events: {os.path.relpath(run.path)}")
        page = write(run, watcher, history, ReportFormat.HTML)
        self._say(f"report: {os.path.relpath(page)}")
        return verdict.recovered

    def _environment(self) -> dict[str, str]:
        """What a person would export, plus a lighthouse port of the demo's own."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        binaries = Path(sys.executable).parent
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("TFT_", "SLURM_", "WANDB_"))
        }
        return {
            **inherited,
            "PATH": f"{binaries}:{inherited.get('PATH', '')}",
            **self._sandbox.environment(),
            "TFT_ENV": str(binaries.parent),
            "TFT_OUTPUTS": str(self._outputs.root),
            "TFT_EXTRA_ARGS": f"--training.steps {self._steps}",
            "TFT_MIN_STEP_SECONDS": str(PACE_SECONDS),
            "TFT_LIGHTHOUSE_PORT": str(port),
            "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}",
        }

    def _command(self, command: str) -> str:
        """Run one of the README's lines, shown as it is typed."""
        self._tell(f"$ {command}")
        try:
            done = subprocess.run(
                shlex.split(command),
                env=self._env,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise KitError(f"`{command}` did not end within {error.timeout:g} s") from error
        for text in done.stdout.splitlines():
            self._tell(f"  {text}")
        if done.returncode != 0:
            raise KitError(f"`{command}` failed: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def _wait(self, stage: str, condition: Callable[[], bool]) -> None:
        """Watch the run, telling its story, until ``condition``.

        Raises:
            CriticalError: it did not come true in time, or a task failed.
        """
        deadline = time.monotonic() + DEADLINES[stage]
        while not condition():
            watcher = self._watcher
            if watcher is not None:
                for notice in watcher.look():
                    self._tell(notice.text, notice.t)
                self._say_progress(watcher)
                if watcher.live_tasks == 0:
                    # Slurm may know of the end before its last lines have been read.
                    time.sleep(1.0)
                    for notice in watcher.look(final=True):
                        self._tell(notice.text, notice.t)
                    if not condition():
                        raise CriticalError(
                            f"no task is left in Slurm's queue (waiting for: {stage}); see the "
                            f"logs in {self._outputs.torchft}"
                        )
            if time.monotonic() > deadline:
                where = self._outputs.torchft
                raise CriticalError(
                    f"not within {DEADLINES[stage]} s (waiting for: {stage}); logs: {where}"
                )
            time.sleep(0.2)

    def _say_progress(self, watcher: Watcher) -> None:
        if time.monotonic() - self._spoke < QUIET:
            return
        groups = watcher.state.groups.values()
        parts = [f"replica {g.replica} {g.state.value.lower()} step {g.step}" for g in groups]
        losses = [f"loss {g.loss:.3f}" for g in groups if g.loss is not None][:1]
        self._tell("… " + ", ".join([*parts, *losses]))

    def _title(self, text: str) -> None:
        self._say("")
        self._say(f"== {text}")

    def _tell(self, text: str, t: float | None = None) -> None:
        self._spoke = time.monotonic()
        self._say(line(Notice(t if t is not None else time.time(), text)))

    def _clean_up(self) -> None:
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


def run_demo(outputs: Path, folder: Path | None, steps: int, *, say: Callable[[str], None]) -> int:
    """Run the demo; its exit code.

    Raises:
        CriticalError: the run did not recover.
    """
    started = time.monotonic()
    try:
        recovered = Demo(outputs, folder or own_folder(), steps, say).run()
    except KeyboardInterrupt:
        say("interrupted: everything that was started is ended")
        return 130
    say(f"demo took {time.monotonic() - started:.0f} s")
    if not recovered:
        raise CriticalError("the run did not recover: see the verdict")
    return 0
