"""What to do when a replica group's training has ended badly. Pure: past endings in, a decision out.

First it is started again where it is, at once while it makes progress, and with growing pauses
when it does not; when that happens too often on one node, or the node is to blame, elsewhere through
Slurm; and not at all when the same error comes twice before the first step (a mistake in the
configuration does not mend itself), or after many moves without one committed step. Budgets are
per window of time, and refill as it moves on.
"""

from __future__ import annotations

import enum
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

#: Seconds before a restart in place, by the number of attempts in a row without a committed step.
PAUSES = (0.0, 2.0, 10.0, 30.0)
#: What an ending's reason begins with when the node itself is unfit.
UNFIT = "unfit node: "
#: What the reason ends with when a node of several fell silent.
SILENT = "does not answer any more"
#: Windows of the two budgets, seconds.
HERE_WINDOW, ELSEWHERE_WINDOW = 600.0, 3600.0


#: Why a group that comes near its time limit ends: a requeue gives it another one.
TIME_IS_UP = "its time limit is near"


class Next(enum.Enum):
    """Where a replica group goes on."""

    HERE = "restarted in place"
    ELSEWHERE = "requeued"
    NEVER = "given up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """One attempt that ended badly."""

    t: float
    """Unix seconds."""
    host: str
    reason: str
    trained: bool
    """Whether it had committed a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Budgets; 0 switches a kind of restart off."""

    here: int = 3
    """Restarts in place on one node within ``HERE_WINDOW``."""
    elsewhere: int = 10
    """Requeues within ``ELSEWHERE_WINDOW`` without a committed step in between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to do next, after ``pause`` seconds, and why."""

    next: Next
    pause: float = 0.0
    why: str = ""


#: Errors that come from elsewhere or may pass: never taken for a mistake in the configuration.
_PASSING = re.compile(
    r"time[d ]?-?out|connection|connect|unreachable|unavailable|broken pipe|reset by peer|EOF|"
    r"quorum|lighthouse|nccl|gloo|killed by|stale file|input/output error|no space left|"
    r"out of memory|allocate memory|hung|stopped|cannot be (?:read|written)|read-only|"
    r"\bsrun\b|its part\b",  # said by the leader of a group of several nodes
    re.IGNORECASE,
)
#: Errors of the node's hardware or driver: once may be chance, twice is the node.
_DEVICE = re.compile(
    r"CUDA error|CUDA driver|uncorrectable|ECC|Xid|NVML|no CUDA device|fallen off the bus",
    re.IGNORECASE,
)


def decide(endings: Sequence[Ending], limits: Limits, now: float) -> Decision:
    """What to do after the last of ``endings`` (oldest first, at least one)."""
    last = endings[-1]
    if last.reason.startswith(UNFIT) and _requeues(endings, limits, now) < limits.elsewhere:
        # At once the first time; a mistake of the check itself must not become a storm.
        again = len(_without_progress(endings)) - 1
        pause = PAUSES[min(again, len(PAUSES) - 1)]
        return Decision(next=Next.ELSEWHERE, pause=pause, why=f"{last.host} is unfit")
    if len(endings) > 1 and _is_mistake(endings[-2], last):
        return Decision(
            next=Next.NEVER,
            why="the same error twice before the first step: it would come again; mend the "
            "configuration and submit anew",
        )
    here = [e for e in endings if e.host == last.host and now - e.t < HERE_WINDOW]
    node = bool(_DEVICE.search(last.reason))
    budget = min(1, limits.here) if node else limits.here
    if len(here) <= budget:
        pause = PAUSES[min(len(_without_progress(here)), len(PAUSES) - 1)]
        return Decision(
            next=Next.HERE,
            pause=pause,
            why=f"failure {len(here)} of at most {budget} in {HERE_WINDOW / 60:.0f} min on {last.host}",
        )
    elsewhere = _requeues(endings, limits, now)
    if elsewhere < limits.elsewhere:
        why = "its device failed twice" if node and limits.here else f"too often on {last.host}"
        return Decision(next=Next.ELSEWHERE, why=why if limits.here else "not restarted in place")
    return Decision(
        next=Next.NEVER,
        why=f"{elsewhere} requeues in {ELSEWHERE_WINDOW / 60:.0f} min without one committed step: the "
        "budget is spent (TFT_RESTARTS, TFT_REQUEUES)",
    )


def _requeues(endings: Sequence[Ending], limits: Limits, now: float) -> int:
    """How often it was sent elsewhere in the window since it last made progress: changes of
    node, and at least once for every spent budget of restarts in place."""
    recent = _without_progress([e for e in endings if now - e.t < ELSEWHERE_WINDOW])
    if recent and recent[-1].reason.startswith(UNFIT):
        return len(recent) - 1  # each of these was one
    moved = sum(a.host != b.host for a, b in itertools.pairwise(recent))
    spent = (len(recent) - 1) // (limits.here + 1)
    return max(moved, spent)


def _without_progress(endings: Sequence[Ending]) -> list[Ending]:
    """The newest endings in a row without a committed step."""
    return list(itertools.takewhile(lambda e: not e.trained, reversed(endings)))[::-1]


def _is_mistake(one: Ending, other: Ending) -> bool:
    return (
        not one.trained
        and not other.trained
        and not _PASSING.search(other.reason)
        and not _DEVICE.search(other.reason)
        and _shape(one.reason) == _shape(other.reason)
    )


def _shape(reason: str) -> str:
    """A reason without what differs from start to start (process ids, addresses, ranks)."""
    return re.sub(r"0x[0-9a-f]+|\d+", "#", reason)
