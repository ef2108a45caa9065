"""What a training has got done in a window of time, and where the rest of it went. Pure."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: A manager's step that is so much lower than the newest: the training began again from there.
STEPS_BACK = 3
#: Two-sided 95 % quantiles of Student's distribution, by degrees of freedom.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True, slots=True, order=True)
class Commit:
    """One step of one replica group that counts."""

    t: float
    step: int
    replica: int


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure of a schedule: seconds after the start of the window, and whom it hits."""

    at: float
    victim: int


def schedule(seed: int, mean: float, window: float, groups: int) -> list[Failure]:
    """Failures with exponential waits: the same for the same arguments."""
    chance = random.Random(seed)  # noqa: S311
    found, at = [], chance.expovariate(1 / mean)
    while at < window:
        found.append(Failure(round(at, 3), chance.randrange(groups)))
        at += chance.expovariate(1 / mean)
    return found


def useful(commits: Sequence[Commit], until: float) -> int:
    """Group steps whose result is still there at ``until``: a training that begins again from
    an older checkpoint has lost what came after it."""
    kept: list[Commit] = []
    newest = -1
    for commit in sorted(c for c in commits if c.t <= until):
        if commit.step < newest - STEPS_BACK:
            kept = [c for c in kept if c.step < commit.step]
            newest = commit.step
        newest = max(newest, commit.step)
        kept.append(commit)
    return len({(c.step, c.replica) for c in kept})


def total_losses(commits: Sequence[Commit]) -> int:
    """How often a training without checkpoints began anew: all of its groups were lost at once."""
    newest, found = -1, 0
    for commit in sorted(commits):
        if commit.step < newest - STEPS_BACK:
            newest, found = commit.step, found + 1
        newest = max(newest, commit.step)
    return found


def ideal(failures: Sequence[Failure], window: float, groups: int, start: float) -> float:
    """Share of full speed that a system reaches whose survivors never pause, and whose lost
    group is away only for a bare start."""
    away = 0.0
    for group in range(groups):
        back = 0.0
        for at in (f.at for f in failures if f.victim == group):
            end = min(at + start, window)
            away += end - max(at, back) if end > back else 0.0
            back = max(back, end)
    return 1 - away / (groups * window)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Where the time of all groups went, as shares of the window."""

    useful: float
    bare_start: float
    """Groups that were lost, for as long as a bare start takes."""
    longer_away: float
    """The same groups, beyond that."""
    pauses: float
    """Groups that were not hit, and stood still."""
    slower: float
    """Steps that took longer than without failures."""


def losses(
    commits: Sequence[Commit],
    failures: Sequence[Failure],
    window: tuple[float, float],
    groups: int,
    step: float,
    start: float,
) -> Losses:
    """``step``: seconds of one without failures; ``start``: of a bare start."""
    begin, end = window
    whole = groups * (end - begin)
    bare = longer = pauses = 0.0
    for group in range(groups):
        times = sorted(c.t for c in commits if c.replica == group and begin <= c.t <= end)
        times = [begin, *times, end]
        own = [begin + f.at for f in failures if f.victim == group]
        for a, b in itertools.pairwise(times):
            if (excess := b - a - step) < step:
                continue
            hits = [t for t in own if a - step <= t <= b]
            if hits:
                needed = min(
                    sum(min(start, y - x) for x, y in zip(hits, [*hits[1:], b], strict=True)),
                    excess,
                )
                bare, longer = bare + needed, longer + excess - needed
            else:
                pauses += excess
    done = sum(begin < c.t <= end for c in commits) * step
    return Losses(
        useful=done / whole,
        bare_start=bare / whole,
        longer_away=longer / whole,
        pauses=pauses / whole,
        slower=1 - (done + bare + longer + pauses) / whole,
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (not a number for a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    quantile = STUDENT[min(len(values) - 2, len(STUDENT) - 1)]
    return mean, quantile * statistics.stdev(values) / math.sqrt(len(values))
