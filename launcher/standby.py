"""Ranks that have been started and wait, all imports done, to be told which replica group to be.

A spare consists of them; and beside a group that trains, a set of them waits for the group's next
start in place, which then takes as long as loading the model and healing does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.environment import waiting_environment
from launcher.files import overwrite
from launcher.payload import complain
from launcher.plan import Plan

#: Of the folders on a node's own disk; the launcher's process id follows.
PREFIX = "tft-standby-"
#: Seconds for killed processes to be gone.
END_SECONDS = 10.0


class Standby:
    """One torchrun whose ranks wait."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        """``folder`` is for its ranks' output.

        Raises:
            OSError: it cannot be made.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._local = local_folder()
        self._assignment = Path(self._local.name) / "assignment.json"
        self._assignment.touch()
        self._plan = plan
        self.argv = plan.argv(folder, [])
        self.env = waiting_environment(plan.env, plan.site) | {
            "TFT_STANDBY": str(self._assignment),
            "TFT_FAILURES": str(folder / "failures.json"),
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, from the thread that the process lives in: its end is theirs.

        Raises:
            OSError: it cannot be started.
        """
        self.process = subprocess.Popen(
            self.argv,
            env=self.env | {"TFT_LAUNCHER": str(os.getpid())},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def ready(self) -> bool:
        """Whether all ranks wait."""
        ranks = self._plan.manifest.ranks_per_group
        return len(list(self._assignment.parent.glob("ready.*"))) >= ranks

    def become(self, flags: Sequence[str], env: Mapping[str, str]) -> bool:
        """Tell the ranks what to be, by a file on their own node, which they read as soon as they
        wait; False when they are gone, or it cannot be written."""
        if self.process is not None and self.process.poll() is not None:
            return False
        news = {name: value for name, value in env.items() if self.env.get(name) != value}
        news["TFT_FAILURES"] = self.env["TFT_FAILURES"]
        try:
            overwrite(self._assignment, json.dumps({"flags": list(flags), "env": news}))
        except OSError as error:
            complain(f"ranks that wait cannot be told what to be: {error}")
            return False
        return True

    def end(self) -> None:
        """Kill what waits, and take away its files."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        self._local.cleanup()


class Warm:
    """The ranks that wait for a group's next start in place: one set of them at most."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._standby: Standby | None = None

    def prepare(self, folder: Path, over: threading.Event) -> None:
        """Make one ready to be started, for an attempt that is not ``over``. Shared files may hang
        here."""
        try:
            standby = Standby(self._plan, folder)
        except OSError as error:
            complain(f"no ranks wait for the next start in place: {error}")
            return
        if over.is_set() or self._standby is not None:
            standby.end()
        else:
            self._standby = standby

    def start(self) -> None:
        """Start it, if there is one that has not been; to be called by the main thread."""
        standby = self._standby
        if standby is None or standby.process is not None:
            return
        try:
            standby.start()
        except OSError as error:
            complain(f"no ranks wait for the next start in place: {error}")
            self.end()

    def take(self, flags: Sequence[str], env: Mapping[str, str]) -> Standby | None:
        """The ranks that have waited, told what to be now; None when there are none."""
        standby, self._standby = self._standby, None
        if standby is None or (standby.process is not None and standby.become(flags, env)):
            return standby
        standby.end()
        return None

    def end(self) -> None:
        """End what waits."""
        standby, self._standby = self._standby, None
        if standby is not None:
            standby.end()


def local_folder() -> tempfile.TemporaryDirectory[str]:
    """A folder on this node's own disk; those of launchers that were killed are taken away."""
    _clear_stale()
    # Ranks that are just being killed may still write there.
    return tempfile.TemporaryDirectory(prefix=f"{PREFIX}{os.getpid()}-", ignore_cleanup_errors=True)


def _clear_stale() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*-*"):
        pid = folder.name.removeprefix(PREFIX).split("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
