"""Collects what a hung replica group's ranks are doing, before it is killed.

Every rank of ours writes the Python stacks of its threads on SIGQUIT, through ``faulthandler``:
that needs neither the GIL nor an open port (torch's debug server on each rank has no
authentication). Where py-spy is installed it adds native frames, and it also sees ranks
of other scripts.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launcher.environment import Task
from launcher.payload import Payload
from launcher.rundir import RunDir

#: Seconds that ranks get to write their stacks.
SECONDS = 1.0
#: Seconds for py-spy, for all ranks.
PY_SPY_SECONDS = 5.0
#: Signal on which a rank of ours writes its stacks.
SIGNAL = signal.SIGQUIT


def of_attempt(run: RunDir, task: Task, start: int, payload: Payload | None) -> None:
    """Have the ranks of a group say what they are doing, before they are killed.

    Args:
        start: size of the group's structured events when this attempt began.
        payload: what runs the ranks of a group of several nodes.
    """
    leader = payload.tell if task.nodes and payload is not None else None
    folder, events = run.ranks(task.replica, task.attempt), run.events(task.replica)
    collect(folder, events, attempt=task.attempt, start=start, leader=leader)


def collect(
    folder: Path,
    events: Path,
    *,
    attempt: int,
    start: int,
    leader: Callable[[signal.Signals], None] | None = None,
) -> list[Path]:
    """Write the stacks of the ranks of ``attempt`` into ``folder``; returns the files there.

    Args:
        events: the replica group's structured events, which name its ranks' processes.
        start: offset there at which the attempt began.
        leader: tells the leader of several nodes, each of which does this for its own ranks.
    """
    if leader is not None:
        leader(SIGNAL)
        time.sleep(SECONDS + 0.5 + (PY_SPY_SECONDS if shutil.which("py-spy") else 0.0))
        return sorted(folder.glob("stacks.*.txt"))
    pids = rank_pids(events, attempt, start)
    pids = {rank: pid for rank, pid in pids.items() if _is_ours(pid, folder)}
    for pid in pids.values():
        with contextlib.suppress(OSError):
            os.kill(pid, SIGNAL)
    if pids:
        time.sleep(SECONDS)
    if shutil.which("py-spy"):
        _py_spy(folder, pids)
    return sorted([*folder.glob("stacks.*.txt"), *folder.glob("py-spy.*.txt")])


def rank_pids(events: Path, attempt: int, start: int = 0) -> dict[int, int]:
    """Process ids of the ranks that said ``start`` in this attempt, by rank."""
    found: dict[int, int] = {}
    with contextlib.suppress(OSError), events.open("rb") as file:
        file.seek(start)
        for line in file:
            if b'"kind":"start"' in line:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    event = json.loads(line)
                    if event["attempt"] == attempt:
                        found[int(event["rank"])] = int(event["pid"])
    return found


def _is_ours(pid: int, folder: Path) -> bool:
    """Whether this process was started for that folder: its id may have been given out anew,
    and the signal ends whoever does not expect it.

    One that had waited was started for another folder of the same run, before it was told what to be.
    """
    marks = (
        os.fsencode(f"TFT_STACKS={folder}"),
        os.fsencode(f"TFT_FAILURES={folder.parent / 'standby-'}"),
    )
    with contextlib.suppress(OSError):
        given = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return any(value == marks[0] or value.startswith(marks[1]) for value in given)
    return False


def _py_spy(folder: Path, pids: dict[int, int]) -> None:
    """All ranks at once: they share the time."""
    dumps = []
    for rank, pid in pids.items():
        with contextlib.suppress(OSError), (folder / f"py-spy.{rank}.txt").open("wb") as file:
            argv = ["py-spy", "dump", "--native", "--pid", str(pid)]
            dumps.append(
                subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
                )
            )
    deadline = time.monotonic() + PY_SPY_SECONDS
    for dump in dumps:
        try:
            dump.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            dump.kill()
            dump.wait()
