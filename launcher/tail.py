"""Follows growing files: truncation, rotation, replacement, half lines, late birth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

#: Bytes read from one file in one go, so that a large log is taken in pieces.
CHUNK = 4 << 20
#: A "line" longer than this is dropped: memory is finite. (A quorum of ten thousand
#: replica groups is a line of some six megabytes.)
LONGEST_LINE = 64 << 20


class Tail:
    """New whole lines of one file, each once, with the offset where it starts."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
        while chunk := self._file.read(CHUNK):
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
        try:
            return os.stat(self.path).st_ino != self._inode
        except FileNotFoundError:
            return False
