"""The real lighthouse under its supervisor, on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launcher.capped_log import CappedLog
from launcher.compaction import first_line
from launcher.lighthouse import LighthouseDir, alive
from launcher.lighthouse_log import LighthouseReader
from launcher.reach import answers
from launcher.rundir import Outputs
from launcher.tail import Tail
from tests.conftest import FIXTURES
from tests.e2e.conftest import Workspace, eventually


@pytest.fixture
def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_up_status_down(workspace: Workspace, port: str) -> None:
    where = ["--host", "127.0.0.1", "--port", port]
    assert "no lighthouse is up" in workspace.launcher("lighthouse", "status", *where, code=1)
    up = workspace.launcher("lighthouse", "up", *where, "--detach")
    assert f"lighthouse up at http://127.0.0.1:{port} (pid " in up
    try:
        address = LighthouseDir.of(workspace.outputs, f"http://127.0.0.1:{port}").address()
        assert address is not None
        assert "answers; serves no run yet" in workspace.launcher("lighthouse", "status", *where)
        # Not twice, and it says who holds the port: to us, and to another set of outputs.
        second = workspace.launcher("lighthouse", "up", *where, code=2)
        assert f"already up at http://127.0.0.1:{port}: pid {address.pid}" in second
        other = workspace.launcher("lighthouse", "up", *where, "--outputs", "elsewhere", code=2)
        assert f"port {port} is taken by pid " in other
        # It listens where it was told to, and nowhere else.
        listening = [
            c.laddr.ip
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == int(port)
        ]
        assert listening == ["127.0.0.1"]
    finally:
        assert "lighthouse down" in workspace.launcher("lighthouse", "down", *where)
    assert answers(f"http://127.0.0.1:{port}") is not None
    assert not alive(address)
    assert "no lighthouse is up" in workspace.launcher("lighthouse", "down", *where)


def test_two_at_once_leave_one_that_can_be_found(workspace: Workspace, port: str) -> None:
    argv = [sys.executable, "-m", "launcher", "lighthouse", "up", "--host", "127.0.0.1"]
    both = [
        subprocess.Popen(
            [*argv, "--port", port],
            cwd=workspace.root,
            env=workspace.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    eventually(lambda: any(p.poll() is not None for p in both), 30, "one of the two gives up")
    (loser,) = [process for process in both if process.poll() is not None]
    (winner,) = [process for process in both if process is not loser]
    assert loser.returncode in (1, 2)
    address = LighthouseDir.of(workspace.outputs, f"http://127.0.0.1:{port}").address()
    assert address is not None
    assert address.pid == winner.pid
    workspace.launcher("lighthouse", "down", "--host", "127.0.0.1", "--port", port)
    assert winner.wait(15) == 0


def test_a_lighthouse_that_dies_is_started_again(workspace: Workspace, port: str) -> None:
    where = ["--host", "127.0.0.1", "--port", port]
    workspace.launcher("lighthouse", "up", *where, "--detach")
    try:
        folder = LighthouseDir.of(workspace.outputs, f"http://127.0.0.1:{port}")
        address = folder.address()
        assert address is not None
        (child,) = psutil.Process(address.pid).children()
        child.kill()
        eventually(
            lambda: (
                "starting it again" in folder.supervisor_log.read_text()
                and answers(address.url) is None
            ),
            10,
            "the lighthouse listens again",
        )
        (again,) = psutil.Process(address.pid).children()
        assert again.pid != child.pid
    finally:
        workspace.launcher("lighthouse", "down", *where)
    eventually(lambda: answers(address.url) is not None, 5, "the lighthouse has ended")


def test_the_lighthouse_ends_with_a_killed_supervisor_and_down_cleans_up(
    workspace: Workspace, port: str
) -> None:
    where = ["--host", "127.0.0.1", "--port", port]
    workspace.launcher("lighthouse", "up", *where, "--detach")
    folder = LighthouseDir.of(workspace.outputs, f"http://127.0.0.1:{port}")
    address = folder.address()
    assert address is not None
    os.kill(address.pid, signal.SIGKILL)
    eventually(lambda: answers(address.url) is not None, 5, "the lighthouse ends too")
    assert "cleaned up" in workspace.launcher("lighthouse", "down", *where)
    assert folder.address() is None


def test_ctrl_c_in_the_foreground(workspace: Workspace, port: str) -> None:
    argv = [sys.executable, "-m", "launcher", "lighthouse", "up", "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*argv, "--port", port],
        cwd=workspace.root,
        env=workspace.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert "lighthouse up at" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=15)
    assert (process.returncode, out) == (0, "lighthouse down\n")


def test_the_log_follows_the_run(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    paths = [outputs.torchft / "idle.log", outputs.run_of_array(5).lighthouse_log]
    current = [paths[0]]
    log = CappedLog(lambda: current[0])
    log.write(b"before\n")
    eventually(lambda: paths[0].exists(), 5, "the first line is written")
    current[0] = paths[1]
    log.write(b"after\n")
    log.close()
    assert paths[0].read_bytes() == first_line(1) + b"before\n"
    assert paths[1].read_bytes() == first_line(1) + b"after\n"


def test_the_log_stays_small_and_the_monitor_misses_nothing(tmp_path: Path) -> None:
    """A log that is set aside many times, watched from the start and read at the end."""
    data = (FIXTURES / "node-down" / "lighthouse.log").read_bytes()
    path = tmp_path / "lighthouse.log"
    log = CappedLog(lambda: path, limit=10_000)
    older = path.with_name("lighthouse.log.1")

    def events(tail: Tail, reader: LighthouseReader) -> list[tuple[str, object]]:
        return [
            (event.kind, event.get("quorum_id"))
            for offset, block in tail.blocks()
            for event in reader.read(offset, block)
            if event.kind == "membership"
        ]

    seen: list[tuple[str, object]] = []
    reader = LighthouseReader("l")
    with Tail(path, older) as tail:
        for number, line in enumerate(data.splitlines(keepends=True)):
            log.write(line)
            if number % 5 == 0:
                # A monitor looks far more often than a log of 64 MB fills up: never do two
                # fill up between two looks.
                while log._waiting:
                    time.sleep(0.001)
                seen += events(tail, reader)
        log.close()
        seen += events(tail, reader)
    with Tail(path, older) as late:
        afterwards = events(late, LighthouseReader("l"))
    assert [quorum for _, quorum in afterwards] == [1, 2, 3]
    assert [quorum for _, quorum in seen] == [1, 2, 3]
    assert path.stat().st_size < 12_000
    assert older.stat().st_size < len(data) / 3


def test_a_full_disk_never_blocks_the_lighthouse() -> None:
    log = CappedLog(lambda: Path("/dev/full"))
    started = time.monotonic()
    for _ in range(50_000):
        log.write(b"x" * 100 + b"\n")
    assert time.monotonic() - started < 10
    log.close()
