"""A log that never grows beyond a size and never holds up the one who writes it.

A full one becomes ``<name>.full`` until what of it says something new has been added to
``<name>.1``, and is begun anew. Whoever is killed in between leaves the ``.full`` to the next.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import queue
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from launcher.compaction import (
    LINE_BYTES,
    Compaction,
    ended,
    first_line,
    newest_ended,
    newest_quorums,
    number_of,
    without_first_line,
)
from launcher.lighthouse_log import UTC_MARK
from launcher.lock import acquire

#: Bytes of one log file; what of a full one says something new is kept beside it.
LOG_BYTES = 64 << 20
#: Bytes that may wait for a slow file system before lines are dropped: the lighthouse must
#: never block on its log.
QUEUED_BYTES = 64 << 20
#: Seconds between two looks at whether the file is still the one of that name.
LOOK_EVERY = 1.0
#: Seconds until what could not be set aside (a full disk) is tried again.
AGAIN_SECONDS = 60.0
#: Bytes read in one go when a log is set aside.
_PIECE = 4 << 20


class CappedLog:
    """Appends lines to a file; a full one is compacted into ``<name>.1``. Never blocks its caller.

    A file is full at ``limit`` bytes, or when it is as large as what was set aside: so what is
    copied over the life of a run is at most what was written.
    """

    def __init__(self, path: Callable[[], Path], limit: int = LOG_BYTES) -> None:
        self._path = path
        self._limit = limit
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._waiting = 0
        self._count = threading.Lock()
        self._dropped = 0
        self._file: io.FileIO | None = None
        self._open_path: Path | None = None
        self._due = limit
        """Size at which the file is set aside."""
        self._looked = 0.0
        self._again = float("-inf")
        """When to set aside again after that has failed, monotonic seconds."""
        self._thread = threading.Thread(target=self._write_all, name="lighthouse-log", daemon=True)
        self._thread.start()

    def write(self, line: bytes) -> None:
        """Have a line written, some time; one without a newline gets one."""
        if not line.endswith(b"\n"):
            line += b"\n"  # the last words of one who was killed: the next line is another's
        with self._count:
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
            try:
                self._append(line)
            except OSError:
                with self._count:
                    self._dropped += 1
                self._close_file()
            with self._count:
                self._waiting -= len(line)
        self._close_file()

    def _append(self, line: bytes) -> None:
        path = self._path()
        if self._file is None or path != self._open_path or self._is_another(path):
            self._close_file()
            self._file = self._open(path)
            self._open_path = path
        if self._dropped:
            with self._count:
                count, self._dropped = self._dropped, 0
            _write(self._file, b"[supervisor] %d lines of this log were lost\n" % count)
        _write(self._file, line)
        if self._file.tell() >= self._due and time.monotonic() >= self._again:
            another = self._is_another(path, now=True)
            self._close_file()
            if not another:
                self._tidy(lambda: set_aside(path))

    def _open(self, path: Path) -> io.FileIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        if time.monotonic() >= self._again:
            self._tidy(lambda: recover(path))
        file = open_log(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
        try:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                _write(file, first_line(_next_number(path)))
            elif os.pread(file.fileno(), 1, size - 1) != b"\n":
                _write(file, b"\n")
        except OSError:
            file.close()
            raise
        kept = 0
        with contextlib.suppress(OSError):
            kept = os.stat(older_of(path)).st_size
        self._due, self._looked = max(self._limit, kept), time.monotonic()
        return file

    def _tidy(self, work: Callable[[], bool]) -> None:
        """Set aside what is full; where that fails the log goes on growing meanwhile."""
        try:
            done = work()
        except OSError:
            done = False
        if not done:
            self._again = time.monotonic() + AGAIN_SECONDS

    def _is_another(self, path: Path, *, now: bool = False) -> bool:
        """Whether the open file is no more what ``path`` names: removed, or set aside by another."""
        if not now and time.monotonic() - self._looked < LOOK_EVERY:
            return False
        self._looked = time.monotonic()
        return self._file is None or identity(path) != identity(self._file.fileno())

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = self._open_path = None


def older_of(path: Path) -> Path:
    """Where what is kept of the full logs of ``path`` stands."""
    return path.with_name(path.name + ".1")


def full_of(path: Path) -> Path:
    """Where a full log of ``path`` stands until it is compacted."""
    return path.with_name(path.name + ".full")


def open_log(path: Path, flags: int = os.O_RDONLY) -> io.FileIO:
    """Open a log, unbuffered; never waits for anybody.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe or anything but a regular file.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device"
        raise OSError(errno.EINVAL, f"it is {what}, not a regular file", str(path))
    return io.FileIO(descriptor, "r" if flags == os.O_RDONLY else "r+")


def identity(path: Path | int) -> tuple[int, int] | None:
    """What tells a file from another one of its name; None where there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def log_number(file: io.FileIO) -> int | None:
    """Number of an open log; 0: it says none, None: its first line is not whole yet."""
    return number_of(os.pread(file.fileno(), LINE_BYTES, 0))


def kept_up_to(file: io.FileIO) -> int:
    """Number of the newest log of which ``file`` keeps what it said; 0: it says none."""
    size = os.fstat(file.fileno()).st_size
    return newest_ended(os.pread(file.fileno(), LINE_BYTES, max(0, size - LINE_BYTES)))


def whole_lines(file: io.FileIO, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Blocks of whole lines from ``offset`` on, each with its own; the last one gets its newline.

    Raises:
        OSError: it cannot be read.
    """
    half = b""
    while piece := os.pread(file.fileno(), _PIECE, offset + len(half)):
        end = piece.rfind(b"\n") + 1
        if not end:
            half += piece
            continue
        block = half + piece[:end]
        yield offset, block
        half, offset = piece[end:], offset + len(block)
    if half:
        yield offset, half + b"\n"


def set_aside(path: Path) -> bool:
    """Make room at ``path``: what the log there says that is new goes to ``<name>.1``.

    A reader of the old file keeps it open and reads it to its end; one that starts later
    finds the same events in ``<name>.1``.

    Returns:
        False: another process is at it.

    Raises:
        OSError: it cannot be done; nothing is lost by that.
    """
    lock = acquire(_lock_of(path))
    if lock is None:
        return False
    with lock:
        _compact_full(path)
        os.replace(path, full_of(path))
        # A log that is not there looks like one that was removed.
        with open_log(path, os.O_RDWR | os.O_APPEND | os.O_CREAT) as fresh:
            _write(fresh, first_line(_next_number(path)))
        _compact_full(path)
    return True


def recover(path: Path) -> bool:
    """Finish what a killed process has begun to set aside; otherwise as ``set_aside``."""
    if not full_of(path).exists():
        return True
    lock = acquire(_lock_of(path))
    if lock is None:
        return False
    with lock:
        _compact_full(path)
    return True


def _compact_full(path: Path) -> None:
    """Add what is new in ``<name>.full`` to ``<name>.1``, once, and remove it."""
    older, full, fresh = older_of(path), full_of(path), path.with_name(path.name + ".new")
    try:
        log = open_log(full)
    except FileNotFoundError:
        return
    with log:
        known = _kept(older)
        number = log_number(log) or known + 1
        if number > known:  # else it was killed before it removed the file
            fresh.unlink(missing_ok=True)
            with fresh.open("xb") as out:
                compaction = Compaction(out.write)
                _begin(older, log, compaction, out)
                for offset, block in whole_lines(log):
                    compaction.feed(block if offset else without_first_line(block))
                compaction.feed(ended(number))
                compaction.finish()
                out.flush()
                os.fsync(out.fileno())
            os.replace(fresh, older)
        full.unlink()


def _begin(older: Path, log: io.FileIO, compaction: Compaction, out: io.BufferedWriter) -> None:
    """What was kept before: copied, but for its end, which the new log goes on with."""
    try:
        kept = open_log(older)
    except FileNotFoundError:
        if os.pread(log.fileno(), len(UTC_MARK), 0).startswith(UTC_MARK[:-1]):
            out.write(UTC_MARK)
        return
    with kept:
        left = settled = _settled(kept)
        while left and (piece := os.pread(kept.fileno(), min(left, _PIECE), settled - left)):
            out.write(piece)
            left -= len(piece)
        for _, block in whole_lines(kept, settled):
            compaction.feed(block)
        if kept_up_to(kept) == 0:
            compaction.feed(ended(0))  # of an earlier version of the kit


def _settled(kept: io.FileIO) -> int:
    """Bytes at the start of what is kept that stay so, whatever follows.

    The newest quorum may be superfluous, and whether it is tells the one before.
    """
    size = os.fstat(kept.fileno()).st_size
    length = _PIECE
    while True:
        end = os.pread(kept.fileno(), length, max(0, size - length))
        start = newest_quorums(end, 2)
        if start is not None or length >= size:
            return max(0, size - length) + start if start is not None else 0
        length *= 2


def _kept(older: Path) -> int:
    try:
        with open_log(older) as kept:
            return kept_up_to(kept)
    except FileNotFoundError:
        return 0


def _next_number(path: Path) -> int:
    """Number of the log that is begun now."""
    known = _kept(older_of(path))
    with contextlib.suppress(FileNotFoundError), open_log(full_of(path)) as full:
        known = max(known, log_number(full) or known + 1)
    return known + 1


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _write(file: io.FileIO, line: bytes) -> None:
    if file.write(line) != len(line):
        raise OSError(errno.ENOSPC, "not all of it was written")
