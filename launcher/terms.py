"""Who serves a run as its lighthouse: terms of office, each given out once.

A term is a number that only grows; whoever serves from then on creates its file exclusively. Term
0 is the lighthouse of the login node, and so is every term that names no address. A replica group
that has lost the lighthouse votes for the next term, and from then on has nothing to do with the
present one: a vote cannot be taken back. So a lighthouse that all groups have voted against serves
nobody, and another may take its place without two of them ever deciding at once.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.files import create_once, overwrite, read_json
from launcher.model import KitError

#: Terms of which the files are kept, besides the newest one.
KEPT = 8
#: Seconds by which shared files may show one group's steps later than another's.
FILES_LAG = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """From when on who serves."""

    number: int
    serving: str = ""
    """``host:port`` of a lighthouse that stands in; empty: that of the login node, as published."""
    by: str = ""
    """Who created it, in words."""
    t: float = 0.0
    """Unix seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The newest step that a replica group has committed."""

    t: float
    """Unix seconds."""
    step: int


class Terms:
    """The terms of one run, in ``folder``.

    What others poll is overwritten in place: network file systems show a new file late.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._newest = folder / "newest.json"

    def begin(self, replica: int) -> None:
        """Make the files that others will look for.

        Raises:
            KitError: they cannot be written.
        """
        with _said(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            create_once(self._newest, _text(asdict(Term(number=0))))
            create_once(self._vote(replica), _text({"number": 0}))
            try:
                self._voted(replica)
            except KitError:  # damaged: it may have been a vote
                overwrite(self._vote(replica), _text({"number": self.newest().number + 1}))

    def newest(self) -> Term:
        """The present term.

        Raises:
            KitError: it cannot be read.
        """
        try:
            newest = _term(self._newest) or Term(number=0)
        except KitError:  # damaged: terms that were taken are there all the same
            numbers = [int(p.stem) for p in self._folder.glob("*.taken") if p.stem.isdigit()]
            newest = (_term(self._taken(max(numbers))) if numbers else None) or Term(number=0)
        while (following := _term(self._taken(newest.number + 1))) is not None:
            newest = following
        return newest

    def vote(self, number: int, replica: int) -> None:
        """Vote for a term, for good; not on a full disk, where nobody could take that term.

        Raises:
            KitError: it cannot be written.
        """
        room = self._folder / f"room.{replica}"
        with _said(self._folder):
            create_once(room, _text({"number": number}))
            room.unlink()
            overwrite(self._vote(replica), _text({"number": number}))

    def voters(self, number: int, replicas: Iterable[int]) -> frozenset[int]:
        """Which of those replica groups have nothing to do with the terms before ``number``.

        Raises:
            KitError: that cannot be read.
        """
        return frozenset(replica for replica in replicas if self._voted(replica) >= number)

    def present_for(self, replica: int) -> Term | None:
        """The present term; None for a replica group that has voted for the next one.

        Raises:
            KitError: it cannot be read.
        """
        newest = self.newest()
        return None if self._voted(replica) > newest.number else newest

    def take(self, number: int, serving: str, by: str) -> bool:
        """Create a term; False when somebody was faster. Who does must hold the one before, or
        have the votes of all ``electors``.

        Raises:
            KitError: it cannot be written.
        """
        term = _text(asdict(Term(number=number, serving=serving, by=by, t=time.time())))
        with _said(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if not create_once(self._taken(number), term):
                return False
            overwrite(self._newest, term)
            self._taken(number - KEPT).unlink(missing_ok=True)
        return True

    def _voted(self, replica: int) -> int:
        raw = read_json(self._vote(replica))
        try:
            return 0 if raw is None else int(raw["number"])
        except (KeyError, TypeError, ValueError) as error:
            raise KitError(f"{self._vote(replica)} is not a vote: {error!r}") from error

    def _vote(self, replica: int) -> Path:
        return self._folder / f"vote.{replica}.json"

    def _taken(self, number: int) -> Path:
        return self._folder / f"{number}.taken"


def electors(commits: Mapping[int, Commit]) -> frozenset[int]:
    """Replica groups without whose votes no other lighthouse may serve.

    Two lighthouses at once could have two groups commit the same step with different
    gradients. One that is behind is no danger: it heals from the others when it meets them. So
    those count that have committed one of the newest two steps, or may have: shared files lag.

    Args:
        commits: newest of each group that has not said that it ended.
    """
    newest = max((commit.step for commit in commits.values()), default=0)
    latest = max((commit.t for commit in commits.values()), default=0.0)
    return frozenset(
        replica
        for replica, commit in commits.items()
        if commit.step >= newest - 1 or commit.t >= latest - FILES_LAG
    )


def _term(path: Path) -> Term | None:
    raw = read_json(path)
    try:
        if raw is None:
            return None
        return Term(
            number=int(raw["number"]),
            serving=str(raw["serving"]),
            by=str(raw["by"]),
            t=float(raw["t"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise KitError(f"{path} is not a term: {error!r}") from error


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value) + "\n"


@contextlib.contextmanager
def _said(folder: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise KitError(f"cannot write below {folder}: {error.strerror}") from error
