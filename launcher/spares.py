"""Spares: array tasks that stand ready, with all imports done, to become a lost replica group.

A spare says in a small file of its own that it is ready; the guardian tells it by an order
which group it is to be; it takes that group's lease, and its waiting ranks read the command
line and the environment of the group from a file on their own node.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher import lease
from launcher.files import overwrite
from launcher.rundir import Manifest, RunDir

#: Seconds between two signs of life, and after which one is too old.
SIGN_EVERY, FRESH = 2.0, 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spare:
    """A spare that stands ready."""

    task: int
    """Index of its array task."""
    host: str
    t: float
    """Its newest sign of life, Unix seconds."""


def role(run: RunDir, manifest: Manifest, task: int) -> int | None:
    """Which replica group array task ``task`` is to run; None: it is a spare.

    The group that it ran before, unless another task has taken that over since.
    """
    for replica in range(manifest.group_size):
        held = lease.current(run.lease(replica))
        if held is not None and held.task == task:
            return replica
    if task < manifest.group_size and lease.current(run.lease(task)) is None:
        return task
    return None


def show(folder: Path, spare: Spare) -> None:
    """Say that a spare stands ready."""
    with contextlib.suppress(OSError):
        overwrite(_file(folder, spare.task), json.dumps(asdict(spare)) + "\n")


def withdraw(folder: Path, task: int) -> None:
    """Say that it does not any more."""
    with contextlib.suppress(OSError):
        overwrite(_file(folder, task), "{}\n")


def ready(folder: Path, now: float | None = None) -> list[Spare]:
    """Spares with a fresh sign of life."""
    now, found = time.time() if now is None else now, []
    with contextlib.suppress(OSError):
        for path in sorted(folder.glob("spare-*.json")):
            with contextlib.suppress(OSError, ValueError, TypeError):
                spare = Spare(**json.loads(path.read_text(encoding="utf-8")))
                if abs(now - spare.t) < FRESH:
                    found.append(spare)
    return found


def _file(folder: Path, task: int) -> Path:
    return folder / f"spare-{task}.json"
