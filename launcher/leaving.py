"""How a replica group leaves a run that goes on: between two steps, so that no commit fails.

Its launcher writes the step at which to leave into a file, far enough ahead that all ranks of the
group have read it by then; they leave at that step, and the others go on without them.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from pathlib import Path

from launcher import records
from launcher.environment import Task
from launcher.files import overwrite
from launcher.payload import say
from launcher.rundir import RunDir

#: Seconds in which every rank has read the file (they look twice a second).
MARGIN_SECONDS = 3.0
#: Commits from which the length of a step is taken.
COMMITS = 8
#: Seconds for a group to leave when its time limit is near.
LEAVE_SECONDS = 60.0
#: Why a group that has left ended.
LEFT = "left the run, as it was told to"


class Departure:
    """Whether a replica group is to leave: because it was told to, or its time limit is near.

    Tasks of an array reach their time limits together. So the groups leave in two turns, the even
    ones first: they are back, with another time limit, when the odd ones leave, which heal from them.
    """

    def __init__(self, notice: float) -> None:
        """``notice``: seconds before the time limit at which Slurm tells of it."""
        self.told = False
        """Whether the ranks of this attempt have been told."""
        self._notice = notice
        self._began = time.monotonic()
        self._time = 0.0

    def listen(self) -> None:
        """Hear of the time limit from now on. (SIGUSR1 is for ranks, when there are any.)"""
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, lambda number, frame: self.note_time())

    def note_time(self) -> None:
        """Slurm says that the time limit is near (SIGUSR2)."""
        now = time.monotonic()
        if now - self._began < self._notice:
            say("the time limit is too short for a requeue before it: it ends this task")
        else:
            self._time = self._time or now

    @property
    def time_is_up(self) -> bool:
        """Whether the time limit is near: the group leaves, and is requeued."""
        return self._time > 0

    def turn(self, replica: int) -> bool:
        """Whether it is this group's turn to leave for its time limit."""
        wait = self._notice / 2 if replica % 2 else 0.0
        return self.time_is_up and time.monotonic() - self._time >= wait

    def overdue(self, replica: int) -> bool:
        """Whether it has had its time to leave, and is still there."""
        wait = (self._notice / 2 if replica % 2 else 0.0) + LEAVE_SECONDS
        return self.time_is_up and time.monotonic() - self._time > wait

    def left(self, events: Path, start: int) -> bool:
        """Whether the attempt whose ``events`` begin at ``start`` ended because it was told to, and
        not at the last step."""
        return self.told and records.said(events, start, "leave")

    def tell(self, run: RunDir, task: Task, start: int, why: str) -> None:
        """Tell the ranks, once an attempt, when to leave.

        Args:
            start: size of the group's structured events when this attempt began.
        """
        if self.told:
            return
        self.told = True
        say(
            f"replica {task.replica} (attempt {task.attempt}) is to leave between two steps ({why})"
        )
        tell(run.leave(task.replica, task.attempt), run.events(task.replica), start)


def prepare(run: RunDir, task: Task) -> None:
    """Make an attempt's folder, with an empty file of its departure: a network file system goes on
    to say for half a minute that there is none, once it was asked before it was written.

    Raises:
        OSError: it cannot be made.
    """
    run.ranks(task.replica, task.attempt).mkdir(parents=True, exist_ok=True)
    run.leave(task.replica, task.attempt).touch()


def tell(path: Path, events: Path, start: int) -> None:
    """Tell a group's ranks when to leave.

    Args:
        path: what they read.
        events: the group's structured events; ``start``: their size when this attempt began.

    Raises:
        OSError: it cannot be written.
    """
    overwrite(path, f"{step_to_leave(events, start)}\n")


def step_to_leave(events: Path, start: int) -> int:
    """Manager's step at which all ranks of a group can leave together; 0 (at once) for a group
    that has not committed any."""
    commits: list[tuple[float, int]] = []
    with contextlib.suppress(OSError), events.open("rb") as file:
        file.seek(start)
        for line in file:
            if b'"kind":"commit"' not in line:
                continue
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                if event.get("rank", 0) == 0:
                    commits.append((float(event["t"]), int(event["step"])))
    if not commits:
        return 0
    recent = commits[-COMMITS:]
    seconds = (recent[-1][0] - recent[0][0]) / max(1, len(recent) - 1)
    ahead = math.ceil(MARGIN_SECONDS / seconds) if seconds > 0 else 1
    return recent[-1][1] + 1 + max(2, ahead)
