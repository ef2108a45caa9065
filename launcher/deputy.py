"""A replica group's part in having a lighthouse: its launcher follows it, and stands in for it.

::

    the lighthouse is silent for AWAY_SECONDS ─► vote for the next term, and leave this one
    all electors have voted ───────────────────► after GRACE_SECONDS the first of them starts a
                                                 lighthouse on its node; all relays go there
    that of the login node is back ────────────► its lighthouse ends, and the login node gets
                                                 the next term

Whoever serves answers votes with the next term, as long as others reach it: a group that has lost
its way to it deposes nobody. What must never happen is in ``launcher/terms.py``.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

from launcher import lease, records
from launcher.capped_log import CappedLog
from launcher.environment import Task
from launcher.lighthouse import Address, LighthouseDir
from launcher.lighthouse_child import MARGIN, LighthouseChild, LighthouseSettings, listen_address
from launcher.model import KitError
from launcher.payload import complain, say
from launcher.plan import Plan
from launcher.reach import answers, split
from launcher.relay import Relay
from launcher.terms import Term, Terms, electors

#: Seconds between two looks, and between two at whether another one serves now.
LOOK_EVERY, FOLLOW_EVERY = 0.2, 2.0
#: Seconds of silence after which a group votes; a supervisor has a dead one back in one. After
#: each vote that helped nothing, twice as long, up to the second figure.
AWAY_SECONDS, MOST_AWAY_SECONDS = 2.0, 60.0
#: Seconds that the supervisor has to answer the votes of all, and between two that would stand in.
GRACE_SECONDS, TURN_SECONDS = 0.8, 6.0
#: How many groups prepare to stand in at first, and one more each turn: they read files of all.
CANDIDATES = 2
#: Seconds between two readings of all groups' newest steps.
COUNT_EVERY = 3.0
#: Seconds within which all others vote twice against one that stands in, which they cannot reach.
UNREACHED_SECONDS = 30.0
#: Seconds for the thread beside the relay to end.
END_SECONDS = 10.0


class Deputy:
    """Says where a group's relay finds the lighthouse, and is one when there is none."""

    def __init__(self, plan: Plan, held: Callable[[], lease.Lease | None]) -> None:
        """``held``: the lease of the group that is run now; None of a spare."""
        self._plan = plan
        self._held = held
        self._terms = Terms(plan.run.terms)
        self._folder = LighthouseDir.of_run(plan.run, plan.manifest)
        self._everybody = range(plan.manifest.group_size)
        self._done = threading.Event()
        self._address: Address | None = None
        """As it was last published; what it decides by, ours would."""
        self._replica: int | None = None
        self._leaving = False
        """Whether a vote is being written."""
        self._followed: str | None = None
        """Who served when connections were made."""
        self._compared = 0.0
        self._voted = 0
        self._patience, self._voted_at = AWAY_SECONDS, 0.0
        self._agreed = (0, 0.0)
        """Term that all have voted for, and since when that is known, monotonic seconds."""
        self._counted = 0.0
        self._needed: frozenset[int] = frozenset()
        """Groups without whose votes nobody may stand in, when they were last counted."""
        self._child: LighthouseChild | None = None
        self._log: CappedLog | None = None
        self._term = 0
        self._against: tuple[frozenset[int], float] = (frozenset(), 0.0)
        """Who has voted against this one last, and when."""
        self._gave_up = -UNREACHED_SECONDS
        self._noted = False
        """Whether the run's story says that this one stands in."""
        self._complaint = ""

    def place(self) -> tuple[str, int] | None:
        """Where the lighthouse is; nowhere for a copy of a group that has been replaced, or cannot
        see whether it has, or has voted for a term that nobody has taken yet."""
        mine = self._held()
        if self._leaving:
            return None
        if mine is not None and not lease.held(self._plan.run.lease(mine.replica), mine):
            return None
        with contextlib.suppress(KitError):
            term = self._terms.newest() if mine is None else self._terms.present_for(mine.replica)
            if term is not None:
                self._followed = term.serving
                if term.serving:
                    return split(f"http://{term.serving}")
                return self._folder.whereabouts(self._plan.manifest.lighthouse)
        return None

    @contextlib.contextmanager
    def beside(self, relay: Relay) -> Iterator[None]:
        """Look after the lighthouse, in a thread: shared files may hang."""
        if not (self._plan.site.relay and self._plan.site.stand_in):
            yield
            return
        thread = threading.Thread(target=self._run, args=(relay,), name="deputy", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join(END_SECONDS)

    def _run(self, relay: Relay) -> None:
        try:
            while not self._done.wait(LOOK_EVERY):
                try:
                    if self._child is not None:
                        self._serve(self._child)
                    elif (mine := self._held()) is not None:
                        self._look(relay, mine)
                    self._follow(relay)
                except Exception as error:  # without this thread the group would never vote
                    if str(error) != self._complaint:
                        self._complaint = str(error)
                        complain(f"the lighthouse is not looked after: {error}")
        finally:
            self._end()

    # -- while another one serves ------------------------------------------------------

    def _follow(self, relay: Relay) -> None:
        """Leave a lighthouse that serves no more: one that lives may go on deciding."""
        now = time.monotonic()
        if self._followed is not None and now - self._compared > FOLLOW_EVERY:
            self._compared = now
            if self._terms.newest().serving != self._followed:
                self._followed = None
                relay.drop()

    def _look(self, relay: Relay, mine: lease.Lease) -> None:
        if self._replica != mine.replica:
            self._terms.begin(mine.replica)
            self._replica, self._voted = mine.replica, 0
            self._know()
        away = relay.away()
        if away == 0 and self._voted == 0:
            self._patience, self._voted_at = AWAY_SECONDS, 0.0
        if away < AWAY_SECONDS and self._voted == 0:
            return
        if not lease.held(self._plan.run.lease(mine.replica), mine):
            return
        number = self._terms.newest().number + 1
        if self._voted and self._voted < number:
            self._voted, self._voted_at = 0, time.monotonic()  # there is another: it has its time
        elif self._voted:
            self._count(number, mine.replica)
        elif time.monotonic() - self._voted_at > self._patience:
            self._vote(relay, number, mine.replica, away)

    def _know(self) -> None:
        """Learn how the login node's lighthouse is published, now or before."""
        address = self._folder.address()
        if address is not None:
            self._terms.keep(asdict(address))
            self._address = address
        elif self._address is None and (kept := self._terms.kept()) is not None:
            self._address = Address.of(kept)

    def _vote(self, relay: Relay, number: int, replica: int, away: float) -> None:
        self._know()
        if self._address is None or not self._address.answers_votes:
            return  # one of another making: nobody would answer
        self._leaving = True
        try:
            relay.drop()  # before others can see the vote
            self._terms.vote(number, replica)
        finally:
            self._leaving = False
        if self._voted_at:
            self._patience = min(2 * self._patience, MOST_AWAY_SECONDS)
        self._voted, self._voted_at, self._counted = number, time.monotonic(), 0.0
        complain(f"no word of the lighthouse for {away:.0f} s: replica {replica} asks for another")

    def _count(self, number: int, replica: int) -> None:
        """Stand in, once all have voted and the others had their time."""
        self._terms.ask(number)
        ahead, now = self._ahead(number, replica), time.monotonic()
        if ahead is None:
            return
        if now - self._counted > COUNT_EVERY:
            self._needed, _ = self._electors()
            self._counted = now
        if not self._agree(number):
            self._agreed = (0, 0.0)
        elif self._agreed[0] != number:
            self._agreed = number, now
        elif now - self._agreed[1] > GRACE_SECONDS + TURN_SECONDS * ahead:
            self._agreed = (0, 0.0)
            self._stand_in(number, replica)

    def _ahead(self, number: int, replica: int) -> int | None:
        """How many voters would stand in before this one; None: too many. Another one is the first
        in each term."""
        size, ahead = len(self._everybody), 0
        unreached = time.monotonic() - self._gave_up < UNREACHED_SECONDS
        most = CANDIDATES + int((time.monotonic() - self._voted_at) / TURN_SECONDS)
        for each in ((number - 1 + place) % size for place in range(size)):
            if each == replica:
                return ahead + 2 * unreached
            ahead += self._terms.has_voted(number, each)
            if ahead >= most:
                return None
        return None

    def _electors(self) -> tuple[frozenset[int], int]:
        """Who must have voted, and the newest quorum id that groups know of."""
        run = self._plan.run
        newest = {each: records.newest_step(run.events(each)) for each in self._everybody}
        commits = {each: commit for each, commit in newest.items() if commit is not None}
        quorum_id = max((commit.quorum_id for commit in commits.values()), default=0)
        # Before anybody has committed a step, everybody who has begun.
        begun = frozenset(each for each in self._everybody if run.events(each).exists())
        return electors(commits) or begun, quorum_id

    def _agree(self, number: int) -> bool:
        return all(self._terms.has_voted(number, each) for each in self._needed)

    # -- while this one does -----------------------------------------------------------

    def _stand_in(self, number: int, replica: int) -> None:
        plan, known = self._plan, self._address
        assert known is not None
        host = plan.site.node_address
        settings = LighthouseSettings(
            host=host,
            bind=listen_address(host),
            port=known.port,
            min_replicas=known.min_replicas,
            heartbeat_timeout_ms=known.heartbeat_timeout_ms,
            join_timeout_ms=known.join_timeout_ms,
            quorum_tick_ms=known.quorum_tick_ms,
        )
        self._needed, quorum_id = self._electors()
        past = max(self._folder.newest_quorum_id(), quorum_id) + MARGIN
        self._log = CappedLog(lambda: plan.run.lighthouse_log)
        self._child = child = LighthouseChild(settings, self._log, plan.env, 0)
        self._term, by = number, f"replica {replica} on {host}"
        if not (child.come_up(self._done) and child.raise_past(past, self._done)):
            self._end()
            raise KitError(
                f"a lighthouse of our own did not come up; its log: {plan.run.lighthouse_log}"
            )
        self._needed, _ = self._electors()  # that may have taken its time
        serving = settings.serving(child.port)
        if not (self._agree(number) and self._terms.take(number, serving, by)):
            self._end()
            return
        self._against = (frozenset(), 0.0)
        with contextlib.suppress(OSError):
            self._folder.remember_quorum_id(past)
        self._note(serves=True)
        say(f"{by} stands in for the lighthouse of {known.url}, past quorum {past}")

    def _serve(self, child: LighthouseChild) -> None:
        known = self._folder.newest_quorum_id()
        if child.quorum_id > known:
            with contextlib.suppress(OSError):
                self._folder.remember_quorum_id(child.quorum_id)
        term = self._terms.newest()
        if child.wait(0.0) is not None or term.number != self._term:
            self._end()
            return
        if self._terms.asked() > self._term and not self._answer(term):
            self._end()
            return
        back = self._folder.address()
        if back is None or back == self._address or back.past <= child.quorum_id:
            return
        if answers(f"http://{back.serving}", AWAY_SECONDS) is None:
            self._terms.room(self._replica or 0)  # or nobody would have one
            self._address = back
            self._end()
            self._terms.take(self._term + 1, "", "the one that stood in")
            say(f"the lighthouse {back.url} is back: this one has ended")

    def _answer(self, term: Term) -> bool:
        """Answer votes against this one by the next term; False when all others have cast theirs
        a second time: it cannot be reached."""
        others = [each for each in self._everybody if each != self._replica]
        against, now = self._terms.voters(self._term + 1, others), time.monotonic()
        if not against:
            return True
        before, t = self._against
        self._against = against, now
        rest = self._needed - {self._replica}
        if rest and rest <= before & against and now - t < UNREACHED_SECONDS:
            complain("the others do not reach the lighthouse that stands in here: it ends")
            self._gave_up = now
            return False
        if self._terms.take(self._term + 1, term.serving, term.by):
            self._term += 1
        return True

    def _note(self, *, serves: bool) -> None:
        mine = self._held()
        if mine is not None:
            task = Task(replica=mine.replica, attempt=mine.number, node=mine.host)
            records.note(self._plan.run, task, "stand_in", serves=serves)
        self._noted = serves

    def _end(self) -> None:
        child, log, self._child, self._log = self._child, self._log, None, None
        try:
            if child is not None:
                child.end()
        finally:
            if self._noted:
                self._note(serves=False)
            if log is not None:
                log.close()
