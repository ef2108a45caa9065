"""A folder of dataset shards, and how it is found out that one is missing or damaged.

::

    c4/
      c4-train.00000-of-01024.json.gz   a shard; it has this name only once its hash was right
      c4-train.00001-of-01024.json.gz.part   the beginning of one that is being fetched
      shards.json                       the set: what training reads; whole when it was written
      wanted.json                       the set that is being fetched, until it is whole
      .lock                             held by who fetches
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from launcher.datafiles import MANIFEST
from launcher.files import read_json, replace
from launcher.model import BlindError, KitError

PLAN = "wanted.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of a dataset, as the hub describes it."""

    name: str
    """Path in its repository."""
    size: int
    """Bytes."""
    sha256: str

    @property
    def file(self) -> str:
        """Name of the file that it is kept in."""
        return PurePosixPath(self.name).name


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSet:
    """What ``shards.json`` and ``wanted.json`` hold."""

    dataset: str
    """Name by which it is asked for, e.g. ``c4``."""
    repository: str
    commit: str
    """Of the repository: every shard is of this one."""
    shards: tuple[Shard, ...]
    """In the order of their names."""

    @property
    def size(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def summary(self) -> str:
        many = "shard" if len(self.shards) == 1 else "shards"
        return f"{self.dataset}: {len(self.shards)} {many}, {megabytes(self.size)}"

    def write(self, path: Path) -> None:
        replace(path, json.dumps(asdict(self), indent=1) + "\n")


def megabytes(size: int) -> str:
    """Bytes as they are told to people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def read(path: Path) -> ShardSet | None:
    """The set in ``path``; None when there is no such file.

    Raises:
        KitError: it is there and cannot be read.
    """
    raw = read_json(path)
    if raw is None:
        return None
    try:
        shards = tuple(Shard(**entry) for entry in raw["shards"])
        return ShardSet(
            dataset=str(raw["dataset"]),
            repository=str(raw["repository"]),
            commit=str(raw["commit"]),
            shards=tuple(sorted(shards, key=lambda shard: shard.name)),
        )
    except (KeyError, TypeError) as error:
        raise KitError(
            f"{path} is no list of shards ({error!r}): delete it and fetch the dataset again "
            "(`python -m launcher assets --dataset NAME --shards N`; files that are whole are kept)"
        ) from error


def is_shard_folder(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() or (folder / PLAN).is_file()


def size_of(path: Path) -> int:
    """Bytes of a file; -1 when there is none.

    Raises:
        BlindError: it cannot be looked at.
    """
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1
    except OSError as error:
        raise BlindError(f"{path} cannot be looked at: {error.strerror}") from error


def sha256(path: Path) -> str:
    """Hash of a file.

    Raises:
        BlindError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BlindError(f"{path} cannot be read: {error.strerror}") from error


def verify(folder: Path, deep: bool = False) -> list[str]:
    """What is wrong with the set in ``folder``, each with what to do about it.

    Looks at sizes; ``deep`` reads everything and compares hashes.

    Raises:
        KitError: a list of shards cannot be read.
        BlindError: a file cannot be looked at.
    """
    wanted = read(folder / PLAN)
    if wanted is None:
        return unusable(folder, deep)
    there = sum(size_of(folder / shard.file) == shard.size for shard in wanted.shards)
    unfinished = (
        f"{folder} is half fetched ({there} of {len(wanted.shards)} shards are whole): "
        f"`python -m launcher assets --dataset {wanted.dataset}` goes on"
    )
    if read(folder / MANIFEST) is None:
        return [unfinished]
    return [unfinished, *unusable(folder, deep)]


def unusable(folder: Path, deep: bool = False) -> list[str]:
    """What keeps training from reading the set in ``folder``: as ``verify``, but a set may well
    be in the course of being made larger.

    Raises:
        KitError, BlindError: as ``verify``.
    """
    whole = read(folder / MANIFEST)
    if whole is None:
        return verify(folder) if (folder / PLAN).is_file() else [f"{folder} has no {MANIFEST}"]
    wrong, damaged = [], []
    for shard in whole.shards:
        path = folder / shard.file
        size = size_of(path)
        if size < 0:
            wrong.append(f"{shard.file} is missing")
        elif size != shard.size:
            wrong.append(f"{shard.file} has {size} of {shard.size} bytes")
        elif deep and sha256(path) != shard.sha256:
            damaged.append(shard.file)
    again = f"`python -m launcher assets --dataset {whole.dataset}`"
    found = []
    if wrong:
        found.append(
            f"{folder} is not whole: {_some(wrong)}: run {again}, or mend the path if it was moved"
        )
    if damaged:
        found.append(
            f"{folder} is damaged: {_some(damaged)} not as on the hub (sha256): delete what is "
            f"damaged, then run {again}"
        )
    return found


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (f" and {len(items) - 3} more" if len(items) > 3 else "")
