"""Runs torchrun as a child: forwards signals, keeps its exit code, says who failed and why."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from launcher.restarts import UNFIT

#: Signals that Slurm or a person sends to a task, and that its ranks should see.
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
#: Of those, the ones that ask the task to end.
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
#: Seconds that torchrun gets to end its ranks; below Slurm's KillWait default of 30.
GRACE = 20.0
#: Seconds for killed ranks to be gone.
GONE_SECONDS = 10.0
#: Seconds between two looks at whether it must be killed.
WATCH_EVERY = 0.2


class Payload:
    """One torchrun, from start to exit code."""

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        must_end: Callable[[], str] = lambda: "",
        process: subprocess.Popen[bytes] | None = None,
        on_time_limit: Callable[[], None] | None = None,
    ) -> None:
        """``must_end`` says why it must be killed at once; empty while it need not be. It is
        asked all the time, and must not block. ``process``: it runs already, so.
        ``on_time_limit``: called at SIGUSR2, which its ranks then do not see."""
        self._argv = list(argv)
        self._env = dict(env)
        self._must_end = must_end
        self._process = process
        self._on_time_limit = on_time_limit
        self.stopped_by: signal.Signals | None = None
        self.killed_for = ""
        """What ``must_end`` said when it was killed."""
        self._kill_at: float | None = None
        self._ranks: list[int] = []
        """Ranks that were there when torchrun was killed."""

    def run(self) -> int:
        """Run to the end.

        Returns:
            torchrun's exit code; 128 + n when signal n ended it, or ended us.
        """
        previous = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            if self._process is None:
                self._process = subprocess.Popen(
                    self._argv,
                    env=self._env | {"TFT_LAUNCHER": str(os.getpid())},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            if self.stopped_by is not None:
                self._send(self.stopped_by)  # it came between the two lines above
            code = self._wait(self._process)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        _await_end(self._ranks)
        if self.stopped_by is not None:
            return 128 + int(self.stopped_by)
        return 128 - code if code < 0 else code

    def tell(self, number: signal.Signals) -> None:
        """Send torchrun a signal, or the leader of several of them."""
        self._send(number)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        while True:
            try:
                return process.wait(timeout=WATCH_EVERY)
            except subprocess.TimeoutExpired:
                if not self.killed_for and (reason := self._must_end()):
                    self.killed_for = reason
                    self._send(signal.SIGKILL)
                if self._kill_at is not None and time.monotonic() > self._kill_at:
                    self._send(signal.SIGKILL)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGUSR2 and self._on_time_limit is not None:
            self._on_time_limit()
            return
        if number in ENDING and self.stopped_by is None:
            self.stopped_by = signal.Signals(number)
            self._kill_at = time.monotonic() + GRACE
        self._send(signal.Signals(number))

    def _send(self, number: signal.Signals) -> None:
        process = self._process
        if process is None or process.poll() is not None:
            return
        try:
            if number == signal.SIGKILL:
                self._ranks = _children(process.pid)
                os.killpg(process.pid, number)  # its ranks follow by their parent-death signal
            else:
                process.send_signal(number)
        except ProcessLookupError:
            pass


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError, ValueError):
        return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _await_end(pids: Sequence[int]) -> None:
    """Wait until these are gone, with their memory and their ports: others take their place."""
    deadline = time.monotonic() + GONE_SECONDS
    while any(_lives(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    return False


def why(failures: Path, code: int = 1) -> str:
    """Which rank failed first and how, from what torchrun left in ``failures``; ``code`` is
    torchrun's own, as ``Payload.run`` gives it."""
    try:
        records = _read_failures(failures)
        first = records[0]
        if "unfit" in first:  # told by the leader of a group of several nodes
            return f"{UNFIT}{first['unfit']}"
        if "problem" in first:
            return str(first["problem"])
        how_it_ended = int(first["exit_code"])
        who = f"rank {first['rank']} (pid {first['pid']})"
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        if code > 128:
            return f"torchrun was killed by {signal_name(code - 128)}"
        return "torchrun itself failed; see the lines above"
    if "node" in first:
        who += f" on {first['node']}"
    how = f"exited with code {how_it_ended}"
    if how_it_ended < 0:
        how = f"was killed by {signal_name(-how_it_ended)}"
    message = str(first.get("message", ""))
    because = f": {message}" if message and not message.startswith("Signal ") else ""
    others = f" ({len(records) - 1} more ended with it)" if len(records) > 1 else ""
    return f"{who} {how}{because}{others}"


def node_of(failures: Path) -> str:
    """Node of what ``why`` tells; empty in a group of one node, and when it is not known."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        return str(_read_failures(failures)[0].get("node", ""))
    return ""


def _read_failures(failures: Path) -> list[dict[str, Any]]:
    """The likely root cause first."""
    records: list[dict[str, Any]] = json.loads(failures.read_text(encoding="utf-8"))
    return sorted(records, key=_rank_of_blame)


def _rank_of_blame(record: dict[str, Any]) -> tuple[int, float]:
    """Sorts the likely root cause first. torch stamps failures in whole seconds, so time
    alone cannot tell a rank that was killed from the peers whose connections broke."""
    if "unfit" in record:
        return -1, 0.0
    if "problem" in record:
        return 3, 0.0
    code = int(record["exit_code"])
    if code == -signal.SIGTERM:
        order = 2  # torchrun ends the others so
    elif code < 0:
        order = 0  # killed from outside, or crashed: its peers fail because of it
    else:
        order = 1
    return order, float(record["time"])


def signal_name(number: int) -> str:
    """Its name; its number in words where it has none (a real-time signal)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def timestamp() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def say(line: str) -> None:
    """One stamped line in the task's log, ``[2025-07-16 13:51:42] …``."""
    print(f"[{timestamp()}] {line}", flush=True)


def complain(line: str) -> None:
    """One stamped line in the task's error log."""
    sys.stdout.flush()
    print(f"[{timestamp()}] {line}", file=sys.stderr, flush=True)
