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
    """Unix seconds; of a group that ended badly since: of that."""
    step: int
    quorum_id: int = 0
    """Newest quorum that it knows of."""


class Terms:
    """The terms of one run, in ``folder``.

    What others poll is overwritten in place: network file systems show a new file late.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._newest = folder / "newest.json"
        self._asked = folder / "asked.json"
        self._lighthouse = folder / "lighthouse.json"

    def begin(self, replica: int) -> None:
        """Make the files that others will look for.

        Raises:
            KitError: they cannot be written.
        """
        with _said(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            create_once(self._newest, _text(asdict(Term(number=0))))
            create_once(self._asked, _text({"number": 0}))
            create_once(self._vote(replica), _text({"number": 0}))
            try:
                _number(self._vote(replica))
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
        self.room(replica)
        with _said(self._folder):
            overwrite(self._vote(replica), _text({"number": number}))
        self.ask(number)

    def room(self, replica: int) -> None:
        """Check that a term could be taken.

        Raises:
            KitError: nothing can be written.
        """
        path = self._folder / f"room.{replica}"
        with _said(self._folder):
            create_once(path, _text({}))
            path.unlink()

    def ask(self, number: int) -> None:
        """Have whoever serves look at the votes; again and again, for others write there, too.

        Raises:
            KitError: it cannot be written.
        """
        if self.asked() < number:
            with _said(self._folder):
                overwrite(self._asked, _text({"number": number}))

    def asked(self) -> int:
        """The newest term that somebody has voted for, as far as that can be read."""
        with contextlib.suppress(KitError):
            return _number(self._asked)
        return 0

    def has_voted(self, number: int, replica: int) -> bool:
        """Whether a replica group has nothing to do with the terms before ``number``.

        Raises:
            KitError: that cannot be read.
        """
        return _number(self._vote(replica)) >= number

    def voters(self, number: int, replicas: Iterable[int]) -> frozenset[int]:
        """Those of which that is so.

        Raises:
            KitError: that cannot be read.
        """
        return frozenset(replica for replica in replicas if self.has_voted(number, replica))

    def keep(self, lighthouse: Mapping[str, Any]) -> None:
        """Keep how the login node's lighthouse was last published.

        Raises:
            KitError: it cannot be written.
        """
        if self.kept() != lighthouse:
            with _said(self._folder):
                overwrite(self._lighthouse, _text(lighthouse))

    def kept(self) -> Mapping[str, Any] | None:
        """What was kept; None: nothing that can be read."""
        with contextlib.suppress(KitError):
            return read_json(self._lighthouse)
        return None

    def present_for(self, replica: int) -> Term | None:
        """The present term; None for a replica group that has voted for the next one.

        Raises:
            KitError: it cannot be read.
        """
        newest = self.newest()
        return None if self.has_voted(newest.number + 1, replica) else newest

    def take(self, number: int, serving: str, by: str) -> bool:
        """Create a term; False when somebody was faster. Who does must hold the one before, or
        have the votes of all ``electors``.

        Raises:
            KitError: it cannot be written.
        """
        if self.newest().number >= number:
            return False
        term = _text(asdict(Term(number=number, serving=serving, by=by, t=time.time())))
        with _said(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if not create_once(self._taken(number), term):
                return False
            overwrite(self._newest, term)
        return True

    def _vote(self, replica: int) -> Path:
        return self._folder / f"vote.{replica}.json"

    def _taken(self, number: int) -> Path:
        return self._folder / f"{number}.taken"


def electors(commits: Mapping[int, Commit]) -> frozenset[int]:
    """Replica groups without whose votes no other lighthouse may serve.

    Two lighthouses at once could have two groups commit the same step with different
    gradients. One that is behind is no danger: it heals from the others when it meets them. So
    those count that have committed one of the newest two steps, or may have: shared files lag.

    Not covered: a group's old copy that goes on with the old lighthouse, both cut off from the
    shared files and from Slurm, while its new copy votes elsewhere. It is fenced when it is back.

    Args:
        commits: newest of each group that has neither left nor finished.
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


def _number(path: Path) -> int:
    raw = read_json(path)
    try:
        return 0 if raw is None else int(raw["number"])
    except (KeyError, TypeError, ValueError) as error:
        raise KitError(f"{path} is not a number: {error!r}") from error


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value) + "\n"


@contextlib.contextmanager
def _said(folder: Path) -> Any:
    try:
        yield
    except OSError as error:
        raise KitError(f"cannot write below {folder}: {error.strerror}") from error
