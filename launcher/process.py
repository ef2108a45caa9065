"""Other programs: running them with a time limit, and knowing ours from a reused id."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launcher.model import BlindError

#: Seconds that a scheduler command may take before it counts as not answering.
DEFAULT_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that ended."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str


#: Injected wherever commands are run, so that tests can stand in for them.
Run = Callable[[Sequence[str]], Completed]


def run(
    argv: Sequence[str], timeout: float = DEFAULT_TIMEOUT, env: Mapping[str, str] | None = None
) -> Completed:
    """Run ``argv`` without a shell and without standard input, in our own environment unless
    another one is given.

    Raises:
        BlindError: the program is not there, cannot be run, or did not answer in ``timeout`` seconds.
    """
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            env=env,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise BlindError(f"{argv[0]} is not on this machine's PATH") from error
    except OSError as error:
        raise BlindError(f"{argv[0]} cannot be run: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise BlindError(f"{argv[0]} did not answer within {timeout:g} s") from error
    return Completed(tuple(argv), done.returncode, done.stdout, done.stderr)


def start_time(pid: int) -> float:
    """When process ``pid`` started, Unix seconds. With the id, this names a process for good.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    import psutil

    return float(psutil.Process(pid).create_time())


def listens(pid: int, port: int) -> bool:
    """Whether process ``pid`` itself listens on TCP ``port``."""
    import psutil

    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(
        c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port for c in connections
    )


def port_holder(port: int) -> str:
    """Who listens on TCP ``port`` here, in words; empty when nobody does."""
    import psutil  # only needed when something is in the way

    try:
        listening = [
            connection
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
            and connection.laddr
            and connection.laddr.port == port
        ]
    except (psutil.Error, OSError):
        return "a process that cannot be seen from here"
    if not listening:
        return ""
    pid = next((c.pid for c in listening if c.pid), None)
    try:
        if pid is None:
            return "a process of another user"
        process = psutil.Process(pid)
        return f"pid {pid} of {process.username()} ({' '.join(process.cmdline())[:120]})"
    except psutil.Error:
        return f"pid {pid}"


def still_runs(pid: int, started: float) -> bool:
    """Whether the process ``pid`` that started at ``started`` still runs (a zombie does not)."""
    import psutil

    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) < 2.0
        return bool(same and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
