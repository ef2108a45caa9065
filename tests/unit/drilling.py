"""A run, and what a drill is aimed at, for the tests of drills."""

from __future__ import annotations

from typing import Any

from launcher.drill_verdict import Before, Outcome, Story, judge
from launcher.drills import KINDS, Target
from launcher.events import Event
from launcher.state import RunState
from tests.unit.test_guardian import training

TARGET = Target(
    run="/o/torchft/tft-60",
    array=60,
    task=1,
    node="worker-1",
    replica=1,
    pids=(500, 501),
    member="torchtitan_ft_1:abc",
    lighthouse="http://login:29510",
    supervisor=(77, 1000.0),
    sandbox="/run/box",
    partition="urgent",
    time_limit="UNLIMITED",
)


class Run:
    """A run that a failure happens to, told event by event."""

    def __init__(self, kind: str = "kill-rank", t: float = 200.0, size: int = 2) -> None:
        self.state, self.t = training(size), t
        self.story = Story(KINDS[kind], 1, Before.of(self.state, t))

    def say(self, after: float, kind: str, replica: int | None, **fields: Any) -> None:
        event = Event(t=self.t + after, kind=kind, replica=replica, fields=fields)
        self.state.apply(event)
        self.story.note(self.state, event)

    def quorum(self, after: float, *members: tuple[int, str, int]) -> None:
        entries = [(replica, uuid, step, "") for replica, uuid, step in members]
        number = self.state.quorum_id + 1
        self.say(after, "membership", None, quorum_id=number, members=entries)

    def lose(self, *, heal: bool = True, reason: str = "rank 0 was killed by SIGKILL") -> None:
        """Replica 1 is lost: noticed after 2 s, started again after 4, back after 8."""
        step = self.state.step
        self.say(0.5, "exit", 1, code=1, reason=reason)
        others = [replica for replica in self.state.groups if replica != 1]
        self.quorum(2, *[(replica, f"u{replica}", step) for replica in others])
        for other in others:
            self.say(2.5, "commit", other, rank=0, step=step, committed=False)
            self.say(3, "commit", other, rank=0, step=step, committed=True)
        self.say(4, "launch", 1, attempt=2, host="w1")
        if heal:
            back = [(replica, f"u{replica}", step + 1) for replica in others]
            self.quorum(6, *back, (1, "n1", 0))
            self.say(7, "heal", 1, rank=0, step=step + 1, source=0)
            for replica in self.state.groups:
                self.say(8, "commit", replica, rank=0, step=step + 1, committed=True)

    def weights(self, after: float, other: str = "a") -> None:
        for replica, digest in ((0, "a"), (1, other)):
            self.say(after, "weights", replica, rank=0, step=self.state.step, hash=digest)

    def judged(self, after: float, **options: Any) -> Outcome:
        self.story.look(self.state, self.t + after)
        return judge(self.story, self.state, "w1", self.t + after, **options)


def failed(outcome: Outcome) -> list[str]:
    return [check.text for check in outcome.checks if not check.ok]


class Watched:
    """Stands in for a watcher."""

    def __init__(self, state: RunState) -> None:
        self.state = state
