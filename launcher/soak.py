"""Failure after failure, by a schedule that a seed reproduces, and what they cost. (`drill loop`.)"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from launcher import growth
from launcher.drill import LOOK_EVERY, Drill, Sight, aimed_at, await_whole, whole
from launcher.drill_verdict import Outcome
from launcher.drills import KINDS, Kind, Target
from launcher.events import Event
from launcher.inject import Injector
from launcher.interrupts import signals_ignored, stop_on_signals
from launcher.model import KitError, UsageError
from launcher.monitor import line
from launcher.soak_report import Cost, Planned, Soak, unexplained
from launcher.state import Notice, RunState
from launcher.watcher import Watcher

#: Seconds that a run gets to be whole before the next failure is given up on.
WHOLE_SECONDS = 900.0
#: Seconds after a recovery in which what it has led to is still explained by it.
SETTLE_SECONDS = 8.0


def schedule(
    kinds: Sequence[str], *, count: int, mtbf: float, seed: int, size: int
) -> list[Planned]:
    """Exponential waits; every kind as often as the others, in an order of the seed's.

    Raises:
        UsageError: a kind is unknown, or nothing is to be done.
    """
    unknown = [name for name in kinds if name not in KINDS]
    if unknown or not kinds:
        raise UsageError(f"no such kind of drill: {', '.join(unknown) or '(none)'}; see --help")
    if mtbf <= 0 or count < 1:
        raise UsageError("--mtbf and --count must be more than zero")
    chance, deck, planned = random.Random(seed), list[str](), list[Planned]()  # noqa: S311
    for _ in range(count):
        if not deck:
            deck = list(kinds)
            chance.shuffle(deck)
        wait = chance.expovariate(1 / mtbf)
        planned.append(Planned(wait=wait, kind=deck.pop(), replica=chance.randrange(size)))
    return planned


@dataclass(slots=True)
class Active:
    """Drills that are not over."""

    drills: list[Drill] = field(default_factory=list)

    def note(self, state: RunState, event: Event) -> None:
        for drill in self.drills:
            drill.story.note(state, event)

    def hit(self, but: Drill | None = None) -> set[int | None]:
        """Groups that are taken out, and None for the lighthouse."""
        return {whom for drill in self.drills if drill is not but for whom in drill.story.hit}


Aim = Callable[[Kind, int], Target]


def run_soak(
    planned: Sequence[Planned],
    watcher: Watcher,
    injector: Injector,
    aim: Aim,
    say: Callable[[str], None],
    *,
    seed: int,
    mtbf: float,
    max_down: int,
    patience: float,
    supervisor: int,
    launches: Callable[[], list[Event]],
) -> Soak:
    """Make the planned failures, each at its time or as soon as the run can take it.

    Raises:
        BlindError: the run cannot be seen.
        UsageError: it is not whole at the beginning, or finishes too early.
    """

    def tell(notice: Notice) -> None:
        say(line(notice))

    await_whole(watcher, tell, WHOLE_SECONDS)
    watcher.eager = True
    started, state = time.time(), watcher.state
    before, cost = growth.measure(supervisor), Cost.of(state, started)
    active, done, sight = Active(), list[Outcome](), Sight()
    watcher.on_event = active.note
    queue, due = list(planned), started + (planned[0].wait if planned else 0.0)
    waiting_since: float | None = None
    try:
        with stop_on_signals():
            while queue or active.drills:
                now = time.time()
                for drill in list(active.drills):
                    if drill.poll(now, active.hit(but=drill)) and drill.outcome is not None:
                        active.drills.remove(drill)
                        done.append(drill.outcome)
                        _tell_outcome(drill.outcome, len(done), len(planned), say)
                if state.finished:
                    raise UsageError("the run finished before the last failure: train for longer")
                if queue and now >= due:
                    if room(state, active, max_down):
                        one, waiting_since = queue.pop(0), None
                        due = now + (queue[0].wait if queue else 0.0)
                        begin(one, watcher, injector, aim, active, patience, say)
                    else:
                        waiting_since = waiting_since or now
                        if now - waiting_since > WHOLE_SECONDS:
                            raise UsageError(f"the run does not come back: {whole(state)}")
                time.sleep(LOOK_EVERY)
                for notice in watcher.look():
                    tell(notice)
                sight.check(watcher)
            _rest(watcher, tell)
    finally:
        with signals_ignored():
            for drill in active.drills:
                drill.restore()
    ended = time.time()
    return Soak(
        seed=seed,
        mtbf=mtbf,
        planned=planned,
        outcomes=done,
        cost=Cost.of(state, ended).since(cost),
        false_alarms=unexplained(done, [*state.incidents], launches(), started, SETTLE_SECONDS),
        compared=state.weights.compared,
        differences=state.weights.differences,
        before=before,
        after=growth.measure(supervisor),
    )


def room(state: RunState, active: Active, max_down: int) -> bool:
    """Whether one more failure may be made."""
    if len(active.drills) >= max_down:
        return False
    down = [r for r in state.groups if r not in state.members or state.open_incident(r)]
    if state.outage is not None or state.stand_in is not None or None in active.hit():
        return False  # with the lighthouse away, nobody can come back
    # One must be there to heal from, whatever happens to it.
    return not whole(state) if max_down == 1 else len(down) < min(max_down, state.size - 1)


def begin(
    one: Planned,
    watcher: Watcher,
    injector: Injector,
    aim: Aim,
    active: Active,
    patience: float,
    say: Callable[[str], None],
) -> None:
    kind = KINDS[one.kind]
    replica, state = one.replica, watcher.state
    busy = {drill.target.replica for drill in active.drills}
    while replica in busy or replica not in state.members:
        replica = (replica + 1) % state.size
    target = aim(kind, replica)
    say(f"== {kind.name} on {aimed_at(kind, target)}")
    drill = Drill(kind, target, watcher, injector, patience)
    active.drills.append(drill)
    try:
        drill.begin()
    except KitError as error:
        drill.give_up(str(error))  # the others are made all the same


def _tell_outcome(outcome: Outcome, number: int, of: int, say: Callable[[str], None]) -> None:
    back = max(outcome.seconds.values(), default=0.0)
    word = "passed" if outcome.passed else "FAILED"
    say(f"== {number} of {of}: {outcome.kind} {word}, {back:.1f} s")
    for check in outcome.checks:
        if not check.ok:
            say(f"   FAILED  {check.text}")


def _rest(watcher: Watcher, tell: Callable[[Notice], None]) -> None:
    """A moment after the last recovery: an alarm that it causes would come now."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(LOOK_EVERY)
        for notice in watcher.look():
            tell(notice)
