"""A log that never grows beyond a size and never holds up the one who writes it."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from launcher.lighthouse_log import UTC_MARK

#: Bytes of one log file; one older file is kept beside it.
LOG_BYTES = 64 * 1024 * 1024
#: Lines that may wait for a slow file system before lines are dropped: the
#: lighthouse must never block on its log.
QUEUED_LINES = 20_000


class CappedLog:
    """Appends lines to a file that is set aside at a size; never blocks its caller."""

    def __init__(self, path: Callable[[], Path], limit: int = LOG_BYTES) -> None:
        self._path = path
        self._limit = limit
        self._lines: queue.Queue[bytes | None] = queue.Queue(QUEUED_LINES)
        self._dropped = 0
        self._file: IO[bytes] | None = None
        self._open_path: Path | None = None
        self._thread = threading.Thread(target=self._write_all, name="lighthouse-log", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self, timeout: float = 2.0) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(timeout)

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
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
            os.replace(path, path.with_name(path.name + ".1"))

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = self._open_path = None
