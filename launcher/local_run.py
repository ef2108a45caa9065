"""Starts, shows and ends runs of one machine: no Slurm, and nobody's rights but one's own."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher import preflight
from launcher.children import send
from launcher.config import Site
from launcher.files import replace as replace_file
from launcher.lighthouse import wait_until
from launcher.local import Array, Local, LocalError, LocalFiles, LocalNode
from launcher.model import BlindError, KitError, UsageError
from launcher.process import still_runs
from launcher.rundir import Outputs, RunDir

#: What every task runs, as the job script does.
TASK = (sys.executable, "-m", "launcher.task", "replica")
#: The same of a script of the user's own, whose path and flags follow.
SCRIPT_TASK = (sys.executable, "-m", "launcher.task", "script", "--")
#: Settings of one machine, where nothing else is set.
SETTINGS = {
    "TFT_NODE_ADDRESS": "127.0.0.1",
    "TFT_INTERFACE": "lo",
}
#: Ranks of a replica group on CPU, where nothing else is set.
CPU_RANKS = 2
#: Seconds for the daemon and its lighthouse to come up, and to end everything.
START_SECONDS, STOP_SECONDS = 60.0, 75.0


def up(
    outputs: Outputs,
    config: Path,
    *,
    replicas: int,
    spares: int = 0,
    flags: Sequence[str] = (),
    env: Mapping[str, str] = os.environ,
    script: Sequence[str] = (),
    command: Sequence[str] = TASK,
) -> RunDir:
    """Start a run of ``replicas`` replica groups, with a lighthouse of its own, in the background.

    Args:
        config: torchtitan config file.
        flags: more flags for torchtitan, after those of ``TFT_EXTRA_ARGS``.
        env: environment of the tasks, which this adds to.
        script: training script of the user's own and its arguments, in place of ``config``.
        command: what every task runs.

    Raises:
        UsageError: something is missing or does not fit; nothing was started.
        KitError: the daemon did not come up; nothing is left of it.
    """
    tasks = replicas + spares
    env = _environment(env, outputs, config, spares, flags)
    gpus = _gpus(env) if (env.get("TFT_DEVICE") or "cuda") == "cuda" else None
    if not env.get("TFT_RANKS_PER_NODE"):
        ranks = CPU_RANKS if gpus is None else max(1, len(gpus) // tasks)
        env["TFT_RANKS_PER_NODE"] = str(ranks)
    site = Site.from_environment(env)
    if script:
        preflight.check_script(site, script[0])
        command = (*SCRIPT_TASK, *script)
    else:
        preflight.check(site, replicas)
    nodes = _shares(tasks, site.ranks_per_node, gpus)
    run = _new_run(outputs)
    array = Array(
        array_job_id=int(run.name.removeprefix("tft-")),
        tasks=tasks,
        nodes=nodes,
        command=tuple(command),
    )
    files = LocalFiles(run)
    try:
        files.requests.mkdir(parents=True, mode=0o700)
        replace_file(files.array_path, json.dumps(asdict(array), indent=1) + "\n")
        _start_daemon(files, env)
    except BaseException:
        for folder in (run.path, outputs.lighthouses / run.name):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return run


def down(run: RunDir, say: Callable[[str], None]) -> None:
    """End a run with everything that belongs to it.

    Raises:
        BlindError: it runs on another machine.
        KitError: its daemon does not end.
    """
    files, number = LocalFiles(run), int(run.name.removeprefix("tft-"))
    state = files.state()
    if state.ended:
        say(f"run {run.name} has ended already")
        return

    def is_gone() -> bool:
        return not still_runs(state.pid, state.process_started)

    try:
        Local(run).cancel(number)
    except LocalError:
        pass  # it is ending
    except BlindError as error:
        if state.host != socket.gethostname():
            raise
        say(str(error))
    if not is_gone():
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGTERM)
        if not wait_until(is_gone, STOP_SECONDS):
            # Whatever it has started ends with it.
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGKILL)
            if not wait_until(is_gone, STOP_SECONDS):
                raise KitError(f"process {state.pid} does not end, not even by SIGKILL")
    if left := _left_behind(run):  # by tasks that ended with a daemon that was killed
        say(f"{len(left)} processes of {run.name} were left behind, and are killed")
        send(left, signal.SIGKILL)
    state = files.state()
    if not state.ended:  # it was killed before it could say so
        tasks = [replace(t, state="CANCELLED", pid=0) if t.live else t for t in state.tasks]
        files.write(replace(state, ended=True, tasks=tuple(tasks)))
    say(f"run {run.name} is ended")


def _left_behind(run: RunDir) -> list[int]:
    """Processes of a run's tasks, when its daemon is gone."""
    import psutil

    ours = {
        "SLURM_ARRAY_JOB_ID": run.name.removeprefix("tft-"),
        "TFT_OUTPUTS": str(run.path.parent.parent),
    }
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if ours.items() <= process.environ().items():
                found.append(process.pid)
    return found


def next_steps(run: RunDir) -> list[str]:
    """What a person may want to do with a run that has just been started."""
    state = LocalFiles(run).state()
    return [
        f"run {run.name}: {len(state.tasks)} tasks on this machine, lighthouse {state.lighthouse}",
        f"  follow it:  python -m launcher monitor {run.name}",
        f"  its logs:   {os.path.relpath(run.path)}",
        f"  end it:     python -m launcher cancel {run.name}",
    ]


def _environment(
    env: Mapping[str, str], outputs: Outputs, config: Path, spares: int, flags: Sequence[str]
) -> dict[str, str]:
    """What tasks get, but for which one they are. A Slurm job that this runs in is none of theirs."""
    given = {k: v for k, v in env.items() if not k.startswith(("SLURM_", "SLURMD_", "SBATCH_"))}
    user = _user(given)
    own = {
        "TFT_CONFIG": str(config),
        "TFT_OUTPUTS": str(outputs.root),
        "TFT_SPARES": str(spares),
        "TFT_EXTRA_ARGS": " ".join(
            part for part in (given.get("TFT_EXTRA_ARGS", ""), shlex.join(flags)) if part
        ),
        "USER": user,
        "SLURM_JOB_NAME": "tft",
        "SLURM_JOB_USER": user,
        "SLURM_SUBMIT_DIR": str(Path.cwd()),
    }
    defaults = dict(SETTINGS)
    if not os.access(given.get("HOME", ""), os.W_OK):
        defaults["HF_HOME"] = str(outputs.cache)  # by its own default it is below the home
    return {**defaults, **given, **own}


def _user(env: Mapping[str, str]) -> str:
    """Who runs this; a number where the machine has no name for it, as in some containers."""
    names = (env.get(name) for name in ("LOGNAME", "USER"))
    if named := next(filter(None, names), ""):
        return named
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _gpus(env: Mapping[str, str], nvml: Any = None) -> list[str]:
    """GPUs of this machine that may be used, as ``CUDA_VISIBLE_DEVICES`` names them.

    Raises:
        UsageError: none are seen.
    """
    chosen = env.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip()]
    try:
        if nvml is None:
            import pynvml

            nvml = pynvml
        nvml.nvmlInit()
        try:
            return [str(index) for index in range(nvml.nvmlDeviceGetCount())]
        finally:
            nvml.nvmlShutdown()
    except Exception as error:
        raise UsageError(
            f"the NVIDIA driver does not answer ({error}): set TFT_DEVICE=cpu to train on CPU"
        ) from error


def _shares(tasks: int, ranks: int, gpus: Sequence[str] | None) -> tuple[LocalNode, ...]:
    """This machine as one node for each task, and more where it has GPUs for more.

    Raises:
        UsageError: it has too few GPUs.
    """
    if gpus is None:
        return tuple(LocalNode(name=f"local-{index}") for index in range(tasks))
    count = len(gpus) // ranks
    if count < tasks:
        raise UsageError(
            f"{tasks} tasks of {ranks} ranks need {tasks * ranks} GPUs, and {len(gpus)} are seen: "
            "fewer --replicas, or fewer TFT_RANKS_PER_NODE, or TFT_DEVICE=cpu"
        )
    return tuple(
        LocalNode(name=f"local-{index}", gpus=tuple(gpus[index * ranks : (index + 1) * ranks]))
        for index in range(count)
    )


def _new_run(outputs: Outputs) -> RunDir:
    """A folder for a run, whose number is Slurm's nowhere: job ids there end at 67 million
    (``MaxJobId``), and this is the time in seconds."""
    number = int(time.time())
    outputs.torchft.mkdir(parents=True, exist_ok=True)
    while True:
        run = outputs.run_of_array(number)
        try:
            run.path.mkdir()
            return run
        except FileExistsError:
            number += 1


def _start_daemon(files: LocalFiles, env: Mapping[str, str]) -> None:
    with files.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher.local_daemon", str(files.run.path)],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until(lambda: process.poll() is not None or files.state_path.exists(), START_SECONDS)
        if process.poll() is None and files.state_path.exists():
            return
        words = files.log.read_text(errors="replace").strip().splitlines()
        said = words[-1].removeprefix("error: ") if words else "it said nothing"
        raise KitError(f"the run's daemon did not come up: {said}")
    except BaseException:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
        process.wait()
        raise
