"""The doctor's jobs, from the login node: submitted, waited for with a limit, and cancelled.

The node and this machine talk through files in one folder of the shared file system, which is one
of the things to be tested.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.doctor_node import ALLREDUCE_SECONDS, IMPORT_SECONDS, PING_SECONDS
from launcher.files import overwrite, read_json
from launcher.interrupts import signals_ignored
from launcher.model import KitError, UsageError
from launcher.rundir import Outputs, Visit
from launcher.slurm import Job, Slurm
from launcher.target import Target

#: The job script, from the root of the repository.
SCRIPT = "slurm/doctor.sbatch"
#: Seconds for which a job may wait in the queue.
QUEUE_SECONDS = 60.0
#: Seconds after a job's end in which its files may still appear here: as long as a network file
#: system keeps an old listing of a folder by default (NFS's acdirmax).
APPEAR_SECONDS = 60.0
#: Seconds from a job's start to its first word: the environment is new to the node.
ARRIVE_SECONDS = 90.0
#: Seconds that a cancelled job may take to end.
END_SECONDS = 15.0
#: Seconds between two looks at files, and at Slurm.
FILES_EVERY, SLURM_EVERY = 0.05, 1.0
#: Minutes that Slurm lets each job run.
NODE_MINUTES, DEEP_MINUTES = 4, 5


@dataclass(slots=True, kw_only=True)
class Found:
    """What one job brought back."""

    problem: str = ""
    """Why it brought back nothing; empty when it did."""
    ran_on: str = ""
    """Node, as Slurm says, where the job ran and its word did not arrive; else empty."""
    wrote: bool = False
    """Whether Slurm's log of it was seen here, which is written on the node."""
    refused: str = ""
    """What the job script said when it could not start Python."""
    host: str = ""
    round_trip: float | None = None
    """Seconds from a change of a file here until the node's answer to it was seen here."""
    clock: tuple[float, float] | None = None
    """Least and greatest seconds by which the node's clock may be ahead of ours."""
    node: Mapping[str, Any] = field(default_factory=dict)
    """Findings of one node (``doctor_node.look``)."""
    parts: Sequence[Mapping[str, Any]] = ()
    """Of an all-reduce: what each node said."""
    allreduce: Mapping[str, Any] | None = None


class Errand:
    """One visit to the nodes: a folder, and the jobs that use it. ``left`` says what could not be
    put back, and how to."""

    def __init__(
        self, target: Target, slurm: Slurm, token: str, say: Callable[[str], None]
    ) -> None:
        self._target = target
        self._slurm = slurm
        self._token = token
        self._say = say
        self.left = ""
        self.visit = Outputs(target.outputs).visit(token)

    def node(self, asked: Mapping[str, Any], queue_seconds: float = QUEUE_SECONDS) -> Found:
        """Look at one node; it finds ``asked`` (JSON) there.

        Raises:
            KitError: nothing could be submitted, or the folder not be written.
        """
        asked = {**asked, "token": self._token}
        flags = ["--ntasks=1", "--cpus-per-task=1", "--mem=4G", f"--time={NODE_MINUTES}"]
        found = Found()
        with self._job("node", asked, flags) as job:
            self._await_node(job, found, asked, time.monotonic() + queue_seconds)
        return found

    def deep(self, nodes: int, queue_seconds: float = QUEUE_SECONDS) -> Found:
        """An all-reduce over ``nodes`` nodes; raises as ``node`` does."""
        ranks = self._target.ranks_per_node if self._target.device == "cuda" else 1
        flags = [
            f"--nodes={nodes}",
            "--ntasks-per-node=1",
            f"--cpus-per-task={2 * ranks}",
            f"--mem={4 + 4 * ranks}G",
            f"--time={DEEP_MINUTES}",
        ]
        if self._target.device == "cuda":
            flags.append(f"--gpus-per-node={ranks}")
        found = Found()
        with self._job("deep", {"token": self._token, "ranks": ranks}, flags) as job:
            self._await_parts(job, found, nodes, time.monotonic() + queue_seconds)
        return found

    @contextlib.contextmanager
    def _job(self, mode: str, asked: Mapping[str, Any], flags: Sequence[str]) -> Iterator[int]:
        """A job and its folder, both gone afterwards, however this is left."""
        if not Path(SCRIPT).is_file():
            raise UsageError(f"no {SCRIPT} here: run the doctor from the root of the repository")
        name = f"tft-doctor-{self._token}"
        settings = [f"--job-name={name}", f"--output={str(self.visit.log).replace('%', '%%')}"]
        begun = False
        try:
            try:
                self.visit.path.mkdir(parents=True, mode=0o700)
                self._ask(asked)
            except OSError as error:
                raise KitError(f"cannot write {self.visit.path}: {error.strerror}") from error
            begun = True
            all_flags = [*self._target.flags(), *flags, *settings]
            yield self._slurm.submit(all_flags, SCRIPT, [mode, str(self.visit.path)])
        finally:
            with signals_ignored():
                if begun:
                    self.left = self._end(name)
                _remove(self.visit.path)

    def _end(self, name: str) -> str:
        """Cancel by name, which also finds a job whose id was never heard; what stays, in words."""
        try:
            self._slurm.cancel_named(name)
            deadline = time.monotonic() + END_SECONDS
            while self._slurm.queued(name):
                if time.monotonic() > deadline:
                    return f"the doctor's job still ends: `squeue --name={name}`"
                time.sleep(0.2)
        except KitError as error:
            return f"the doctor's job may still run ({error}): `scancel --me --name={name}`"
        return ""

    def _ask(self, asked: Mapping[str, Any]) -> None:
        overwrite(self.visit.asked, json.dumps(asked) + "\n")

    def _await_node(
        self, job: int, found: Found, asked: Mapping[str, Any], queue_until: float
    ) -> None:
        self._say(f"waiting for a node for a small job ({job}) …")
        arrived = self._await(self.visit.arrived, job, found, ARRIVE_SECONDS, queue_until)
        if arrived is None:
            return
        found.host = str(arrived["host"])
        self._say(f"looking at {found.host} …")
        before, begun = time.time(), time.monotonic()
        self._ask({**asked, "ping": True})
        pong = self._await(self.visit.pong, job, found, PING_SECONDS)
        if pong is not None:
            found.round_trip = time.monotonic() - begun
            found.clock = (pong["time"] - time.time(), pong["time"] - before)
        # Without an answer the node goes on all the same.
        known = self._await(self.visit.findings, job, found, IMPORT_SECONDS + 30.0)
        if known is not None:
            found.node, found.problem = known, ""

    def _await_parts(self, job: int, found: Found, nodes: int, queue_until: float) -> None:
        self._say(f"waiting for {nodes} nodes for an all-reduce ({job}) …")
        for number in range(nodes):
            seconds = ALLREDUCE_SECONDS + 20.0
            path = self.visit.part(number)
            if self._await(path, job, found, seconds, queue_until) is None:
                break
        known = (_read(self.visit.part(number)) for number in range(nodes))
        parts = [part for part in known if part is not None]
        found.parts = parts
        found.allreduce = _read(self.visit.allreduce)
        failures = [f"{part['host']}: {part['failure']}" for part in parts if part["failure"]]
        if failures:
            found.problem = failures[0]
        elif found.allreduce is None and not found.problem:
            found.problem = "rank 0 wrote no result: " + (_last_line(self.visit.log) or "no log")

    def _await(
        self, path: Path, job: int, found: Found, seconds: float, queue_until: float = 0.0
    ) -> dict[str, Any] | None:
        """The JSON in ``path`` once it is there; None when it does not come, with the problem
        put down in ``found``.

        Args:
            seconds: for which it is waited once the job runs.
            queue_until: until when the job may wait for a node (``time.monotonic()``).
        """
        runs_since = ended = 0.0
        next_look = time.monotonic() + SLURM_EVERY / 2
        while True:
            if (known := _read(path)) is not None:
                return known
            if (said := _refusal(self.visit)) is not None:
                found.host, found.refused = said
                return None
            time.sleep(FILES_EVERY)
            if (now := time.monotonic()) < next_look:
                continue
            next_look = now + SLURM_EVERY
            task = self._task(job)
            if task is None or task.state in ("PENDING", "CONFIGURING"):
                if now > queue_until:
                    found.problem = _waits(task)
                    return None
                continue
            runs_since = runs_since or now
            if task.live and now < runs_since + seconds:
                continue
            ended = ended or now
            # Its files may come late; but not the one, when the other of the same folder is here.
            said_here = _last_line(self.visit.log)
            if not task.live and now < ended + (SLURM_EVERY if said_here else APPEAR_SECONDS):
                continue
            found.ran_on = task.node
            found.wrote = _is_listed(self.visit.log)
            found.problem = f"the job on {task.node} is {task.state}"
            found.problem += f": {said_here}" if said_here else f", and {path.name} did not come"
            return None

    def _task(self, job: int) -> Job | None:
        found = self._slurm.jobs(job)
        return found[0] if found else None


def _remove(folder: Path) -> None:
    """Also where a network file system keeps a file for as long as somebody has it open."""
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.3)


def _waits(task: Job | None) -> str:
    if task is None:
        return "Slurm knows nothing of the job any more"
    return f"no node came free in time: the job waits ({task.reason})"


def _read(path: Path) -> dict[str, Any] | None:
    """Read past what a network file system remembers of a folder: listing it asks anew."""
    with contextlib.suppress(OSError, KitError):
        if _is_listed(path):
            return read_json(path)
    return None


def _is_listed(path: Path) -> bool:
    return path.name in os.listdir(path.parent)


def _refusal(visit: Visit) -> tuple[str, str] | None:
    with contextlib.suppress(OSError):
        lines = visit.refused.read_text(errors="replace").splitlines()
        if len(lines) >= 2:
            return lines[0], lines[1]
    return None


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""
    return ""
