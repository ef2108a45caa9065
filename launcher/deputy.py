"""A replica group's part in having a lighthouse: its launcher follows it, and stands in for it.

::

    the lighthouse is silent for AWAY_SECONDS ─► vote for the next term, and leave this one
    all electors have voted ───────────────────► after GRACE_SECONDS the first of them starts a
                                                 lighthouse on its node; all relays go there
    that of the login node is back ────────────► its lighthouse ends, and the login node gets
                                                 the next term

While the supervisor on the login node lives, it answers a vote with a term of its own: a group
that has lost its way to it deposes nobody. What must never happen is in ``launcher/terms.py``.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from launcher import lease, records
from launcher.capped_log import CappedLog
from launcher.environment import Task
from launcher.lighthouse import Address, LighthouseDir, answers, split
from launcher.lighthouse_child import MARGIN, LighthouseChild, LighthouseSettings, listen_address
from launcher.model import KitError
from launcher.payload import complain, say
from launcher.plan import Plan
from launcher.relay import Relay
from launcher.terms import Terms, electors

#: Seconds between two looks.
LOOK_EVERY = 0.2
#: Seconds of silence after which a group votes; a supervisor has a dead one back in one. After
#: each vote that helped nothing, twice as long, up to the second figure.
AWAY_SECONDS, MOST_AWAY_SECONDS = 2.0, 60.0
#: Seconds that the supervisor has to answer the votes of all, and between two that would stand in.
GRACE_SECONDS, TURN_SECONDS = 0.5, 6.0
#: How many groups prepare to stand in: the others would read as many files for nothing.
CANDIDATES = 3
#: Seconds between two readings of all groups' newest steps.
COUNT_EVERY = 3.0
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
        self._done = threading.Event()
        self._address: Address | None = None
        """As it was last published; what it decides by, ours would."""
        self._begun: int | None = None
        self._voted = 0
        self._patience, self._voted_at = AWAY_SECONDS, 0.0
        self._agreed = (0, 0.0)
        """Term that all have voted for, and since when that is known, monotonic seconds."""
        self._counted: tuple[float, frozenset[int]] = (0.0, frozenset())
        self._child: LighthouseChild | None = None
        self._log: CappedLog | None = None
        self._term = 0
        self._noted = False
        """Whether the run's story says that this one stands in."""
        self._complaint = ""

    def place(self) -> tuple[str, int] | None:
        """Where the lighthouse is; nowhere for a copy of a group that has been replaced, or cannot
        see whether it has, or has voted for a term that nobody has taken yet."""
        mine = self._held()
        if mine is not None and not lease.held(self._plan.run.lease(mine.replica), mine):
            return None
        with contextlib.suppress(KitError):
            term = self._terms.newest() if mine is None else self._terms.present_for(mine.replica)
            if term is not None and term.serving:
                return split(f"http://{term.serving}")
            if term is not None:
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
                except (KitError, OSError) as error:
                    if str(error) != self._complaint:
                        self._complaint = str(error)
                        complain(f"the lighthouse is not looked after: {error}")
        finally:
            self._end()

    # -- while another one serves ------------------------------------------------------

    def _look(self, relay: Relay, mine: lease.Lease) -> None:
        if self._begun != mine.replica:
            self._terms.begin(mine.replica)
            self._address = self._folder.address() or self._address
            self._begun = mine.replica
        away = relay.away()
        if away == 0 and self._voted == 0:
            self._patience, self._voted_at = AWAY_SECONDS, 0.0
        if self._address is None or (away < AWAY_SECONDS and self._voted == 0):
            return
        if not lease.held(self._plan.run.lease(mine.replica), mine):
            return
        number = self._terms.newest().number + 1
        if self._voted and self._voted < number:
            self._voted = 0  # there is another one: it has its time
        elif self._voted:
            self._count(number, mine.replica)
        elif time.monotonic() - self._voted_at > self._patience:
            self._vote(relay, number, mine.replica, away)

    def _vote(self, relay: Relay, number: int, replica: int, away: float) -> None:
        self._address = self._folder.address() or self._address
        self._terms.vote(number, replica)
        if self._voted_at:
            self._patience = min(2 * self._patience, MOST_AWAY_SECONDS)
        self._voted, self._voted_at, self._counted = number, time.monotonic(), (0.0, frozenset())
        relay.drop()
        complain(f"no word of the lighthouse for {away:.0f} s: replica {replica} asks for another")

    def _count(self, number: int, replica: int) -> None:
        """Stand in, once all have voted and the others had their time."""
        everybody = range(self._plan.manifest.group_size)
        voters = self._terms.voters(number, everybody)
        if replica not in sorted(voters)[:CANDIDATES]:
            return
        now, (counted, needed) = time.monotonic(), self._counted
        if now - counted > COUNT_EVERY:
            newest = {each: records.newest_step(self._plan.run.events(each)) for each in everybody}
            needed = electors({each: step for each, step in newest.items() if step is not None})
            self._counted = now, needed
        if not needed or not needed <= voters:
            self._agreed = (0, 0.0)
        elif self._agreed[0] != number:
            self._agreed = number, now
        elif now - self._agreed[1] > GRACE_SECONDS + TURN_SECONDS * sorted(voters).index(replica):
            self._agreed = (0, 0.0)
            self._stand_in(number, replica)

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
        self._log = CappedLog(lambda: plan.run.lighthouse_log)
        self._child = child = LighthouseChild(settings, self._log, plan.env, 0)
        self._term, by = number, f"replica {replica} on {host}"
        past = self._folder.newest_quorum_id() + MARGIN
        if not (child.come_up(self._done) and child.raise_past(past, self._done)):
            self._end()
            raise KitError("a lighthouse of our own did not come up")
        with contextlib.suppress(OSError):
            self._folder.remember_quorum_id(past)
        if self._terms.take(number, settings.serving(child.port), by):
            self._note(serves=True)
            say(f"{by} stands in for the lighthouse of {known.url}, past quorum {past}")
        else:
            self._end()

    def _serve(self, child: LighthouseChild) -> None:
        known = self._folder.newest_quorum_id()
        if child.quorum_id > known:
            with contextlib.suppress(OSError):
                self._folder.remember_quorum_id(child.quorum_id)
        if child.wait(0.0) is not None or self._terms.newest().number != self._term:
            self._end()
            return
        back = self._folder.address()
        if back is None or back == self._address or back.past <= child.quorum_id:
            return
        if answers(f"http://{back.serving}", AWAY_SECONDS) is None:
            self._address = back
            self._end()
            self._terms.take(self._term + 1, "", "the one that stood in")
            say(f"the lighthouse {back.url} is back: this one has ended")

    def _note(self, *, serves: bool) -> None:
        mine = self._held()
        if mine is not None:
            task = Task(replica=mine.replica, attempt=mine.number, node=mine.host)
            records.note(self._plan.run, task, "stand_in", serves=serves)
        self._noted = serves

    def _end(self) -> None:
        child, log, self._child, self._log = self._child, self._log, None, None
        if child is not None:
            child.end()
        if self._noted:
            self._note(serves=False)
        if log is not None:
            log.close()
