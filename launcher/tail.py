"""Follows growing files: truncation, rotation, replacement, half lines, late birth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

#: Bytes read from one file in one go, so that a large log is taken in pieces.
CHUNK = 1 << 20
#: A "line" longer than this is cut: no log of ours has one, and memory is finite.
LONGEST_LINE = 8 << 20


class Tail:
    """New whole lines of one file, each once, with the offset where it starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None
        self._inode = 0
        self._offset = 0
        self._half = b""

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines that are complete now. A missing file has none yet.

        Raises:
            OSError: the file is there and cannot be read.
        """
        yield from self._drain()
        if self._replaced():
            # What was written to the old file before it was set aside is already drained.
            self.close()
            yield from self._drain()

    def __enter__(self) -> Tail:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._offset, self._half = None, 0, b""

    def _drain(self) -> Iterator[tuple[int, bytes]]:
        if self._file is None:
            try:
                self._file = self.path.open("rb")
            except FileNotFoundError:
                return
            self._inode = os.fstat(self._file.fileno()).st_ino
        size = os.fstat(self._file.fileno()).st_size
        if size < self._offset + len(self._half):
            self._offset, self._half = 0, b""  # truncated: it starts anew
        self._file.seek(self._offset + len(self._half))
        while chunk := self._file.read(CHUNK):
            *whole, self._half = (self._half + chunk).split(b"\n")
            for line in whole:
                yield self._offset, line
                self._offset += len(line) + 1
            if len(self._half) > LONGEST_LINE:
                self._offset += len(self._half)
                self._half = b""

    def _replaced(self) -> bool:
        if self._file is None:
            return False
        try:
            return os.stat(self.path).st_ino != self._inode
        except FileNotFoundError:
            return False
