"""A log that never grows beyond a size and never holds up the one who writes it."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from launcher.lighthouse_log import UTC_MARK, compact

#: Bytes of one log file; what of a full one says something new is kept beside it.
LOG_BYTES = 64 << 20
#: Bytes that may wait for a slow file system before lines are dropped: the lighthouse must
#: never block on its log.
QUEUED_BYTES = 64 << 20


class CappedLog:
    """Appends lines to a file; a full one is compacted into ``<name>.1``. Never blocks its caller."""

    def __init__(self, path: Callable[[], Path], limit: int = LOG_BYTES) -> None:
        self._path = path
        self._limit = limit
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._waiting = 0
        self._dropped = 0
        self._file: IO[bytes] | None = None
        self._open_path: Path | None = None
        self._thread = threading.Thread(target=self._write_all, name="lighthouse-log", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        if self._waiting > QUEUED_BYTES:
            self._dropped += 1
            return
        self._waiting += len(line)
        self._lines.put(line)

    def close(self, timeout: float = 2.0) -> None:
        self._lines.put(None)
        self._thread.join(timeout)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            self._waiting -= len(line)
            try:
                self._append(line)
            except OSError:
                self._dropped += 1
                self._close_file()
        self._close_file()

    def _append(self, line: bytes) -> None:
        path = self._path()
        if path != self._open_path or self._file is None:
            self._close_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file, self._open_path = path.open("ab", buffering=0), path
            self._file.write(UTC_MARK)
        if self._dropped:
            count, self._dropped = self._dropped, 0
            self._file.write(b"[supervisor] %d lines of this log were lost\n" % count)
        self._file.write(line)
        if self._file.tell() >= self._limit:
            self._close_file()
            set_aside(path)

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = self._open_path = None


def set_aside(path: Path) -> None:
    """Make room for a new file at ``path``: what says something new goes to ``<name>.1``.

    A reader of the old file keeps it open and reads it to its end; one that starts later
    reads ``<name>.1`` first, and finds the same events there.
    """
    older, full = path.with_name(path.name + ".1"), path.with_name(path.name + ".full")
    os.replace(path, full)
    kept = compact(full.read_bytes())
    fresh = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(older, fresh)
    with fresh.open("ab") as file:
        file.write(kept)
    os.replace(fresh, older)
    full.unlink()
