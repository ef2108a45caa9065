"""Plays Slurm's part for one run of one machine: ``python -m launcher.local_daemon RUN_FOLDER``.

It starts the run's lighthouse and then its tasks, with the environment that Slurm would give
them, starts them again when it is asked to, and ends when nothing is left to do. Whatever it has
started ends with it, also when it is killed: two copies of a group would be worse than none.

::

    PENDING ─► RUNNING ─► COMPLETING (its last processes end) ─┬─ exit code 0 ──────► COMPLETED
       ▲                                                       ├─ another one ──────► FAILED
       └───────────── requeued, or exit code 75 ◄──────────────┤
                                                               └─ told to end ──────► CANCELLED
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from launcher.children import Children, send
from launcher.files import read_json
from launcher.files import replace as replace_file
from launcher.keeper import ELSEWHERE_CODE
from launcher.local import SIGN_EVERY, TIME, LocalError, LocalFiles, LocalNode, LocalTask, State
from launcher.local_lighthouse import OwnLighthouse
from launcher.model import KitError
from launcher.payload import say, signal_name
from launcher.process import start_time
from launcher.rundir import RunDir

#: Seconds between two looks at everything.
LOOK_EVERY = 0.1
#: Seconds from SIGTERM to SIGKILL, as Slurm's KillWait; a launcher takes 20 for its ranks.
KILL_SECONDS = 30.0
#: Seconds for killed processes to be gone, before their task counts as ended without that.
GONE_SECONDS = 60.0
#: Seconds between two starts of one task: what fails at once must not do so all the time.
START_EVERY = 2.0
#: Seconds without a live task after which nobody is expected to requeue one: longer than a
#: guardian waits before it says that a run has ended early.
LINGER_SECONDS = 150.0
#: Seconds between two lines about what cannot be done and is tried again.
COMPLAIN_EVERY = 60.0


@dataclass(slots=True)
class Running:
    """What the daemon alone knows of a task."""

    then: str = ""
    """``requeue`` or ``cancel``: what comes of it when it has ended."""
    kill_at: float | None = None
    code: int | None = None
    """Its launcher's exit code, while the rest of its processes end."""
    gone_by: float = 0.0
    not_before: float = 0.0
    """When it may start (monotonic)."""


class Lighthouse(Protocol):
    """The run's lighthouse."""

    @property
    def url(self) -> str: ...
    def keep(self) -> None: ...
    def end(self) -> None: ...


def tell(line: str) -> None:
    """One line in the daemon's log; a disk that is full costs the line, and nothing else."""
    with contextlib.suppress(OSError):
        say(line)


class Daemon:
    """Runs the tasks of one run."""

    def __init__(
        self, run: RunDir, children: Children, lighthouse: Lighthouse, env: Mapping[str, str]
    ) -> None:
        self._run, self._children, self._lighthouse = run, children, lighthouse
        self._files = LocalFiles(run)
        self._array = self._files.array()
        self._env = dict(env)
        self._tasks = [LocalTask(task=i, state="PENDING") for i in range(self._array.tasks)]
        self._running = [Running() for _ in self._tasks]
        self._process_started = start_time(os.getpid())
        self._written: State | None = None
        self._signed = 0.0
        self._complained = float("-inf")
        self._idle_since: float | None = None
        self._ended = False
        self.stopping = False
        """Set to have everything ended, and the daemon with it."""

    def run(self) -> None:
        """Run until nothing is left to do."""
        try:
            while not self._ended:
                try:
                    self.look()
                except Exception as error:  # a full disk, perhaps: the run's life hangs on us
                    self._complain(f"something cannot be done now: {error!r}")
                    time.sleep(SIGN_EVERY)
                time.sleep(LOOK_EVERY)
        finally:
            self._lighthouse.end()
            self._write()

    def look(self) -> None:
        """One look at everything: requests, tasks, the lighthouse, and whether this is the end."""
        self._lighthouse.keep()
        self._answer_all()
        if self.stopping:
            self._cancel()
        for index in range(len(self._tasks)):
            self._tend(index)
        self._ended = self._is_over()
        if not self._ended:  # that is written when the lighthouse has ended, too
            self._write()

    # -- tasks -------------------------------------------------------------------------

    def _tend(self, index: int) -> None:
        task, running, now = self._tasks[index], self._running[index], time.monotonic()
        if task.state == "PENDING":
            self._start_if_possible(index)
        elif task.pid:
            code = self._children.code(task.pid)
            if code is not None:
                running.code, running.gone_by = code, now + GONE_SECONDS
                self._set(index, state="COMPLETING", pid=0)
            elif running.kill_at is not None and now > running.kill_at:
                send(self._processes(index), signal.SIGKILL)
        if running.code is not None:
            left = self._processes(index)
            send(left, signal.SIGKILL)
            if left and now < running.gone_by:
                return
            if left:
                tell(f"task {index}: processes {left} do not end, not even by SIGKILL")
            self._conclude(index, running.code)

    def _conclude(self, index: int, code: int) -> None:
        """Say what has come of a task that has ended with all its processes."""
        then = self._running[index].then
        before = self._running[index].not_before
        self._running[index] = Running(not_before=before)
        how = f"exit code {code}" if code >= 0 else signal_name(-code)
        if then == "cancel":
            state = "CANCELLED"
        elif then == "requeue" or code == ELSEWHERE_CODE:
            state = "PENDING"
        else:
            state = "COMPLETED" if code == 0 else "FAILED"
        tell(f"task {index} ended ({how}): {state}")
        if state == "PENDING":
            self._queue_again(index)
        else:
            self._set(index, state=state)

    def _queue_again(self, index: int) -> None:
        restarts = self._tasks[index].restarts + 1
        self._set(
            index, state="PENDING", reason="StartedJustNow", node="", start=0.0, restarts=restarts
        )

    def _start_if_possible(self, index: int) -> None:
        task, running = self._tasks[index], self._running[index]
        if time.monotonic() < running.not_before:
            return
        node = self._free_node(index)
        if node is None:
            self._set(index, reason="Resources")
            return
        running.not_before = time.monotonic() + START_EVERY
        try:
            with self._log(index, "out") as out, self._log(index, "err") as err:
                pid = self._children.start(
                    self._array.command, self._environment(task, node), out, err
                )
        except OSError as error:
            tell(f"task {index} cannot be started: {error}")
            self._set(index, state="FAILED", reason="launch failed")
            return
        tell(f"task {index} started on {node.name} (pid {pid})")
        self._set(index, state="RUNNING", node=node.name, reason="None", pid=pid, start=time.time())

    def _log(self, index: int, stream: str) -> Any:
        return self._run.log(index, stream).open("ab")

    def _free_node(self, index: int) -> LocalNode | None:
        """Its own node if that may be used, else any; None while there is none."""
        taken = {task.node for task in self._tasks if task.live and task.node}
        nodes = [*self._array.nodes[index : index + 1], *self._array.nodes]
        left_out = {*taken, *self._tasks[index].exclude}
        return next((node for node in nodes if node.name not in left_out), None)

    def _marks(self, index: int) -> dict[str, str]:
        """What the environment of a task's processes, and of no others, has."""
        ident = str(self._array.array_job_id)
        return {"SLURM_ARRAY_JOB_ID": ident, "SLURM_ARRAY_TASK_ID": str(index)}

    def _environment(self, task: LocalTask, node: LocalNode) -> dict[str, str]:
        """What Slurm would set."""
        env = {
            **self._env,
            **self._marks(task.task),
            "SLURM_ARRAY_TASK_COUNT": str(self._array.tasks),
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_MAX": str(self._array.tasks - 1),
            "SLURM_JOB_ID": str(self._array.array_job_id),
            "SLURM_JOB_NUM_NODES": "1",
            "SLURMD_NODENAME": node.name,
            "TORCHFT_LIGHTHOUSE": self._lighthouse.url,
        }
        if task.restarts:
            env["SLURM_RESTART_COUNT"] = str(task.restarts)
        if node.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(node.gpus)
        return env

    def _processes(self, index: int) -> list[int]:
        return self._children.marked([f"{k}={v}" for k, v in self._marks(index).items()])

    # -- what is asked ---------------------------------------------------------------

    def _answer_all(self) -> None:
        for path in sorted(self._files.requests.glob("*.json")):
            said: dict[str, str] = {}
            try:
                request = read_json(path)
                path.unlink(missing_ok=True)
                if request is None:
                    continue  # who asked has given up
                self._do(request)
            except (KitError, OSError, KeyError, TypeError, ValueError) as error:
                path.unlink(missing_ok=True)
                said = {"error": str(error) if isinstance(error, KitError) else repr(error)}
            with contextlib.suppress(KitError):
                replace_file(path.with_suffix(".answer"), json.dumps(said) + "\n")

    def _do(self, request: Mapping[str, Any]) -> None:
        what = request["do"]
        if self.stopping or self._ended:
            raise LocalError(f"{self._run.name} is ending")
        if what == "cancel":
            tell("asked to cancel every task")
            self._cancel()
            return
        index = int(request["task"])
        if index not in range(len(self._tasks)):
            raise LocalError(f"{self._run.name} has tasks 0 to {len(self._tasks) - 1}, not {index}")
        if what == "requeue":
            self._requeue(index)
        elif what == "start_now":
            self._start_now(index, request.get("exclude"))
        else:
            raise LocalError(f"{what!r} is nothing that can be asked")

    def _requeue(self, index: int) -> None:
        task = self._tasks[index]
        if task.state == "PENDING":
            raise LocalError(f"task {index} is pending already")
        if self._running[index].then == "cancel":
            raise LocalError(f"task {index} is being cancelled")
        tell(f"task {index} ({task.state}) is requeued")
        if task.live:
            self._tell_to_end(index, "requeue", " DUE TO JOB REQUEUE")
        else:
            self._queue_again(index)

    def _start_now(self, index: int, exclude: Sequence[str] | None) -> None:
        if exclude is not None:
            known = {node.name for node in self._array.nodes}
            if unknown := [name for name in exclude if name not in known]:
                raise LocalError(f"{self._run.name} has no node {unknown[0]!r}")
            self._set(index, exclude=tuple(exclude))
        if self._tasks[index].state == "PENDING":
            self._running[index].not_before = 0.0

    def _cancel(self) -> None:
        for index, task in enumerate(self._tasks):
            if task.state == "PENDING":
                self._set(index, state="CANCELLED", reason="None")
            elif task.live:
                self._tell_to_end(index, "cancel", "")

    def _tell_to_end(self, index: int, then: str, why: str) -> None:
        """Send SIGTERM, once, and say so in the task's log, as Slurm does."""
        task, running = self._tasks[index], self._running[index]
        told, running.then = bool(running.then), then
        if told or not task.pid:
            return
        stamp = time.strftime(TIME)
        with contextlib.suppress(OSError), self._log(index, "err") as log:
            name = f"{self._array.array_job_id}_{index}"
            log.write(
                f"tft-local: error: *** JOB {name} ON {task.node} CANCELLED AT {stamp}{why} ***\n"
                .encode()
            )  # fmt: skip
        running.kill_at = time.monotonic() + KILL_SECONDS
        send([task.pid], signal.SIGTERM)
        self._set(index, state="COMPLETING")

    # -- itself ------------------------------------------------------------------------

    def _set(self, index: int, **changes: Any) -> None:
        self._tasks[index] = replace(self._tasks[index], **changes)

    def _is_over(self) -> bool:
        if any(task.live for task in self._tasks):
            self._idle_since = None
            return False
        if self.stopping or self._run.finished.exists():
            return True
        if all(task.state in ("CANCELLED", "COMPLETED") for task in self._tasks):
            return True
        # Some have failed: the guardian, or a person, may requeue them.
        if self._idle_since is None:
            self._idle_since = time.monotonic()
        return time.monotonic() - self._idle_since > LINGER_SECONDS

    def _write(self) -> None:
        """Keep the state where it has changed, and give a sign of life."""
        state = State(
            host=socket.gethostname(),
            pid=os.getpid(),
            process_started=self._process_started,
            lighthouse=self._lighthouse.url,
            ended=self._ended,
            tasks=tuple(self._tasks),
        )
        now = time.monotonic()
        try:
            if state != self._written:
                self._files.write(state)
                self._written, self._signed = state, now
            elif now - self._signed > SIGN_EVERY:
                os.utime(self._files.state_path)
                self._signed = now
        except (KitError, OSError) as error:
            self._written = None  # to be tried again
            self._complain(f"the state is not kept: {error}")

    def _complain(self, problem: str) -> None:
        """Tell of what will be tried again, not every time."""
        if time.monotonic() - self._complained > COMPLAIN_EVERY:
            self._complained = time.monotonic()
            tell(problem)


def main(words: Sequence[str]) -> int:
    """Be the daemon of the run in the folder that is named; returns an exit code."""
    run, children, env = RunDir(Path(words[0])), Children(), dict(os.environ)
    try:
        lighthouse = OwnLighthouse(run, children, env, tell)
        daemon = Daemon(run, children, lighthouse, env)

        def stop(number: int, frame: object) -> None:
            daemon.stopping = True

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, stop)
        lighthouse.come_up(lambda: daemon.stopping)
        daemon.run()
    except KitError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
