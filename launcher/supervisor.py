"""Starts the lighthouse on the login node, keeps it running, and keeps its log small."""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from launcher.capped_log import CappedLog
from launcher.lighthouse import (
    Address,
    LighthouseDir,
    alive,
    answers,
    port_holder,
    wait_until,
)
from launcher.model import BlindError, KitError, UsageError
from launcher.process import listens, start_time
from launcher.rundir import Outputs

#: Seconds to wait for the lighthouse to listen, and to end when told to.
START_SECONDS, STOP_SECONDS = 10.0, 5.0
#: Pause before a lighthouse that died is started again, doubling up to the second.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LighthouseSettings:
    """How the lighthouse decides on a quorum; times in milliseconds.

    Chosen together: a lost replica group is noticed after ``heartbeat_timeout_ms``;
    a group that has come up is waited for at most ``join_timeout_ms``.
    """

    host: str
    port: int = 29510
    bind: str = ""
    """Address to listen on; empty: every interface."""
    min_replicas: int = 1
    heartbeat_timeout_ms: int = 2000
    join_timeout_ms: int = 10_000
    quorum_tick_ms: int = 100

    @property
    def url(self) -> str:
        return f"http://{_bracketed(self.host)}:{self.port}"

    def flags(self) -> list[str]:
        bind = _bracketed(self.bind) or (
            "[::]" if socket.has_ipv6 and _ipv6_usable() else "0.0.0.0"  # noqa: S104
        )
        return [
            f"--bind={bind}:{self.port}",
            f"--min_replicas={self.min_replicas}",
            f"--heartbeat_timeout_ms={self.heartbeat_timeout_ms}",
            f"--join_timeout_ms={self.join_timeout_ms}",
            f"--quorum_tick_ms={self.quorum_tick_ms}",
        ]


def _bracketed(host: str) -> str:
    """An IPv6 address as it stands in a URL."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _ipv6_usable() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
            return True
    except OSError:
        return False


class Supervisor:
    """Runs one lighthouse in the foreground until it is told to stop."""

    def __init__(
        self,
        settings: LighthouseSettings,
        outputs: Outputs,
        say: Callable[[str], None] = print,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._settings = settings
        self._outputs = outputs
        self._say = say
        self._environ = environ
        self._folder = LighthouseDir.of(outputs, settings.url)
        self._stop = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._log_path: tuple[float, Path] = (0.0, self._folder.log)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            UsageError: the port is taken; says by whom.
            KitError: the lighthouse does not come up.
        """
        self._refuse_second()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        log = CappedLog(self._current_log)
        pause = FIRST_PAUSE
        try:
            while not self._stop.is_set():
                started = time.monotonic()
                self._start(log)
                first = pause == FIRST_PAUSE
                if not self._come_up():
                    if self._stop.is_set():
                        break
                    if first:
                        raise KitError(
                            f"the lighthouse did not listen on port {self._settings.port}; "
                            f"its log: {self._current_log()}"
                        )
                else:
                    try:
                        self._publish()
                    except KitError as error:
                        self._say(f"{error}; the lighthouse serves, and is published as before")
                    self._say(
                        f"lighthouse up at {self._settings.url} (pid {self._child_pid()}), "
                        f"log {self._current_log()}"
                    )
                code = self._wait_for_child()
                if self._stop.is_set():
                    break
                if time.monotonic() - started > 60:
                    pause = FIRST_PAUSE
                self._say(f"lighthouse died (exit code {code}); starting it again in {pause:g} s")
                self._stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            self._end_child()
            self._folder.unpublish(os.getpid())
            log.close()
            self._say("lighthouse down")

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

    def _start(self, log: CappedLog) -> None:
        program = Path(__file__).with_name("lighthouse_process.py")
        # It logs local time without a zone: here that is UTC, and the log says so.
        environment = {**self._environ, "RUST_LOG": "info", "TZ": "UTC"}
        self._child = subprocess.Popen(
            [sys.executable, str(program), *self._settings.flags()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        stream = self._child.stdout
        assert stream is not None
        threading.Thread(target=_pump, args=(stream, log), daemon=True).start()

    def _come_up(self) -> bool:
        """Wait until our own lighthouse listens (another may hold the port)."""
        child = self._child
        assert child is not None
        port = self._settings.port
        wait_until(
            lambda: self._stop.is_set() or child.poll() is not None or listens(child.pid, port),
            START_SECONDS,
        )
        return child.poll() is None and listens(child.pid, port)

    def _wait_for_child(self) -> int | None:
        child = self._child
        assert child is not None
        while not self._stop.is_set():
            try:
                return child.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
        return None

    def _end_child(self) -> None:
        child = self._child
        if child is None or child.poll() is not None:
            return
        child.terminate()
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait(STOP_SECONDS)

    def _publish(self) -> None:
        self._folder.publish(
            Address(
                url=self._settings.url,
                host=socket.gethostname(),
                port=self._settings.port,
                pid=os.getpid(),
                process_started=start_time(os.getpid()),
                user=getpass.getuser(),
                started=time.time(),
            )
        )

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

    def _child_pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def _on_signal(self, number: int, frame: Any) -> None:
        del number, frame
        self._stop.set()


def _pump(stream: IO[bytes], log: CappedLog) -> None:
    for line in stream:
        log.write(line)


def _is_alive_here(address: Address) -> bool:
    try:
        return alive(address)
    except BlindError:
        # Of another machine: it stands in our way only if it holds the port there.
        return answers(address.url, 1.0) is None


def start_detached(argv: list[str], folder: LighthouseDir) -> Address:
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
            start_new_session=True,
        )

    def published() -> bool:
        address = folder.address()
        return process.poll() is not None or (address is not None and address.pid == process.pid)

    wait_until(published, START_SECONDS + 5)
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
