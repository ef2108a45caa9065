"""What a launcher writes down of its replica group: events, and how its attempts ended."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launcher.environment import Task
from launcher.model import KitError
from launcher.payload import complain
from launcher.restarts import Ending
from launcher.rundir import RunDir
from launcher.terms import Commit

#: Bytes at the end of a group's events in which its newest step is looked for, and read at a time:
#: between two syncs of a semi-sync method an hour of other events may lie.
MOST_BYTES, BLOCK_BYTES = 1 << 25, 1 << 16


def remember(path: Path, ending: Ending) -> list[Ending]:
    """Add an ending to those of earlier attempts; all of them, oldest first. A full disk costs
    the memory, and not the decision."""
    endings = [*endings_in(path), ending]
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(ending)) + "\n")
    return endings


def endings_in(path: Path) -> list[Ending]:
    """Endings of earlier attempts; what cannot be read is left out."""
    found = []
    with contextlib.suppress(OSError), path.open(encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError):
                found.append(Ending(**json.loads(line)))
    return found


def note(run: RunDir, task: Task, kind: str, /, **fields: object) -> None:
    """Append one event to the replica group's structured log."""
    append(run.events(task.replica), task, kind, **fields)


def append(path: Path, task: Task, kind: str, /, **fields: object) -> None:
    """Append one event to ``path``; a full disk is no reason to die."""
    event = {
        "t": round(time.time(), 3),
        "kind": kind,
        "replica": task.replica,
        "attempt": task.attempt,
        "host": task.node,
        **fields,
    }
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(event, separators=(",", ":")) + "\n")
    except OSError as error:
        complain(f"an event was lost: {error}")


def size(events: Path) -> int:
    """Bytes of a replica group's structured log; 0 while there is none."""
    with contextlib.suppress(OSError):
        return events.stat().st_size
    return 0


def said(events: Path, start: int, kind: str) -> bool:
    """Whether the log has an event of that kind after that many bytes."""
    with contextlib.suppress(OSError), events.open("rb") as file:
        file.seek(start)
        return any(f'"kind":"{kind}"'.encode() in line for line in file)
    return False


def newest_step(events: Path) -> Commit | None:
    """The newest step that the group has committed, or joined a quorum for; None when there is
    none, or when it has left or finished since.

    Raises:
        KitError: that cannot be read.
    """
    exits: dict[str, Any] | None = None
    for line in _from_the_end(events):
        if b'"kind":"exit"' not in line and b'"quorum_id"' not in line:
            continue
        with contextlib.suppress(ValueError, TypeError, KeyError):
            event = json.loads(line)
            if event["kind"] == "exit":
                exits = exits or event  # of several the last
            elif event["kind"] in ("commit", "quorum"):
                t, attempt = float(event["t"]), int(event.get("attempt", 0))
                # (An old copy of the group may end after its next one has begun.)
                if exits is not None and int(exits.get("attempt", 0)) >= attempt:
                    if exits.get("code") == 0:
                        return None
                    t = max(t, float(exits["t"]))
                return Commit(
                    t=t, step=int(event["step"]), quorum_id=int(event.get("quorum_id", 0))
                )
    return None


def _from_the_end(path: Path) -> Iterator[bytes]:
    """Lines of a file, the last one first; of a very long one its last part.

    Raises:
        KitError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            end = os.fstat(file.fileno()).st_size
            stop, rest = max(0, end - MOST_BYTES), b""
            while end > stop:
                start = max(stop, end - BLOCK_BYTES)
                file.seek(start)
                rest, *lines = (file.read(end - start) + rest).split(b"\n")
                yield from reversed(lines)
                end = start
            yield rest
    except FileNotFoundError:
        return
    except OSError as error:
        raise KitError(f"{path} cannot be read: {error.strerror}") from error


def committed(events: Path, start: int) -> bool:
    """Whether the log tells of a committed step after that many bytes.

    With a semi-sync method a group first joins the others, in a sync to which it adds nothing: that is
    none of its own yet.
    """
    joining = stepped = False
    with contextlib.suppress(OSError), events.open("rb") as file:
        file.seek(start)
        for line in file:
            if b'"kind":"progress"' in line:
                joining = joining or b'"joining"' in line
                stepped = stepped or b'"titan_step"' in line
            elif b'"kind":"commit"' in line and b'"committed":true' in line:
                its_own = stepped or not joining
                if its_own:
                    return True
    return False
