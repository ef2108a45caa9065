"""One drill: a failure is made, and what must follow is waited for, each with its deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from launcher.drill_verdict import Before, Outcome, Story, judge
from launcher.drills import Follows, Kind, Target, describe
from launcher.inject import Injector
from launcher.interrupts import signals_ignored, stop_on_signals
from launcher.model import BlindError, CriticalError, GroupState, UsageError
from launcher.monitor import line
from launcher.state import Notice, RunState
from launcher.verdict import Check
from launcher.watcher import Watcher

#: Seconds between two looks at a run.
LOOK_EVERY = 0.2
#: Seconds for which a source may not be readable.
BLIND_SECONDS = 30.0
#: Seconds that a run gets to be whole before a drill.
WHOLE_SECONDS = 120.0


class Drill:
    """A failure that was made, until it has been recovered from or has not."""

    def __init__(
        self,
        kind: Kind,
        target: Target,
        watcher: Watcher,
        injector: Injector,
        patience: float = 1.0,
    ) -> None:
        self.kind, self.target = kind, target
        self._watcher, self._injector, self._patience = watcher, injector, patience
        self._restored = False
        self._problems: list[str] = []
        self._due: float | None = None
        self.story = Story(kind, target.replica, Before.of(watcher.state, time.time()))
        self.outcome: Outcome | None = None

    def begin(self) -> None:
        """Make the failure.

        Raises:
            KitError: that did not work; nothing stays changed.
        """
        self.story.before = Before.of(self._watcher.state, time.time())
        self._injector.inject(self.kind, self.target)
        if self.kind.follows is Follows.NOTHING:
            self._due = time.time() + self.target.seconds

    def poll(self, now: float, excused: Collection[int | None] = ()) -> bool:
        """Look at what has followed; True when it is over."""
        if self.outcome is not None:
            return True
        story, state = self.story, self._watcher.state
        story.look(state, now)
        after = self.kind.restore_after
        if self._due is None and after is not None and after in story.reached:
            self._due = now + self.kind.restore_delay
        if self._due is not None and now >= self._due:
            self.restore()
        finished = state.finished and not story.complete
        if story.complete or story.overdue(now, self._patience) or finished:
            self.restore()
            self.outcome = judge(
                story,
                state,
                self.target.node,
                now,
                patience=self._patience,
                excused=excused,
                problems=[*self._problems, *(["the run finished meanwhile"] if finished else [])],
            )
        return self.outcome is not None

    def give_up(self, problem: str) -> None:
        """It could not be made: that is its outcome."""
        before = self.story.before
        self._restored = True  # the injector has put back what there was
        self.outcome = Outcome(
            kind=self.kind.name,
            replica=self.target.replica,
            node=self.target.node,
            t=before.t,
            ended=time.time(),
            seconds={},
            steps_lost=0,
            cause="",
            checks=[Check(ok=False, text=f"could not be made: {problem}")],
        )

    def restore(self) -> None:
        """Put back what the failure has changed, once."""
        if self._restored:
            return
        self._restored = True
        self._problems += self._injector.restore(self.kind, self.target)
        self.story.restored_at = time.time()


def whole(state: RunState) -> str:
    """Why a run is not whole; empty when all its groups train together."""
    if state.finished:
        return "it has finished"
    away = [
        f"replica {group.replica} is {group.state.value}"
        for group in state.groups.values()
        if group.state is not GroupState.TRAINING or group.replica not in state.members
    ]
    if state.outage is not None:
        away.append("the lighthouse is not back")
    if state.stand_in is not None:
        away.append(f"replica {state.stand_in[0]} stands in for the lighthouse")
    away += [
        f"replica {replica} has not recovered"
        for replica in state.groups
        if not away and state.open_incident(replica) is not None
    ]
    return ", ".join(away[:4])


def await_whole(watcher: Watcher, tell: Callable[[Notice], None], seconds: float) -> None:
    """Wait until a run is whole.

    Raises:
        UsageError: it is not, after that time.
        BlindError: it cannot be seen.
    """
    deadline = time.monotonic() + seconds
    past = watcher.look()
    del past  # it happened before us
    while why := whole(watcher.state):
        if watcher.state.finished or time.monotonic() > deadline:
            sight = "; ".join(f"{name}: {said}" for name, said in watcher.blind.items())
            if sight:
                raise BlindError(sight)
            raise UsageError(f"the run is not whole, so nothing is broken on purpose: {why}")
        time.sleep(LOOK_EVERY)
        for notice in watcher.look():
            tell(notice)


class Sight:
    """Notices when a run cannot be seen for too long."""

    def __init__(self) -> None:
        self._since: float | None = None

    def check(self, watcher: Watcher) -> None:
        """Look again.

        Raises:
            BlindError: it has not been seen for too long.
        """
        if not watcher.blind:
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > BLIND_SECONDS:
            raise BlindError("; ".join(f"{name}: {why}" for name, why in watcher.blind.items()))


def run_drill(
    kind: Kind,
    aim: Callable[[], Target],
    watcher: Watcher,
    injector: Injector,
    say: Callable[[str], None],
    patience: float = 1.0,
) -> Outcome:
    """Do one drill from beginning to end; the run is left as it was, also when interrupted.

    Raises:
        CriticalError: what must follow did not.
        BlindError: the run cannot be seen.
    """

    def tell(notice: Notice) -> None:
        say(line(notice))

    await_whole(watcher, tell, WHOLE_SECONDS)
    target = aim()  # now: a group that was away has other processes, and perhaps another node
    say(f"drill {kind.name} on {aimed_at(kind, target)}")
    drill, sight = Drill(kind, target, watcher, injector, patience), Sight()
    watcher.on_event = drill.story.note
    watcher.eager = True
    try:
        with stop_on_signals():
            drill.begin()
            while not drill.poll(time.time()):
                time.sleep(LOOK_EVERY)
                for notice in watcher.look():
                    tell(notice)
                sight.check(watcher)
    finally:
        with signals_ignored():
            drill.restore()
    outcome = drill.outcome
    assert outcome is not None
    say("")
    for text in outcome.lines():
        say(text)
    if not outcome.passed:
        raise CriticalError(f"the drill {kind.name} failed: see the verdict")
    return outcome


def aimed_at(kind: Kind, target: Target) -> str:
    """What a drill hits, in words."""
    if kind.follows is Follows.OUTAGE:
        return f"the lighthouse {target.lighthouse}"
    return f"replica {target.replica} (task {target.name} on {target.node})"


def dry_run(kind: Kind, target: Target, shown: Callable[[Kind, Target], list[str]]) -> list[str]:
    """What a drill would do, in words and commands."""
    head = [f"drill {kind.name} on {aimed_at(kind, target)}", *(f"  {x}" for x in describe(kind))]
    return [*head, *shown(kind, target)]
