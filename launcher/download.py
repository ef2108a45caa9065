"""Fetches shards of a dataset: some at a time, going on where an earlier call was ended."""

from __future__ import annotations

import os
import queue
import shutil
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launcher import lock
from launcher.datafiles import MANIFEST
from launcher.hub import Hub
from launcher.model import KitError, UsageError
from launcher.shards import PLAN, Shard, ShardSet, megabytes, read, sha256, size_of

#: Files that are fetched at the same time.
STREAMS = 4
#: Share of a file system that a download leaves free: others write there too.
SPARE_SHARE = 0.01
#: Seconds for which an interrupted download waits for its streams to end.
END_SECONDS = 3.0

Say = Callable[[str], None]
#: Called a few times a second with (bytes that are there, bytes of the whole set).
Tick = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A dataset of numbered files on the hub."""

    dataset: str
    repository: str
    template: str
    """Name of a shard in the repository; ``{}`` is filled with its number."""
    total: int
    """Number of shards."""

    def names(self, first: int, count: int) -> list[str]:
        """Names of ``count`` shards.

        Raises:
            UsageError: there are not so many.
        """
        if first < 0 or count < 1 or first + count > self.total:
            raise UsageError(
                f"{self.dataset} has {self.total} shards, numbered from 0: --first {first} "
                f"--shards {count} is beyond them"
            )
        return [self.template.format(number) for number in range(first, first + count)]


#: What can be fetched, by the names that torchtitan gives the same data.
SOURCES = {
    source.dataset: source
    for source in (
        Source(
            dataset="c4",
            repository="allenai/c4",
            template="en/c4-train.{:05d}-of-01024.json.gz",
            total=1024,
        ),
        Source(
            dataset="c4_validation",
            repository="allenai/c4",
            template="en/c4-validation.{:05d}-of-00008.json.gz",
            total=8,
        ),
    )
}


def fetch(
    source: Source,
    folder: Path,
    hub: Hub,
    *,
    count: int | None,
    first: int = 0,
    say: Say = lambda line: None,
    tick: Tick = lambda done, total: None,
) -> ShardSet:
    """Add shards to the set in ``folder``; ``count`` None: only complete what was begun.

    What is there is not fetched again: shards are known by name and size, and one that no list
    knows (copied by hand) by its hash. Ends with the whole set, or raises and can be repeated.

    Raises:
        UsageError: no such shards, too little space, or somebody else fetches into ``folder``.
        KitError: the hub cannot be reached, or a file came damaged twice.
        KeyboardInterrupt: it was interrupted; everything fetched so far is kept.
    """
    names = [] if count is None else source.names(first, count)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        whole, plan = read(folder / MANIFEST), read(folder / PLAN)
        wanted = _wanted(source, hub, whole, plan, names)
        missing = [shard for shard in wanted.shards if not _is_there(folder, shard, whole, plan)]
        if missing:
            _check_space(folder, missing)
            for shard in missing:
                _set_aside(folder / shard.file, shard)
            wanted.write(folder / PLAN)
            say(
                f"{source.repository}: {len(missing)} of {len(wanted.shards)} shards to fetch, "
                f"{megabytes(_lacking(folder, missing))}"
            )
            _Download(wanted, folder, hub, missing, say, tick).run()
        wanted.write(folder / MANIFEST)
        (folder / PLAN).unlink(missing_ok=True)
    return wanted


def part_of(path: Path) -> Path:
    """Where the beginning of a file lies while it is fetched."""
    return path.with_name(f"{path.name}.part")


def _locked(folder: Path) -> IO[str]:
    taken = lock.acquire(folder / ".lock")
    if taken is None:
        who = (folder / ".lock").read_text(encoding="utf-8", errors="replace").strip()
        raise UsageError(
            f"{who or 'somebody else'} is fetching into {folder}: wait until that is done, or end it"
        )
    taken.truncate(0)
    taken.write(f"process {os.getpid()} on {socket.gethostname()}")
    taken.flush()
    return taken


def _wanted(
    source: Source,
    hub: Hub,
    whole: ShardSet | None,
    plan: ShardSet | None,
    names: Sequence[str],
) -> ShardSet:
    """The set to end with: what is there, and ``names`` (without them: what was begun)."""
    before = whole or plan
    known = {shard.name: shard for one in (plan, whole) if one is not None for shard in one.shards}
    if not names:
        if before is None:
            raise UsageError(
                f"nothing of {source.dataset} was fetched before: say how much with --shards N"
            )
        chosen = known
    else:
        chosen = {shard.name: shard for shard in whole.shards} if whole is not None else {}
        chosen |= {name: known[name] for name in names if name in known}
    commit = before.commit if before is not None else ""
    if missing := [name for name in names if name not in chosen]:
        commit = commit or hub.commit(source.repository)
        listed = hub.files(source.repository, commit, missing[0].rpartition("/")[0])
        there = {shard.name: shard for shard in listed}
        if absent := [name for name in missing if name not in there]:
            raise KitError(f"{source.repository} at {commit[:12]} has no file {absent[0]}")
        chosen |= {name: there[name] for name in missing}
    return ShardSet(
        dataset=source.dataset,
        repository=source.repository,
        commit=commit,
        shards=tuple(sorted(chosen.values(), key=lambda shard: shard.name)),
    )


def _is_there(folder: Path, shard: Shard, whole: ShardSet | None, plan: ShardSet | None) -> bool:
    """Whether a shard need not be fetched. A file of ours has its name only when it is whole; of
    one that no list of ours knows, the hash says it."""
    path = folder / shard.file
    if size_of(path) != shard.size:
        return False
    ours = any(one is not None and shard in one.shards for one in (whole, plan))
    return ours or sha256(path) == shard.sha256


def _set_aside(path: Path, shard: Shard) -> None:
    """Take its name from a file that is not the shard; what was cut short is gone on with."""
    size = size_of(path)
    if max(0, size_of(part_of(path))) < size < shard.size:
        os.replace(path, part_of(path))
    else:
        path.unlink(missing_ok=True)


def _lacking(folder: Path, missing: Sequence[Shard]) -> int:
    """Bytes that must still come."""
    return sum(
        max(0, shard.size - max(0, size_of(part_of(folder / shard.file)))) for shard in missing
    )


def _check_space(folder: Path, missing: Sequence[Shard]) -> None:
    usage = shutil.disk_usage(folder)
    need = _lacking(folder, missing)
    spare = int(usage.total * SPARE_SHARE)
    if need + spare > usage.free:
        raise UsageError(
            f"{folder} needs {megabytes(need)} more, and its file system has {megabytes(usage.free)} "
            f"free, of which {megabytes(spare)} are left to others: make room, or ask for fewer --shards"
        )


class _StoppedError(Exception):
    """Another stream failed, or the whole was interrupted."""


class _Download:
    """The streams of one call."""

    def __init__(
        self,
        wanted: ShardSet,
        folder: Path,
        hub: Hub,
        missing: Sequence[Shard],
        say: Say,
        tick: Tick,
    ) -> None:
        self._wanted = wanted
        self._folder = folder
        self._hub = hub
        self._missing = missing
        self._say = say
        self._tick = tick
        self._bytes = wanted.size - _lacking(folder, missing)
        self._counting = threading.Lock()
        self._stop = threading.Event()
        self._todo: queue.SimpleQueue[Shard] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[Shard | BaseException] = queue.SimpleQueue()

    def run(self) -> None:
        for shard in self._missing:
            self._todo.put(shard)
        # Daemons: a stream that hangs in the network must not outlive Ctrl-C by its time limit.
        streams = [
            threading.Thread(target=self._work, daemon=True)
            for _ in range(min(STREAMS, len(self._missing)))
        ]
        try:
            for stream in streams:
                stream.start()
            self._follow()
        finally:
            self._stop.set()
            for stream in streams:
                stream.join(END_SECONDS)

    def _follow(self) -> None:
        total = len(self._wanted.shards)
        number = total - len(self._missing)
        while number < total:
            self._tick(self._bytes, self._wanted.size)
            try:
                ended = self._ended.get(timeout=0.2)
            except queue.Empty:
                continue
            if isinstance(ended, BaseException):
                raise ended
            number += 1
            self._say(
                f"{ended.file}: {megabytes(ended.size)}, sha256 as on the hub ({number} of {total})"
            )
        self._tick(self._bytes, self._wanted.size)

    def _work(self) -> None:
        while not self._stop.is_set():
            try:
                shard = self._todo.get_nowait()
            except queue.Empty:
                return
            try:
                self._one(shard)
            except BaseException as error:
                self._ended.put(error)
                return
            self._ended.put(shard)

    def _one(self, shard: Shard) -> None:
        path = self._folder / shard.file
        part = part_of(path)
        for attempt in (1, 2):
            with part.open("ab") as file:
                if file.tell() > shard.size:
                    file.truncate(0)
                    file.seek(0)
                self._hub.download(
                    self._wanted.repository, self._wanted.commit, shard, file, self._progress
                )
                file.flush()
                os.fsync(file.fileno())
            if sha256(part) == shard.sha256:
                os.replace(part, path)
                return
            part.unlink()
            self._progress(-shard.size)
            if attempt == 1:
                self._say(f"{shard.file} came damaged: once more from its beginning")
        raise KitError(
            f"{shard.file} came twice with another sha256 than the hub says: is there a proxy that "
            "changes what it passes on, or a fault of this machine's memory or disk?"
        )

    def _progress(self, count: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        with self._counting:
            self._bytes += count
