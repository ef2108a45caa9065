"""The guardian of a run, as a process beside the lighthouse."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Seconds before a guardian that ended early is started again, doubling up to the second.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
#: Seconds that it gets to end.
STOP_SECONDS = 5.0
#: Exit codes with which it has done its work: the run has finished, or ended early; and seconds
#: before it looks again, as somebody may have put a task back into the queue.
DONE, LOOK_AGAIN = (0, 3), 60.0
#: Seconds between two looks at which run there is to guard.
LOOK_EVERY = 0.5


class GuardianChild:
    """Keeps one guardian going for the run that a lighthouse serves."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self._command = list(command)
        self._log = log
        self._env = dict(env)
        self._run: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._pause = FIRST_PAUSE
        self._next = self._looked = 0.0
        self.over = False
        """Whether it has said that its run is over."""
        self.tried = False
        """Whether it has ended at least once."""

    def due(self) -> bool:
        """Whether it is time to look again at which run there is to guard."""
        return bool(self._command) and time.monotonic() >= self._looked + LOOK_EVERY

    def tend(self, run: str | None) -> None:
        """See to it that ``run`` is guarded."""
        now = self._looked = time.monotonic()
        if run != self._run:
            self.end()
            self._run, self._pause, self._next = run, FIRST_PAUSE, 0.0
            self.tried = self.over = False
        process = self._process
        if process is not None and process.poll() is not None:
            self._process = None
            self.tried, self.over = True, process.returncode in DONE
            self._next = now + (LOOK_AGAIN if process.returncode in DONE else self._pause)
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
            return
        if process is None and run is not None and now >= self._next:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [*self._command, run],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._env,
                    start_new_session=True,
                )

    def end(self) -> None:
        """End it, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
