"""One lighthouse process: started, brought past the quorum ids of the one before, and probed."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launcher.capped_log import CappedLog
from launcher.lighthouse import wait_until
from launcher.process import listens
from launcher.reach import FRESH_SECONDS, RAISER
from launcher.timeouts import DEFAULT

#: Seconds to wait for the lighthouse to listen, and to end when told to.
START_SECONDS, STOP_SECONDS = 10.0, 5.0
#: Ports after the supervisor's own that its lighthouses may use, one after the other.
PORTS = 8
#: Quorum ids left out between two lighthouses: some may have been given out and not been seen.
MARGIN = 100
#: Seconds between two probes, for an answer to one, and how many in a row may fail.
PROBE_EVERY, PROBE_SECONDS, PROBE_FAILURES = 1.0, 2.0, 2
_PROGRAM = Path(__file__).with_name("lighthouse_process.py")
#: Seconds without any heartbeat after which nobody reaches the lighthouse.
HEARD_SECONDS = 6.0
_SEEN = re.compile(r"(\S+): seen ([\d.]+)s ago")
_QUORUM_ID = re.compile(rb"Quorum! Quorum \{ quorum_id: (\d+),")


@dataclass(frozen=True, slots=True, kw_only=True)
class LighthouseSettings:
    """How the lighthouse decides on a quorum; times in milliseconds.

    Chosen together: a lost replica group is noticed after ``heartbeat_timeout_ms``;
    a group that has come up is waited for at most ``join_timeout_ms``.
    """

    host: str
    """Address published to the nodes."""
    port: int = 29510
    """The supervisor's own, which stays; lighthouses behind it get the ones after it."""
    bind: str = ""
    """Address to listen on; empty: every interface."""
    min_replicas: int = 1
    heartbeat_timeout_ms: int = DEFAULT.heartbeat_timeout_ms
    join_timeout_ms: int = DEFAULT.join_timeout_ms
    quorum_tick_ms: int = DEFAULT.quorum_tick_ms

    @property
    def url(self) -> str:
        return f"http://{_bracketed(self.host)}:{self.port}"

    @property
    def listen(self) -> str:
        """Address to listen on, said in full."""
        return self.bind or ("::" if _ipv6_usable() else "0.0.0.0")  # noqa: S104

    def serving(self, port: int) -> str:
        """``host:port`` of a lighthouse process that listens on ``port``."""
        return f"{_bracketed(self.host)}:{port}"

    def flags(self, port: int) -> list[str]:
        """Flags of a lighthouse process that listens on ``port``."""
        return [
            f"--bind={_bracketed(self.listen)}:{port}",
            f"--min_replicas={self.min_replicas}",
            f"--heartbeat_timeout_ms={self.heartbeat_timeout_ms}",
            f"--join_timeout_ms={self.join_timeout_ms}",
            f"--quorum_tick_ms={self.quorum_tick_ms}",
        ]


def listen_address(host: str) -> str:
    """Where a lighthouse listens that is published under ``host``; empty: everywhere."""
    return host if host in ("127.0.0.1", "localhost", "::1") else own_address(host)


def own_address(host: str) -> str:
    """The address of ``host`` on the cluster's network, when it is this machine's: a private one.
    Empty otherwise: the nodes may know the name by another address, so everywhere is listened."""
    with contextlib.suppress(OSError, ValueError):
        for family, _, _, _, where in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            address = ipaddress.ip_address(str(where[0]))
            if not address.is_private or address.is_loopback or address.is_link_local:
                continue
            with contextlib.suppress(OSError), socket.socket(family) as probe:
                probe.bind((str(address), 0))
                return str(address)
    return ""


def _bracketed(host: str) -> str:
    """An IPv6 address as it stands in a URL."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _ipv6_usable() -> bool:
    if not socket.has_ipv6:
        return False
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::", 0))
            return True
    except OSError:
        return False


class LighthouseChild:
    """A lighthouse process of the supervisor's."""

    def __init__(self, settings: LighthouseSettings, log: CappedLog, env: Mapping[str, str],
                 start: int) -> None:  # fmt: skip
        """``start``: how many were started before; it chooses the port."""
        self.port = _free_port(settings.port, start)
        self.quorum_id = 0
        """Newest quorum id that it has given out."""
        self._raising = False
        self._settings = settings
        # It logs local time without a zone: here that is UTC, and the log says so.
        self._env = {**env, "RUST_LOG": "info", "TZ": "UTC"}
        self._process = subprocess.Popen(
            [sys.executable, str(_PROGRAM), *settings.flags(self.port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=self._env,
            start_new_session=True,
        )
        stream = self._process.stdout
        assert stream is not None
        threading.Thread(target=self._pump, args=(stream, log), daemon=True).start()
        self._probe: threading.Thread | None = None
        self._probed = time.monotonic()
        self._silent = 0
        self._last_heard = time.monotonic()

    @property
    def heard(self) -> bool:
        """Whether a replica group has sent a heartbeat of late; at first that is not known."""
        return time.monotonic() - self._last_heard < HEARD_SECONDS

    @property
    def pid(self) -> int:
        return self._process.pid

    def come_up(self, stop: threading.Event) -> bool:
        """Wait until it listens (another program may hold the port)."""
        wait_until(
            lambda: stop.is_set() or self._process.poll() is not None or self._listens(),
            START_SECONDS,
        )
        return self._process.poll() is None and self._listens()

    def raise_past(self, quorum_id: int, stop: threading.Event) -> bool:
        """Bring it past a quorum id before anybody meets it; False when that failed.

        A lighthouse counts from one. A manager that is told an id it has had before keeps its
        old process group, and stalls in it.
        """
        argv = [sys.executable, str(_PROGRAM), "--raise-past", str(quorum_id), self._url]
        self._raising = True
        process = subprocess.Popen(
            argv,
            env={**self._env, "RUST_LOG": "error"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(
            lambda: stop.is_set() or process.poll() is not None,
            START_SECONDS + quorum_id / 500,
        )
        if process.poll() is None:
            process.kill()
        self._raising = False
        return process.wait() == 0

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None while it runs after ``seconds``. One that does not answer ends."""
        try:
            return self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        if self._probe is None and time.monotonic() - self._probed > PROBE_EVERY:
            self._probe = threading.Thread(target=self._ask, name="probe", daemon=True)
            self._probe.start()
        elif self._probe is not None and not self._probe.is_alive():
            self._probe, self._probed = None, time.monotonic()
        if self._silent >= PROBE_FAILURES:
            self._process.kill()
        return None

    @property
    def silent(self) -> bool:
        """Whether it ended for not answering."""
        return self._silent >= PROBE_FAILURES

    def end(self) -> None:
        if self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_SECONDS)

    @property
    def place(self) -> tuple[str, int]:
        """Where it is reached from this machine."""
        unspecific = {"::": "127.0.0.1", "0.0.0.0": "127.0.0.1"}  # noqa: S104
        return unspecific.get(self._settings.listen, self._settings.listen), self.port

    @property
    def _url(self) -> str:
        host, port = self.place
        return f"http://{_bracketed(host)}:{port}"

    def _listens(self) -> bool:
        return listens(self._process.pid, self.port)

    def _ask(self) -> None:
        # Its status page takes the lock that quorums take: it shows whether they can go on.
        try:
            with urllib.request.urlopen(f"{self._url}/status", timeout=PROBE_SECONDS) as page:  # noqa: S310
                text = page.read().decode(errors="replace")
            self._silent = 0
            ages = (float(age) for name, age in _SEEN.findall(text) if name != RAISER)
            if min(ages, default=math.inf) < FRESH_SECONDS:
                self._last_heard = time.monotonic()
        except OSError:
            self._silent += 1

    def _pump(self, stream: IO[bytes], log: CappedLog) -> None:
        with contextlib.suppress(ValueError), stream:
            for line in stream:
                if (found := _QUORUM_ID.search(line, 0, 200)) is not None:
                    self.quorum_id = int(found[1])
                if not self._raising and RAISER.encode() not in line:  # these quorums are nobody's
                    log.write(line)


def _free_port(after: int, start: int) -> int:
    """One of the ports after the supervisor's that nobody listens on, else any free one."""
    for number in range(PORTS):
        port = after + 1 + (start + number) % PORTS
        with contextlib.suppress(OSError, OverflowError), socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
