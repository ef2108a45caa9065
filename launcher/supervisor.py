"""Starts the lighthouse on the login node, keeps it running, and keeps its log small.

The supervisor's own port stays, whatever becomes of the lighthouse behind it: a relay there
holds connections until the next one serves. (The launchers of our replica groups read where
that is and go there themselves: the relay carries those who came by themselves.)
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.capped_log import CappedLog
from launcher.guardian_child import GuardianChild
from launcher.lighthouse import Address, LighthouseDir, alive, wait_until
from launcher.lighthouse_child import (
    MARGIN,
    START_SECONDS,
    STOP_SECONDS,
    LighthouseChild,
    LighthouseSettings,
)
from launcher.lock import acquire
from launcher.model import BlindError, KitError, UsageError
from launcher.office import Office
from launcher.process import port_holder, start_time
from launcher.reach import answers
from launcher.relay import Relay
from launcher.rundir import Outputs, RunDir

#: Pause before a lighthouse that died is started again, doubling up to the second.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
#: Seconds between two looks at whether whoever stands in has given out quorum ids beyond ours.
TAKE_OVER_SECONDS = 10.0
#: Seconds for which a lighthouse that was started for a run waits for it.
UNUSED_SECONDS = 300.0


class Supervisor:
    """Runs one lighthouse in the foreground until it is told to stop."""

    def __init__(
        self,
        settings: LighthouseSettings,
        folder: LighthouseDir,
        outputs: Outputs,
        *,
        guardian: Sequence[str] = (),
        with_run: bool = False,
        say: Callable[[str], None] = print,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """``guardian``: command that looks after a run, given its name; empty: nobody does.
        ``with_run``: end when the guardian says that the run is over, or none has come."""
        self._settings = settings
        self._outputs = outputs
        self._say = say
        self._environ = environ
        self._folder = folder
        self._guardian = GuardianChild(guardian, folder.path / "guardian.log", environ)
        self._with_run = with_run
        self._claimed = time.monotonic()
        """When it was last claimed by a run; its own start before that."""
        self._stop = threading.Event()
        self._child: LighthouseChild | None = None
        self._ready = self._waiting = False
        """Whether the lighthouse serves; whether it is up while another one stands in for it."""
        self._office = Office(self._claimed_run, self._is_heard, say)
        self._quorum_id = self._past = 0
        self._log_path: tuple[float, Path] = (0.0, folder.log)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            UsageError: the port is taken; says by whom.
            KitError: the lighthouse does not come up.
        """
        self._refuse_second()
        with self._name_held():
            self._serve_until_stopped()

    def _serve_until_stopped(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        if self._folder.claimed_by() is not None:
            # It served a run, perhaps on another host: its groups know quorums up to this one.
            self._quorum_id = self._folder.newest_quorum_id()
        log = CappedLog(self._current_log)
        place = self._settings.listen, self._settings.port
        try:
            with Relay(self._place, host=place[0], port=place[1]), self._office.held():
                self._keep(log)
        finally:
            self._guardian.end()
            self._end_child()
            self._folder.unpublish(os.getpid())
            log.close()
            self._say("lighthouse down")

    @contextlib.contextmanager
    def _name_held(self) -> Iterator[None]:
        """One name, one lighthouse: two of a name would split a run's groups."""
        self._folder.path.mkdir(parents=True, exist_ok=True)
        held = acquire(self._folder.path / ".lock")
        if held is None:
            raise UsageError(
                f"another lighthouse of the name {self._folder.path.name} is coming up: "
                "`python -m launcher lighthouse status` tells of it; choose another --name"
            )
        with held:
            yield

    def _keep(self, log: CappedLog) -> None:
        pause, starts = FIRST_PAUSE, 0
        while not self._stop.is_set():
            started = time.monotonic()
            child = self._child = LighthouseChild(self._settings, log, self._environ, starts)
            starts += 1
            if not child.come_up(self._stop):
                if self._stop.is_set():
                    break
                if starts == 1:
                    raise KitError(
                        f"the lighthouse did not listen on port {child.port}; its log: "
                        f"{self._current_log()}"
                    )
            else:
                self._serve(child)
            code = self._wait_for(child)
            self._ready = False
            if self._stop.is_set():
                break
            if time.monotonic() - started > 60:
                pause = FIRST_PAUSE
            why = "did not answer" if child.silent else f"died (exit code {code})"
            if self._office.deposed:
                why = "is to follow the one that stands in for it"
            self._say(f"lighthouse {why}; starting it again in {pause:g} s")
            self._stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _serve(self, child: LighthouseChild) -> None:
        """Let the replica groups have it, once it is past the quorum ids that they know."""
        with contextlib.suppress(KitError, OSError):
            self._office.look()
        waits = self._waiting = self._office.deposed
        self._past = 0
        if self._quorum_id or waits:
            if waits:  # whoever stands in has given out further ones
                self._quorum_id = max(self._quorum_id, self._folder.newest_quorum_id())
            self._past = target = self._quorum_id + MARGIN
            if not child.raise_past(target, self._stop):
                self._say(f"the lighthouse could not be brought past quorum {target}: ended")
                child.end()
                return
            self._quorum_id = target
            self._remember()
        self._ready = True
        try:
            self._publish(child)
        except KitError as error:
            self._say(f"{error}; the lighthouse serves, and is published as before")
        self._say(
            f"lighthouse up at {self._settings.url} (pid {child.pid}), log {self._current_log()}"
        )

    def _place(self) -> tuple[str, int] | None:
        """Where the relay on the stable port passes connections on to."""
        child = self._child
        if (stand_in := self._office.stand_in) is not None:
            return stand_in
        return child.place if child is not None and self._ready else None

    def _refuse_second(self) -> None:
        published = self._folder.address()
        if published is not None and _is_alive_here(published):
            run = self._folder.claimed_by()
            raise UsageError(
                f"a lighthouse is already up at {published.url}: pid {published.pid} of "
                f"{published.user}" + (f", serving run tft-{run}" if run else "") + "; "
                "`python -m launcher lighthouse down` ends it, `--port` starts another"
            )
        holder = port_holder(self._settings.port)
        if holder:
            raise UsageError(
                f"port {self._settings.port} is taken by {holder}: end it, or choose another "
                "port with --port"
            )

    def _wait_for(self, child: LighthouseChild) -> int | None:
        up = time.monotonic()
        while not self._stop.is_set():
            code = child.wait(0.1)
            if code is not None:
                return code
            self._office.serves()
            if not self._office.deposed:
                self._waiting = False
            elif not self._waiting:
                child.end()  # the next one begins past the quorums that are given out meanwhile
            elif time.monotonic() - up > TAKE_OVER_SECONDS:
                up = time.monotonic()
                if self._folder.newest_quorum_id() > self._past:
                    child.end()
            if child.quorum_id > self._quorum_id:
                self._quorum_id = child.quorum_id
                self._remember()
            self._look_after()
        return None

    def _remember(self) -> None:
        try:
            self._folder.remember_quorum_id(self._quorum_id)
        except OSError as error:
            self._say(f"the newest quorum id is not kept: {error}")

    def _look_after(self) -> None:
        if self._guardian.due():
            with contextlib.suppress(KitError, OSError):
                run = self._folder.claimed_by()
                self._guardian.tend(f"tft-{run}" if run is not None else None)
                if self._with_run:
                    self._end_with_run(run)

    def _end_with_run(self, run: int | None) -> None:
        if run is not None:
            self._claimed = time.monotonic()
        gone = run is not None and not self._outputs.run_of_array(run).path.is_dir()
        if run is None and time.monotonic() - self._claimed > UNUSED_SECONDS:
            self._say("no run has come")
            self._stop.set()
        elif run is not None and (self._guardian.over or (gone and self._guardian.tried)):
            self._say(f"run tft-{run} is over")
            self._stop.set()

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()

    def _publish(self, child: LighthouseChild) -> None:
        self._folder.publish(
            Address(
                url=self._settings.url,
                host=socket.gethostname(),
                port=self._settings.port,
                pid=os.getpid(),
                process_started=start_time(os.getpid()),
                user=getpass.getuser(),
                started=time.time(),
                answers_votes=True,
                past=self._past,
                min_replicas=self._settings.min_replicas,
                heartbeat_timeout_ms=self._settings.heartbeat_timeout_ms,
                join_timeout_ms=self._settings.join_timeout_ms,
                quorum_tick_ms=self._settings.quorum_tick_ms,
                with_run=self._with_run,
                serving=self._settings.serving(child.port),
            )
        )

    def _is_heard(self) -> bool:
        """Whether replica groups reach the lighthouse, or may not have had the time to."""
        child = self._child
        return child is None or child.heard or not self._ready

    def _claimed_run(self) -> RunDir | None:
        run = self._folder.claimed_by()
        found = None if run is None else self._outputs.run_of_array(run)
        return found if found is not None and found.manifest_path.exists() else None

    def _current_log(self) -> Path:
        """The log of the run that claimed this lighthouse; looked up twice a second."""
        checked, path = self._log_path
        now = time.monotonic()
        if now - checked > 0.5:
            with contextlib.suppress(KitError, OSError):
                run = self._folder.claimed_by()
                path = (
                    self._outputs.run_of_array(run).lighthouse_log
                    if run is not None
                    else self._folder.log
                )
            self._log_path = (now, path)
        return path

    def _on_signal(self, number: int, frame: Any) -> None:
        del number, frame
        self._stop.set()


def _is_alive_here(address: Address) -> bool:
    try:
        return alive(address)
    except BlindError:
        # Of another machine: it stands in our way only if it holds the port there.
        return answers(address.url, 1.0) is None


def start_detached(
    argv: list[str], folder: LighthouseDir, env: Mapping[str, str] | None = None
) -> Address:
    """Run ``argv`` (a foreground ``lighthouse up``) in the background; wait until it serves.

    Raises:
        KitError: it ended, or published nothing in time; carries its last words.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.supervisor_log.open("ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )

    def published() -> bool:
        address = folder.address()
        return process.poll() is not None or (address is not None and address.pid == process.pid)

    try:
        wait_until(published, START_SECONDS + 5)
    except BaseException:  # Ctrl-C
        process.terminate()
        raise
    address = folder.address()
    if process.poll() is None and address is not None and address.pid == process.pid:
        (folder.path / "lighthouse.pid").write_text(f"{process.pid}\n")
        return address
    if process.poll() is None:
        process.terminate()
    words = folder.supervisor_log.read_bytes()[start:].decode(errors="replace").strip()
    problem = words.splitlines()[-1] if words else "it said nothing"
    error = KitError(problem.removeprefix("error: "))
    if process.returncode == UsageError.exit_code:
        error = UsageError(str(error))
    raise error


def stop(folder: LighthouseDir, say: Callable[[str], None] = print) -> bool:
    """End the lighthouse of ``folder``; False when there was none.

    Raises:
        BlindError: it was started on another machine.
        KitError: it did not end.
    """
    address = folder.address()
    if address is None:
        return False
    if not alive(address):
        folder.unpublish(address.pid)
        (folder.path / "lighthouse.pid").unlink(missing_ok=True)
        say(f"{address.url} was published, but its process {address.pid} is gone: cleaned up")
        return False
    os.kill(address.pid, signal.SIGTERM)
    if not wait_until(lambda: not alive(address), STOP_SECONDS + 5):
        os.kill(address.pid, signal.SIGKILL)
        if not wait_until(lambda: not alive(address), STOP_SECONDS):
            raise KitError(f"process {address.pid} does not end, not even by SIGKILL")
    folder.unpublish(address.pid)
    (folder.path / "lighthouse.pid").unlink(missing_ok=True)
    return True
