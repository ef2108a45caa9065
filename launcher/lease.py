"""Which start of a replica group is the newest: the others are fenced.

Slurm gives up a node that it cannot reach, and starts the task elsewhere, while the old
processes may live on. Each start takes the group's lease, a small file in the run's
directory with a number that only grows; who finds a higher number than his own has been
replaced, and must stop. The number is the group's attempt.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from launcher.files import create_once, overwrite
from launcher.model import KitError

#: Seconds for which shared files may be away when a group starts, and between two tries.
FILES_SECONDS, RETRY = 60.0, 1.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who runs a replica group."""

    replica: int
    number: int
    """The group's attempt: 1 for its first start, one more for each further one."""
    task: int
    """Index of the array task that runs it."""
    host: str
    t: float
    """When it was taken, Unix seconds."""


def take(path: Path, *, replica: int, task: int, host: str) -> Lease:
    """Take the lease at ``path``, over whoever holds it.

    Raises:
        KitError: the files cannot be read or written.
    """
    before = current(path)
    number = before.number if before is not None else 0
    while True:
        number += 1
        lease = Lease(replica=replica, number=number, task=task, host=host, t=time.time())
        text = json.dumps(asdict(lease)) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not create_once(_taken(path, number), text):
                continue  # somebody was faster
            newest = _read(path)
            if newest is None or newest.number < number:
                overwrite(path, text)
        except OSError as error:
            raise KitError(f"the lease {path} cannot be taken: {error.strerror}") from error
        return lease


def current(path: Path) -> Lease | None:
    """The lease at ``path``; None when nobody has ever taken it.

    Raises:
        KitError: that cannot be seen.
    """
    stem = path.name.removesuffix(".lease.json")
    try:
        names = os.listdir(path.parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KitError(f"{path.parent} cannot be read: {error.strerror}") from error
    numbers = [int(m[1]) for n in names if (m := re.fullmatch(rf"{stem}\.(\d+)\.taken", n))]
    found = [_read(path), *(_read(_taken(path, n)) for n in sorted(numbers)[-1:])]
    known = [lease for lease in found if lease is not None]
    if not known and (numbers or path.name in names):
        raise KitError(f"the lease {path} cannot be read")
    return max(known, key=lambda lease: lease.number, default=None)


def lost(path: Path, mine: Lease) -> bool:
    """Whether somebody has taken the lease after ``mine``; False when that cannot be seen."""
    newest = _read(path)
    if newest is not None and newest.number > mine.number:
        return True
    return _taken(path, mine.number + 1).exists()


def held(path: Path, mine: Lease) -> bool:
    """Whether ``mine`` is certainly the newest; False when that cannot be seen."""
    newest = _read(path)
    return newest is not None and newest.number <= mine.number and not lost(path, mine)


def _taken(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name.removesuffix('.lease.json')}.{number}.taken")


def _read(path: Path) -> Lease | None:
    """None when there is no such file, or it cannot be read or understood just now."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        raw = json.loads(path.read_text(encoding="utf-8"))
        return Lease(
            replica=int(raw["replica"]),
            number=int(raw["number"]),
            task=int(raw["task"]),
            host=str(raw["host"]),
            t=float(raw["t"]),
        )
    return None


def patiently(attempt: Callable[[], T]) -> T:
    """What ``attempt`` gives, for as long as shared files may be away for a while.

    Raises:
        KitError: they were away for longer.
    """
    deadline = time.monotonic() + FILES_SECONDS
    while True:
        try:
            return attempt()
        except KitError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY)
