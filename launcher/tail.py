"""Follows growing files: truncation, rotation, replacement, half lines, late birth."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

from launcher.capped_log import full_of, identity, kept_up_to, log_number, open_log, whole_lines
from launcher.compaction import Resumption

#: Bytes read from one file in one go, so that a large log is taken in pieces.
CHUNK = 256 << 10
#: A "line" longer than this is dropped: memory is finite. (A quorum of ten thousand
#: replica groups is a line of some six megabytes.)
LONGEST_LINE = 64 << 20
#: Bytes before the place that is reached which must still be there when the file has grown.
SEEN = 64


class Tail:
    """New whole lines of one file, each once, with the offset where it starts.

    ``older`` is where a ``CappedLog`` keeps what its full logs said. It is read first, once; and
    again from where it has news, when more logs became full between two looks than the one that
    is followed. A log that is just being set aside is read under the name it has meanwhile.
    """

    def __init__(self, path: Path, older: Path | None = None, chunk: int = CHUNK) -> None:
        self.path = path
        self.current = path.name
        """Name of the file that the newest block is of: its offset is one of that file."""
        self._older = older
        self._chunk = chunk
        self._at: _Reading | None = None
        self._known = -1
        """Number of the newest log that is read to its end; -1: nothing is read."""

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """Runs of lines that are complete now, each ending in a newline, with its offset.

        A missing file has none yet. The last line of a file that was replaced is complete.

        Raises:
            OSError: the file is there and cannot be read, or is no regular file.
        """
        while (at := self._at or self._next()) is not None:
            self._at = at
            # Asked before it is read to its end: whoever replaced it has written all by then.
            over = at.whole or self._replaced(at)
            self.current = at.name
            try:
                yield from at.blocks(self._chunk)
                if over and at.half:
                    yield at.offset, bytes(at.half) + b"\n"
            except OSError:
                if over and not at.whole:
                    self._leave(at)  # gone for good, as on NFS when another machine removed it
                raise
            if not over:
                return
            self._leave(at)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines that are complete now, without their newline; otherwise as ``blocks``."""
        for offset, block in self.blocks():
            for line in block[:-1].split(b"\n"):
                yield offset, line
                offset += len(line) + 1

    def rest(self) -> tuple[int, bytes] | None:
        """What stood after the last newline when ``blocks`` had given all, with its offset.

        None where nothing did. For one who looks for the last time: the line of a writer that
        was killed has no newline. Consumes nothing: once that line has grown to its end,
        ``blocks`` gives the whole of it, also its beginning. Of the file ``current``.
        """
        if self._at is None or not self._at.half:
            return None
        return self._at.offset, bytes(self._at.half)

    def exists(self) -> bool:
        """Whether the file is there, or what is kept of those before it."""
        return self.path.exists() or (self._older is not None and self._older.exists())

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; what is asked for afterwards begins anew."""
        if self._at is not None:
            self._at.file.close()
        self._at, self._known = None, -1

    def _leave(self, at: _Reading) -> None:
        at.file.close()
        self._at, self._known = None, max(self._known, at.number)

    def _next(self) -> _Reading | None:
        """The file to read now; None while there is none, or none with news."""
        if self._older is None:
            return _open(self.path)
        opened: list[_Reading] = []
        chosen = None
        try:
            chosen = self._choose(self._older, opened)
        finally:
            for reading in opened:
                if reading is not chosen:
                    reading.file.close()
        return chosen

    def _choose(self, kept: Path, opened: list[_Reading]) -> _Reading | None:
        # Opened in the order in which lines move on: what one has left, the next one has.
        for path in (self.path, full_of(self.path), kept):
            if (reading := _open(path)) is not None:
                opened.append(reading)
        log, full, older = (
            next((reading for reading in opened if reading.name == path.name), None)
            for path in (self.path, full_of(self.path), kept)
        )
        if older is not None:
            older.number, older.whole = kept_up_to(older.file), True
            if self._known < 0:
                return older
        wanted = max(self._known, 0) + 1
        if log is not None and (number := log_number(log.file)) is not None:
            log.number = number or wanted  # where it says none, it is taken for the next one
            if log.number <= wanted:
                return log
        if full is not None:
            full.number = log_number(full.file) or wanted
            if full.number == wanted:
                return full
        if older is not None and older.number > self._known:
            older.offset = _going_on(older.file, self._known)
            return older
        return log if log is not None and log.number else None

    def _replaced(self, at: _Reading) -> bool:
        """Whether another file has come where this one was."""
        now = identity(self.path)
        return now is not None and now != identity(at.file.fileno())


class _Reading:
    """A file that is being read."""

    def __init__(self, file: io.FileIO, name: str) -> None:
        self.file = file
        self.name = name
        self.number = 0
        """Of the newest log that is known once this is read."""
        self.whole = False
        """Whether it never grows."""
        self.offset = 0
        """Of the first line that was not given yet."""
        self.half = bytearray()
        """What is read of that line."""
        self._skips = False
        """Whether it stands within a line that is too long."""
        self._seen = b""

    def blocks(self, chunk: int) -> Iterator[tuple[int, bytes]]:
        descriptor = self.file.fileno()
        at = self.offset + len(self.half)
        size = os.fstat(descriptor).st_size
        if size < at or (size > at and self._is_rewritten(at)):
            at = self.offset = 0
            self.half.clear()
            self._skips, self._seen = False, b""
        while data := os.pread(descriptor, chunk, at):
            at += len(data)
            self._seen = data[-SEEN:]
            if self._skips:
                start = data.find(b"\n") + 1
                self._skips = not start
                self.offset += start or len(data)
                data = data[start:] if start else b""
            end = data.rfind(b"\n") + 1
            block = b"".join([self.half, memoryview(data)[:end]]) if end else b""
            if end:
                self.half.clear()
            self.half += data[end:]
            if len(self.half) > LONGEST_LINE:
                self.offset += len(self.half)
                self.half.clear()
                self._skips = True
            if block:
                start, self.offset = self.offset, self.offset + len(block)
                yield start, block

    def _is_rewritten(self, at: int) -> bool:
        """Whether the file was emptied, and has grown beyond the place that was reached."""
        # Of a file that another machine writes NFS may show zeros for a while.
        if b"\0" in self._seen:
            return False
        return os.pread(self.file.fileno(), len(self._seen), at - len(self._seen)) != self._seen


def _open(path: Path) -> _Reading | None:
    try:
        return _Reading(open_log(path), path.name)
    except FileNotFoundError:
        return None


def _going_on(older: io.FileIO, known: int) -> int:
    """Offset in what is kept from which one reads who knows the logs up to ``known``."""
    resumption = Resumption(known)
    offset = 0
    for offset, block in whole_lines(older):
        if (found := resumption.look(offset, block)) is not None:
            return found
    return offset
