"""Records what Slurm said of a run while somebody watched: Slurm does not say it again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import IO

from launcher.events import Event
from launcher.lock import acquire
from launcher.rundir import RunDir


class Witness:
    """Of several who watch a run, one records: the first one, until it ends."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._lock: IO[str] | None = None

    def record(self, events: Sequence[Event]) -> bool:
        """Append events to the run's record.

        Returns:
            False where somebody else records what he sees; True else, also if that failed.
        """
        try:
            self._lock = self._lock or acquire(self._run.observed_lock)
            if self._lock is None:
                return False
            lines = [_line(event) for event in events]
            with self._run.observed.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError:
            pass  # a run of somebody else's, or a full disk
        return True

    def close(self) -> None:
        """Let somebody else record."""
        if self._lock is not None:
            with contextlib.suppress(OSError):
                self._lock.close()
        self._lock = None


def _line(event: Event) -> str:
    whole = {"t": round(event.t, 3), "kind": event.kind, "replica": event.replica, **event.fields}
    return json.dumps(whole, separators=(",", ":")) + "\n"
