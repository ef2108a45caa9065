"""The supervisor's side of the terms (``launcher/terms.py``): whether its lighthouse serves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launcher.reach import split
from launcher.rundir import RunDir
from launcher.terms import Term, Terms

#: Seconds between two looks, and when the run has finished.
LOOK_EVERY, LOOK_SELDOM = 0.3, 5.0
#: Seconds for which a supervisor whose lighthouse does not come up still answers votes.
ABLE_SECONDS = 30.0


class Office:
    """Whether the lighthouse of this supervisor is the one that serves."""

    def __init__(
        self,
        run: Callable[[], RunDir | None],
        is_heard: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        """``run``: the one that claimed the lighthouse; ``is_heard``: whether replica groups reach
        that. One that nobody reaches answers no votes."""
        self._run, self._is_heard = run, is_heard
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
    def stand_in(self) -> tuple[str, int] | None:
        """Where that one is reached; None: nobody does."""
        serving = self._term.serving
        return split(f"http://{serving}") if serving else None

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
        if term.serving or terms.asked() <= term.number:
            return
        if time.monotonic() - self._able > ABLE_SECONDS or not self._is_heard():
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
                run, self._complaint = self._run(), ""
                wait = LOOK_EVERY if run is None or not run.finished.exists() else LOOK_SELDOM
            except Exception as error:  # without this thread nobody would answer
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    self._say(f"who serves is not known: {error}")
