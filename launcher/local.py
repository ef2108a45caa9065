"""What a run of one machine is asked instead of Slurm: the files of its daemon.

::

    outputs/torchft/tft-<A>/local/
      array.json            what is run: tasks, nodes, command (written before the daemon starts)
      state.json            how every task stands; its age is the daemon's sign of life
      daemon.log            what the daemon did
      requests/<id>.json    one thing that it is asked to do; taken away when it is taken on
      requests/<id>.answer  what came of it; taken away by who asked

Only who may write the run's folder can ask. The daemon is `launcher/local_daemon.py`.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.files import read_json, replace
from launcher.model import BlindError, KitError
from launcher.process import still_runs
from launcher.rundir import RunDir
from launcher.slurm import FINAL_STATES, Job, Node

#: Seconds for the daemon to answer; it looks ten times a second.
ANSWER_SECONDS = 15.0
#: Seconds between two signs of life of the daemon, and after which it counts as hung.
SIGN_EVERY, SILENT_SECONDS = 1.0, 30.0
#: How times are written, as squeue does.
TIME = "%Y-%m-%dT%H:%M:%S"


class LocalError(KitError):
    """The daemon of a local run answered, and refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNode:
    """A share of this machine: what one task at a time has."""

    name: str
    gpus: tuple[str, ...] = ()
    """Its GPUs, as ``CUDA_VISIBLE_DEVICES`` names them; empty: none is its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Array:
    """What a daemon runs."""

    array_job_id: int
    tasks: int
    nodes: tuple[LocalNode, ...]
    command: tuple[str, ...]
    """Of every task; which one it is says its environment, as in a Slurm array."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalTask:
    """How one task stands."""

    task: int
    state: str
    """In Slurm's words."""
    node: str = ""
    reason: str = "None"
    start: float = 0.0
    """When it started, Unix seconds; 0: it has not."""
    exclude: tuple[str, ...] = ()
    """Nodes on which it must not start."""
    pid: int = 0
    """Its launcher, while that runs."""
    restarts: int = 0

    @property
    def live(self) -> bool:
        return self.state not in FINAL_STATES


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the daemon says of itself and of its tasks."""

    host: str
    pid: int
    process_started: float
    """Start time of that process, Unix seconds: process ids are reused."""
    lighthouse: str
    ended: bool
    """Whether the daemon has ended in order: nothing changes any more."""
    tasks: tuple[LocalTask, ...]


class LocalFiles:
    """The files of one daemon."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.array_path = run.local / "array.json"
        self.state_path = run.local / "state.json"
        self.log = run.local / "daemon.log"
        self.requests = run.local / "requests"

    def array(self) -> Array:
        """What is run.

        Raises:
            BlindError: that is not written down, or cannot be read.
        """
        raw = self._read(self.array_path)
        try:
            nodes = tuple(LocalNode(name=n["name"], gpus=tuple(n["gpus"])) for n in raw["nodes"])
            return Array(**{**raw, "nodes": nodes, "command": tuple(raw["command"])})
        except (TypeError, KeyError) as error:
            raise BlindError(f"{self.array_path} is not understood: {error}") from error

    def state(self) -> State:
        """What the daemon wrote last; whether it still lives is another question.

        Raises:
            BlindError: it has written nothing, or that cannot be read.
        """
        raw = self._read(self.state_path)
        try:
            tasks = tuple(LocalTask(**{**t, "exclude": tuple(t["exclude"])}) for t in raw["tasks"])
            return State(**{**raw, "tasks": tasks})
        except (TypeError, KeyError) as error:
            raise BlindError(f"{self.state_path} is not understood: {error}") from error

    def write(self, state: State) -> None:
        """Keep ``state``.

        Raises:
            KitError: it cannot be written.
        """
        replace(self.state_path, json.dumps(asdict(state), indent=1) + "\n")

    def living(self) -> State:
        """The state, of a daemon that has ended in order or is certainly alive.

        Raises:
            BlindError: the daemon is gone, hangs, or is on another machine.
        """
        state = self.state()
        if state.ended:
            return state
        name = self.run.name
        if state.host != socket.gethostname():
            raise BlindError(f"{name} runs on {state.host}, and can only be asked about there")
        if not still_runs(state.pid, state.process_started):
            raise BlindError(
                f"the daemon of {name} (pid {state.pid}) is gone, and its tasks with it: "
                f"`python -m launcher cancel {name}` puts that on record, and ends what "
                f"is left; its log: {self.log}"
            )
        with contextlib.suppress(OSError):
            if (age := time.time() - self.state_path.stat().st_mtime) > SILENT_SECONDS:
                raise BlindError(
                    f"the daemon of {name} (pid {state.pid}) has given no sign for {age:.0f} s"
                )
        return state

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            raw = read_json(path)
        except KitError as error:
            raise BlindError(str(error)) from error
        if raw is None:
            raise BlindError(f"{self.run.name} has no {path.name} in {path.parent}")
        return raw


class Local:
    """A run of one machine, asked as `launcher.slurm.Slurm` is."""

    name = "the daemon"

    def __init__(self, run: RunDir, patience: float = ANSWER_SECONDS) -> None:
        self._files = LocalFiles(run)
        self._run = run.name
        self._patience = patience

    def jobs(self, *job_ids: int) -> list[Job]:
        """Array tasks of these jobs, finished ones too; empty when they are other runs'.

        Raises:
            BlindError: the daemon could not be asked.
        """
        if self._id not in job_ids:
            return []
        return [
            Job(
                job_id=self._id,
                array_job_id=self._id,
                task=task.task,
                state=task.state,
                node=task.node,
                reason=task.reason,
                start=time.strftime(TIME, time.localtime(task.start)) if task.start else "",
            )
            for task in self._files.living().tasks
        ]

    def nodes(self) -> list[Node]:
        """Every share of this machine once.

        Raises:
            BlindError: the daemon could not be asked.
        """
        taken = {task.node for task in self._files.living().tasks if task.live}
        return [
            Node(name=node.name, state="alloc" if node.name in taken else "idle", reason="none")
            for node in self._files.array().nodes
        ]

    def arrays_on(self, node: str) -> list[int]:
        """Runs that have tasks on ``node``: this one or none.

        Raises:
            BlindError: the daemon could not be asked.
        """
        here = any(task.node == node and task.live for task in self._files.living().tasks)
        return [self._id] if here else []

    def time_limit(self, task: str) -> str:
        """Time limit of an array task: there is none."""
        self._index(task)
        return "UNLIMITED"

    def requeue(self, task: str) -> None:
        """End an array task (``<array job>_<index>``) if it runs, and start it again.

        Raises:
            LocalError: it waits for its start already, or the daemon has ended.
            BlindError: the daemon could not be asked.
        """
        self._ask("requeue", task=self._index(task))

    def release(self, task: str) -> None:
        """Let a held task run: none is ever held."""
        self._index(task)

    def start_now(self, task: str, exclude: Sequence[str] | None = None) -> None:
        """Start a waiting task as soon as a node is free.

        Args:
            exclude: nodes on which it must not start; None leaves that as it is.

        Raises:
            LocalError: there is no such task or node, or the daemon has ended.
            BlindError: the daemon could not be asked.
        """
        left_out = None if exclude is None else list(exclude)
        self._ask("start_now", task=self._index(task), exclude=left_out)

    def excluded_nodes(self, task: str) -> list[str]:
        """Nodes on which a task must not start.

        Raises:
            BlindError: the daemon could not be asked.
        """
        index = self._index(task)
        return [name for t in self._files.living().tasks if t.task == index for name in t.exclude]

    def cancel(self, job: int | str) -> None:
        """End every task of the run, as ``scancel`` does: SIGTERM, and SIGKILL later.

        Raises:
            LocalError: this is another run, or the daemon has ended.
            BlindError: the daemon could not be asked.
        """
        if job != self._id:
            raise LocalError(f"only the whole of {self._run} can be cancelled, and not {job}")
        self._ask("cancel")

    def hostnames(self, nodelist: str) -> list[str]:
        """Names in a list of nodes."""
        return nodelist.split(",")

    @property
    def _id(self) -> int:
        return int(self._run.removeprefix("tft-"))

    def _index(self, task: str) -> int:
        match = re.fullmatch(r"(\d+)_(\d+)", task)
        if match is None or int(match[1]) != self._id:
            raise ValueError(f"not the name of an array task of {self._run}: {task!r}")
        return int(match[2])

    def _ask(self, what: str, **fields: object) -> None:
        if self._files.living().ended:
            raise LocalError(f"{what}: {self._run} has ended, and its daemon with it")
        ident = secrets.token_hex(8)
        request = self._files.requests / f"{ident}.json"
        answer = self._files.requests / f"{ident}.answer"
        try:
            replace(request, json.dumps({"do": what, **fields}) + "\n")
        except KitError as error:
            raise BlindError(f"the daemon of {self._run} cannot be asked: {error}") from error
        deadline = time.monotonic() + self._patience
        while (said := read_json(answer)) is None:
            if time.monotonic() > deadline:
                request.unlink(missing_ok=True)  # not to be done later, when nobody expects it
                self._files.living()  # says more, if the daemon is gone
                raise BlindError(
                    f"the daemon of {self._run} did not answer within {self._patience:g} s"
                )
            time.sleep(0.02)
        answer.unlink(missing_ok=True)
        if said.get("error"):
            raise LocalError(f"{what}: {said['error']}")
