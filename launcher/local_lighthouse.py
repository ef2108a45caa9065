"""The lighthouse of a run of one machine: for that run alone, as a child of its daemon."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping

from launcher.children import Children, send
from launcher.lighthouse import LighthouseDir
from launcher.model import KitError
from launcher.rundir import Outputs, RunDir

#: Address that everything of such a run uses.
HOST = "127.0.0.1"
#: Seconds for its supervisor to publish it, and to end.
START_SECONDS, STOP_SECONDS = 45.0, 15.0
#: Ports that are tried, when others take them before it does.
TRIES = 3
#: Seconds before a supervisor that died is started again, doubling up to the second.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0


class OwnLighthouse:
    """A lighthouse that is named after the run, with its supervisor and the run's guardian."""

    def __init__(
        self,
        run: RunDir,
        children: Children,
        env: Mapping[str, str],
        tell: Callable[[str], None],
    ) -> None:
        self._children, self._tell = children, tell
        self._outputs = Outputs(run.path.parent.parent)
        self._folder = LighthouseDir(self._outputs.lighthouses / run.name)
        # Everything about it is said by flags; how soon it gives a group up may be set.
        ours = ("TFT_LIGHTHOUSE_", "TORCHFT_LIGHTHOUSE")
        self._env = {name: value for name, value in env.items() if not name.startswith(ours)}
        self._port, self._pid = 0, 0
        self._pause, self._next = FIRST_PAUSE, 0.0

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._port}"

    def come_up(self, stopping: Callable[[], bool]) -> None:
        """Start it and wait until it serves, or until it is not wanted any more.

        Raises:
            KitError: it does not come up; carries its last words.
        """
        for _ in range(TRIES):
            self._port = _free_port()
            self._start()
            deadline = time.monotonic() + START_SECONDS
            while self._pid and not stopping():
                address = self._folder.address()
                if address is not None and address.pid == self._pid:
                    self._tell(f"the lighthouse is up at {self.url} (pid {self._pid})")
                    return
                if self._children.code(self._pid) is not None:
                    self._pid = 0  # others may have taken its port: again, with another
                elif time.monotonic() > deadline:
                    self.end()
                time.sleep(0.05)
            if stopping():
                return
        log = self._folder.supervisor_log
        words = log.read_text(errors="replace").strip().splitlines()
        raise KitError(
            f"the lighthouse does not come up: {words[-1] if words else 'it said nothing'} ({log})"
        )

    def keep(self) -> None:
        """Start its supervisor again, if that has died."""
        now = time.monotonic()
        if self._pid and (code := self._children.code(self._pid)) is not None:
            self._tell(
                f"the lighthouse's supervisor died ({code}): started again in {self._pause:g} s"
            )
            self._pid, self._next = 0, now + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        if not self._pid and now >= self._next:
            try:
                self._start()
            except KitError as error:
                self._tell(str(error))
                self._next = now + LONGEST_PAUSE

    def end(self) -> None:
        """End it, and wait for that."""
        if not self._pid:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            send([self._pid], number)
            deadline = time.monotonic() + STOP_SECONDS
            while time.monotonic() < deadline:
                if self._children.code(self._pid) is not None:
                    self._pid = 0
                    return
                time.sleep(0.05)
        self._tell(f"the lighthouse's supervisor (pid {self._pid}) does not end")
        self._pid = 0

    def _start(self) -> None:
        argv = [sys.executable, "-m", "launcher", "lighthouse", "up", f"--host={HOST}"]
        argv += [f"--port={self._port}", f"--name={self._folder.path.name}"]
        argv += [f"--outputs={self._outputs.root}"]
        try:
            self._folder.path.mkdir(parents=True, exist_ok=True)
            with self._folder.supervisor_log.open("ab") as log:
                # By SIGTERM it withdraws its address, and ends what it has started.
                self._pid = self._children.start(argv, self._env, log, log, signal.SIGTERM)
        except OSError as error:
            raise KitError(f"the lighthouse cannot be started: {error}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
