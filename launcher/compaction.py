"""What is kept of a lighthouse's logs that were set aside: each thing that was said once.

A quorum is announced at every step, and changes with a loss or a return. Kept are each quorum
that was a new one, with what led to it, and the newest one, with what has happened since.

Logs are numbered from one. A log says its number in its first line, and where it ended among
what is kept is said there, so that a reader knows from where to go on. Pure: bytes in, bytes out.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from launcher.lighthouse_log import UTC_MARK

_QUORUM = b"Quorum! Quorum { quorum_id: "
#: Where the exclamation mark stands in it: one rare character is found at memory speed.
_MARK = _QUORUM.index(b"!")
_STATUS = b"uorum status: "
_LISTENING = b"Lighthouse listening on: "
_REQUEST = re.compile(rb"quorum request for replica (\S+)")
_NUMBERED = UTC_MARK[:-1] + b"; log "
_FIRST_LINE = re.compile(re.escape(_NUMBERED) + rb"(\d{1,18})\n")
_ENDED = b"[supervisor] here ended log "
_ENDED_LINE = re.compile(rb"^" + re.escape(_ENDED) + rb"(\d{1,18})\n", re.MULTILINE)
#: Bytes kept of what happened between two quorums before it is made less: where nobody can meet,
#: all ask again and again.
WHOLE_BYTES = 4 << 20
#: Bytes in which the first line of a log, or where the newest one ended, is found.
LINE_BYTES = 200


def first_line(number: int) -> bytes:
    """First line of log ``number``: a ``LighthouseReader`` takes it for ``UTC_MARK``."""
    return b"%b%d\n" % (_NUMBERED, number)


def number_of(start: bytes) -> int | None:
    """Number of a log that starts so; 0: it says none, None: its first line is not whole yet."""
    if found := _FIRST_LINE.match(start):
        return int(found[1])
    begun = b"\n" not in start and (start[: len(_NUMBERED)] == _NUMBERED[: len(start)])
    return None if begun else 0


def ended(number: int) -> bytes:
    """Line that says where log ``number`` ended."""
    return b"%b%d\n" % (_ENDED, number)


def newest_ended(end: bytes) -> int:
    """Number of the newest of the logs that were compacted into a file that ends so; 0: none."""
    last = end[end.rfind(b"\n", 0, max(0, len(end) - 1)) + 1 :]
    found = _ENDED_LINE.match(last)
    return int(found[1]) if found else 0


def without_first_line(block: bytes) -> bytes:
    """The first block of a log without what says its number, or that its times are UTC."""
    return block[block.find(b"\n") + 1 :] if block.startswith(UTC_MARK[:-1]) else block


def newest_quorums(log: bytes, count: int) -> int | None:
    """Offset of the line of the ``count``-newest quorum; None where that is not (whole) in it."""
    end = len(log)
    for _ in range(count):
        end = log.rfind(_QUORUM, 0, end)
        if end < 0:
            return None
    start = log.rfind(b"\n", 0, end) + 1
    return start or None


class Resumption:
    """Finds in what is kept where a reader goes on that knows the logs up to ``known``."""

    def __init__(self, known: int) -> None:
        self._known = known
        self._quorum = self._listening = -1
        """Offsets of the newest line of each kind."""

    def look(self, offset: int, block: bytes) -> int | None:
        """The offset, once the block (whole lines) is reached that tells it.

        That is where the first newer log begins, or the newest quorum before: quorums that
        were left out since have ended what had led to the next one until then.
        """
        for found in _ENDED_LINE.finditer(block):
            if int(found[1]) >= self._known:
                self._see(offset, block, found.start())
                goes_on = self._quorum >= 0 and self._quorum > self._listening
                return self._quorum if goes_on else offset + found.end()
        self._see(offset, block, len(block))
        return None

    def _see(self, offset: int, block: bytes, end: int) -> None:
        if (quorum := block.rfind(_QUORUM, 0, end)) >= 0:
            self._quorum = offset + block.rfind(b"\n", 0, quorum) + 1
        if (listening := block.rfind(_LISTENING, 0, end)) >= 0:
            self._listening = offset + listening


class Compaction:
    """Takes in logs, in blocks of whole lines, and writes what of them is kept.

    A ``LighthouseReader`` finds the same events in it, whatever follows; what is compacted
    again, with more behind it, loses no event either.
    """

    def __init__(self, write: Callable[[bytes], object], whole_bytes: int = WHOLE_BYTES) -> None:
        self._write = write
        self._whole_bytes = whole_bytes
        self._quorum_id = b""
        self._newest = b""
        """Line of the newest quorum, while it is not known whether it is kept."""
        self._since: list[bytes] = []
        """Lines since the newest quorum."""
        self._bytes, self._due = 0, whole_bytes
        """How many that are, and from how many on they are made less."""
        self._restarted = False
        """Whether the lighthouse was, since then."""
        self._ended = b""
        """Says where a log ended: written once something follows, or at the end."""

    def feed(self, block: bytes) -> None:
        """Take in whole lines.

        Raises:
            OSError: as ``write``.
        """
        after, position = 0, block.find(b"!")
        while position >= 0:
            if not block.startswith(_QUORUM, position - _MARK):
                position = block.find(b"!", position + 1)
                continue
            found = position - _MARK + len(_QUORUM)
            quorum_id = block[found : block.find(b",", found, found + 24)]
            start = block.rfind(b"\n", 0, position) + 1
            end = block.find(b"\n", position) + 1
            if (
                quorum_id != self._quorum_id
                or self._restarted
                or block.find(_LISTENING, after, start) >= 0
                or block.find(_ENDED, after, start) >= 0
            ):
                self._take(block[after:start])
            self._quorum(block[start:end], quorum_id)
            after, position = end, block.find(b"!", end)
        self._take(block[after:])

    def finish(self) -> None:
        """Write what is left: the newest quorum, and what has happened since.

        Raises:
            OSError: as ``write``.
        """
        self._keep([self._newest, *self._since])
        self._write(self._ended)

    def _quorum(self, line: bytes, quorum_id: bytes) -> None:
        if quorum_id == self._quorum_id and not self._restarted:
            for before in self._since:
                self._ended = before if before.startswith(_ENDED) else self._ended
            self._newest = line
        else:
            # The last line before a restart tells how long the lighthouse was there.
            self._keep([self._newest] if self._restarted else [])
            self._keep([*self._since, line])
            self._newest, self._quorum_id = b"", quorum_id
        self._since, self._bytes, self._due = [], 0, self._whole_bytes
        self._restarted = False

    def _take(self, text: bytes) -> None:
        """Take in what stands between two quorums."""
        self._since += [line + b"\n" for line in text.split(b"\n")[:-1]]
        self._bytes += len(text)
        self._restarted = self._restarted or _LISTENING in text
        if self._bytes > self._due:
            self._thin_out()

    def _thin_out(self) -> None:
        """Of requests, whoever asks first counts; of statuses the newest.

        The last line of each kind stays: it may be the last one before a restart.
        """
        kept: dict[tuple[object, ...], bytes] = {}
        restarts = 0
        for line in self._since:
            key: tuple[object, ...] = ("line", len(kept), line)
            if request := _REQUEST.search(line):
                key = (restarts, request[1])
                if key in kept:
                    key = (restarts, "asked again")
            elif _STATUS in line:
                key = (restarts, "status")
            elif _LISTENING in line:
                restarts += 1
            kept.pop(key, None)
            kept[key] = line
        self._since = list(kept.values())
        self._bytes = sum(map(len, self._since))
        self._due = max(self._whole_bytes, 2 * self._bytes)

    def _keep(self, lines: list[bytes]) -> None:
        for line in lines:
            if line.startswith(_ENDED):
                self._ended = line
            elif line:
                self._write(self._ended)
                self._write(line)
                self._ended = b""
