"""Follows growing files: truncation, rotation, replacement, half lines, late birth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

#: Bytes read from one file in one go, so that a large log is taken in pieces.
CHUNK = 256 << 10
#: A "line" longer than this is dropped: memory is finite. (A quorum of ten thousand
#: replica groups is a line of some six megabytes.)
LONGEST_LINE = 64 << 20


class Tail:
    """New whole lines of one file, each once, with the offset where it starts.

    ``older`` is where the file's writer sets a full one aside: it is read first, once.
    """

    def __init__(self, path: Path, older: Path | None = None, chunk: int = CHUNK) -> None:
        self.path = path
        self._chunk = chunk
        self._older = older
        self._file: BinaryIO | None = None
        self._inode = 0
        self._offset = 0
        self._half = b""

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """Runs of lines that are complete now, each ending in a newline, with its offset.

        A missing file has none yet.

        Raises:
            OSError: the file is there and cannot be read.
        """
        if self._file is None and self._older is not None:
            yield from self._set_aside(self._older)
        yield from self._drain()
        if self._replaced():
            # What was written to the old file before it was set aside is already drained.
            self.close()
            yield from self._drain()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines that are complete now, without their newline; otherwise as ``blocks``."""
        for offset, block in self.blocks():
            for line in block[:-1].split(b"\n"):
                yield offset, line
                offset += len(line) + 1

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._offset, self._half = None, 0, b""

    def _set_aside(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """The older file, whole; again when another took its place meanwhile."""
        inode = -1
        while (now := _inode(path)) not in (None, inode):
            inode = now
            with Tail(path, chunk=self._chunk) as older:
                yield from older.blocks()

    def _drain(self) -> Iterator[tuple[int, bytes]]:
        if self._file is None:
            try:
                self._file = self.path.open("rb", buffering=0)
            except FileNotFoundError:
                return
            self._inode = os.fstat(self._file.fileno()).st_ino
        size = os.fstat(self._file.fileno()).st_size
        if size < self._offset + len(self._half):
            self._offset, self._half = 0, b""  # truncated: it starts anew
        self._file.seek(self._offset + len(self._half))
        while chunk := self._file.read(self._chunk):
            end = chunk.rfind(b"\n") + 1
            if not end:
                self._half += chunk
                if len(self._half) > LONGEST_LINE:
                    self._offset += len(self._half)
                    self._half = b""
                continue
            block = self._half + chunk[:end]
            start, self._half = self._offset, chunk[end:]
            self._offset += len(block)
            yield start, block

    def _replaced(self) -> bool:
        if self._file is None:
            return False
        return _inode(self.path) not in (None, self._inode)


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None
