"""Child processes that end with this one, and whatever they leave behind.

For a process of one thread that has no other children: it waits for all of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from launcher.parentage import adopt_orphans, die_with_parent


class Children:
    """Starts processes, keeps their exit codes, and finds all that descends from them."""

    def __init__(self) -> None:
        adopt_orphans()
        self._codes: dict[int, int | None] = {}
        """Of those started here; None while it runs."""

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        out: IO[bytes],
        err: IO[bytes],
        at_our_end: signal.Signals = signal.SIGKILL,
    ) -> int:
        """Start a process in a session of its own; returns its id.

        Args:
            at_our_end: the signal that it gets when this process ends, however that happens.

        Raises:
            OSError: it cannot be started.
        """
        process = subprocess.Popen(
            list(argv),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
            # One thread: nothing else can hold a lock while this runs between fork and exec.
            preexec_fn=partial(die_with_parent, at_our_end, os.getpid()),
        )
        process.returncode = 0  # waited for below, with all others
        self._codes[process.pid] = None
        return process.pid

    def code(self, pid: int) -> int | None:
        """Exit code of a process that was started here; -n when signal n ended it; None while it
        runs. Told once."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
                if ended[0] in self._codes:  # others were adopted, and are only waited for
                    self._codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
        code = self._codes[pid]
        if code is not None:
            del self._codes[pid]
        return code

    def marked(self, marks: Sequence[str]) -> list[int]:
        """Descendants whose environment has all of ``marks``, each ``NAME=value``."""
        import psutil

        wanted = {os.fsencode(mark) for mark in marks}
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
                if wanted <= set(environment):
                    found.append(process.pid)
        return found


def send(pids: Sequence[int], number: signal.Signals) -> None:
    """Send a signal to those that are still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
