"""The hands of drills, on real processes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import hands
from tests.conftest import REPOSITORY


@pytest.fixture
def rank(tmp_path: Path) -> Any:
    """A process of a run in ``tmp_path`` that waits."""
    env = {**os.environ, "TFT_EVENTS": f"{tmp_path}/x.events.jsonl"}
    code = "import time; print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_only_a_process_of_the_run_is_touched(
    rank: subprocess.Popen[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["signal", "KILL", f"--pid={rank.pid}", f"--run={tmp_path}-other"]
    assert hands.main(words) == 1
    assert "no process of" in capsys.readouterr().err
    assert rank.poll() is None
    assert hands.main([*words[:3], f"--run={tmp_path}"]) == 0
    assert capsys.readouterr().out == "done: SIGKILL to 1 processes\n"
    assert rank.wait(10) == -signal.SIGKILL
    # Putting back what is gone is nothing to do.
    assert hands.main(["signal", "CONT", f"--pid={rank.pid}", f"--run={tmp_path}"]) == 0


def test_a_rank_that_does_not_listen_for_drills_is_left_alone(
    rank: subprocess.Popen[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in ("USR1", "USR2"):
        assert hands.main(["signal", number, f"--pid={rank.pid}", f"--run={tmp_path}"]) == 1
        assert "TFT_DRILLS=1" in capsys.readouterr().err
    assert rank.poll() is None


def test_limits_come_and_go(rank: subprocess.Popen[bytes], tmp_path: Path) -> None:
    which = [f"--pid={rank.pid}", f"--run={tmp_path}"]
    before = resource.prlimit(rank.pid, resource.RLIMIT_FSIZE)
    assert hands.main(["limit", "FSIZE", *which]) == 0
    assert resource.prlimit(rank.pid, resource.RLIMIT_FSIZE) == (0, before[1])
    assert hands.main(["limit", "FSIZE", "--free", *which]) == 0
    assert resource.prlimit(rank.pid, resource.RLIMIT_FSIZE) == (before[1], before[1])
    assert hands.main(["limit", "AS", *which]) == 0
    assert resource.prlimit(rank.pid, resource.RLIMIT_AS)[0] > hands.HEADROOM


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_a_slowed_process_goes_on_however_that_ends(
    rank: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals | None
) -> None:
    argv = [sys.executable, "-m", "launcher.hands", "slow", "0.6" if number is None else "60"]
    argv += [f"--pid={rank.pid}", f"--run={tmp_path}"]
    seen = set()
    with subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as slowing:
        deadline = time.monotonic() + 20
        while slowing.poll() is None and time.monotonic() < deadline:
            seen.add(state_of(rank.pid))
            if "T" in seen and number is not None:
                slowing.send_signal(number)
            time.sleep(0.02)
    assert seen >= {"S", "T"}
    assert state_of(rank.pid) == "S"


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_rank_hangs_and_runs_out_of_memory_when_told_to() -> None:
    code = (
        "import os, resource, signal, sys, time\n"
        "from launcher.train.rank import listen_for_drills\n"
        "listen_for_drills()\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)\n"
        "print('up', flush=True)\n"
        # As torchft does while it waits for a collective.
        "try:\n    while True: time.sleep(0.05)\n"
        "except MemoryError: pass\n"
        "while True: time.sleep(0.05)\n"
    )
    env = {**os.environ, "TFT_DRILLS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGUSR2)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "MemoryError" in err


def test_a_task_of_several_nodes_has_its_launcher_beside_the_ranks(tmp_path: Path) -> None:
    code = "import time; print('up', flush=True); time.sleep(60)"
    env = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1", "SLURMD_NODENAME": "w0"}
    others = [{**env, "SLURMD_NODENAME": "w1"}, {**env, "SLURM_ARRAY_TASK_ID": "2"}]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for one in (env, env, *others):
            words = ["launcher.task", "replica"] if started else []
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", code, *words], env=one, stdout=subprocess.PIPE
                )
            )
            stdout = started[-1].stdout
            assert stdout is not None
            stdout.readline()
        rank, launcher, *_ = started
        assert hands.whole_task(rank.pid) == [launcher.pid, rank.pid]
    finally:
        for process in started:
            process.kill()
            process.communicate()
