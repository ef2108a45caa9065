"""What the benchmarks calculate: a wrong sum would be a wrong claim."""

from __future__ import annotations

from dataclasses import fields

import pytest

from benchmarks.goodput_account import (
    Commit,
    Failure,
    Losses,
    ideal,
    interval,
    losses,
    schedule,
    total_losses,
    useful,
)


def steps(numbers: range, begin: float, *replicas: int) -> list[Commit]:
    return [Commit(begin + i, step, r) for i, step in enumerate(numbers) for r in replicas]


def vars_of(found: Losses) -> list[float]:
    return [getattr(found, field.name) for field in fields(found)]


def test_a_schedule_is_the_same_for_the_same_seed_and_stays_in_its_window() -> None:
    failures = schedule(3, 20.0, 600.0, 3)
    assert failures == schedule(3, 20.0, 600.0, 3) != schedule(4, 20.0, 600.0, 3)
    assert 15 < len(failures) < 50
    assert all(0 < f.at < 600 and f.victim in range(3) for f in failures)


def test_work_that_was_lost_again_does_not_count() -> None:
    whole = steps(range(10), 0.0, 0, 1)
    again = steps(range(5, 8), 20.0, 0)
    assert useful(whole, 9.5) == 20
    assert useful(whole + again, 30.0) == 2 * 5 + 3
    assert useful(whole, 4.5) == 10


def test_beginnings_anew_are_counted() -> None:
    whole = steps(range(10), 0.0, 0, 1)
    assert total_losses(whole) == 0
    assert total_losses(whole + steps(range(6), 20.0, 0, 1)) == 1
    assert total_losses(whole + steps(range(6), 20.0, 0, 1) + steps(range(4), 40.0, 1)) == 2


def test_the_ideal_counts_overlapping_starts_once() -> None:
    assert ideal([], 100.0, 2, 10.0) == 1
    assert ideal([Failure(10, 0), Failure(15, 0)], 100.0, 2, 10.0) == pytest.approx(1 - 15 / 200)
    assert ideal([Failure(95, 0)], 100.0, 2, 10.0) == pytest.approx(1 - 5 / 200)


def test_losses_sum_to_the_whole_window_and_name_whom_they_hit() -> None:
    survivor = steps(range(10), 1.0, 0) + steps(range(10, 18), 13.0, 0)
    lost = steps(range(5), 1.0, 1) + steps(range(15, 18), 18.0, 1)
    found = losses(survivor + lost, [Failure(5.5, 1)], (0.0, 20.5), 2, 1.0, 5.0)
    assert sum(vars_of(found)) == pytest.approx(1)
    assert found.bare_start == pytest.approx(5 / 41)
    assert found.longer_away == pytest.approx(7 / 41)
    assert found.pauses == pytest.approx(2 / 41)


def test_an_interval_needs_two_values() -> None:
    mean, half = interval([0.8, 0.9, 1.0])
    assert mean == pytest.approx(0.9)
    assert half == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert interval([0.5])[1] != interval([0.5])[1]
