"""The supervisor's side of the terms: it answers votes while it can serve, and knows when a replica
group stands in for its lighthouse."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher.lighthouse import split
from launcher.model import KitError
from launcher.rundir import RunDir
from launcher.terms import Term, Terms

#: Seconds between two looks; longer by this for every replica group whose vote is read.
LOOK_EVERY, LOOK_EACH = 0.2, 0.002
#: Seconds for which a supervisor whose lighthouse does not come up still answers votes.
ABLE_SECONDS = 30.0


class Office:
    """Whether the lighthouse of this supervisor is the one that serves."""

    def __init__(self, run: Callable[[], RunDir | None], say: Callable[[str], None]) -> None:
        """``run``: the one that claimed the lighthouse."""
        self._run = run
        self._say = say
        self._done = threading.Event()
        self._term = Term(number=0)
        self._able = time.monotonic()
        self._complaint = ""
        self._groups: tuple[str, int] = ("", 0)
        """Size of the run of that name."""

    @property
    def deposed(self) -> bool:
        """Whether a replica group stands in."""
        return bool(self._term.serving)

    @property
    def stand_in(self) -> tuple[str, int]:
        """Where that one is reached."""
        return split(f"http://{self._term.serving}")

    def serves(self) -> None:
        """The lighthouse is up, just now."""
        self._able = time.monotonic()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Look after it, in a thread: a lighthouse takes its time to come up."""
        thread = threading.Thread(target=self._hold, name="office", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join(LOOK_EVERY)

    def look(self) -> None:
        """See who serves, and answer votes against ourselves.

        Raises:
            KitError: the files cannot be read or written.
        """
        run = self._run()
        if run is None:
            self._term = Term(number=0)
            return
        terms, before = Terms(run.terms), self._term
        term = self._term = terms.newest()
        if term.serving and term != before:
            self._say(f"{term.by} stands in for this lighthouse (term {term.number})")
        elif before.serving and not term.serving:
            self._say(f"this lighthouse serves again (term {term.number})")
        if term.serving or time.monotonic() - self._able > ABLE_SECONDS:
            return
        if self._groups[0] != run.name:
            self._groups = run.name, run.manifest().group_size
        voters = terms.voters(term.number + 1, range(self._groups[1]))
        if voters and terms.take(term.number + 1, "", "the supervisor"):
            groups = ", ".join(map(str, sorted(voters)))
            self._say(f"no word of this lighthouse reaches replica {groups}: it is up")

    def _hold(self) -> None:
        wait = LOOK_EVERY
        while not self._done.wait(wait):
            try:
                self.look()
                wait, self._complaint = LOOK_EVERY + LOOK_EACH * self._groups[1], ""
            except (KitError, OSError) as error:
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    self._say(f"who serves is not known: {error}")
