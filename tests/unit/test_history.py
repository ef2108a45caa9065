"""The series of a run that a report draws: bounded, with what was worst in them."""

from __future__ import annotations

from launcher import history as history_module
from launcher.events import Event
from launcher.history import BY_BADNESS, Changes, History, Series, Span
from launcher.model import GroupState
from launcher.pictures import cells
from launcher.state import RunState


def test_a_changing_value_keeps_its_worst_in_bounded_memory() -> None:
    changes: Changes[GroupState] = Changes(BY_BADNESS.index)
    for t in range(50_000):
        changes.add(float(t), GroupState.HEALING if t % 2 else GroupState.TRAINING)
    changes.add(50_000.0, GroupState.LOST)
    for t in range(50_001, 99_999):
        changes.add(float(t), GroupState.HEALING if t % 2 else GroupState.TRAINING)
    assert len(changes.points) <= history_module.MOST_CHANGES
    assert [value for _, value in changes.points].count(GroupState.LOST) == 1
    assert [t for t, _ in changes.points] == sorted(t for t, _ in changes.points)
    assert changes.points[-1] == (99_998.0, GroupState.TRAINING)


def test_a_series_keeps_its_extremes_in_bounded_memory() -> None:
    series = Series()
    for t in range(100_000):
        series.add(float(t), 50.0 if t == 777 else float("nan") if t == 5 else 1.0)
    assert history_module.MOST_POINTS / 2 <= len(series.points) <= history_module.MOST_POINTS
    assert max(point.high for point in series.points) == 50.0
    assert [p.t for p in series.points] == sorted(p.t for p in series.points)
    assert series.points[-1].mean == 1.0


def test_tokens_per_second_are_summed_over_those_who_report() -> None:
    def metrics(t: float, replica: int, speed: float) -> Event:
        fields = {"loss": 3.0, "tokens_per_second": speed}
        return Event(t=t, kind="metrics", replica=replica, fields=fields)

    story = [metrics(1, 0, 10), metrics(1.1, 1, 12), metrics(2, 1, 12), metrics(2.1, 0, 10)]
    story += [metrics(3, 0, 9), metrics(4, 0, 10)]
    state, history = RunState(2), History()
    for event in story:
        state.apply(event)
        history.note(state, event)
    seen = [(point.t, point.mean) for point in history.tokens_per_second.points]
    assert seen == [(1.1, 22.0), (2.1, 22.0), (3.0, 9.0)]
    assert [point.t for point in history.loss.points] == [1, 2, 3, 4]


def test_a_short_loss_is_seen_in_a_long_run() -> None:
    spans = [
        Span(0.0, 500.0, GroupState.TRAINING),
        Span(500.0, 500.1, GroupState.LOST),
        Span(500.1, 1000.0, GroupState.TRAINING),
    ]
    found = [BY_BADNESS[badness] for badness in cells(spans, 0.0, 1000.0, 10)]
    assert found == [GroupState.TRAINING] * 5 + [GroupState.LOST] + [GroupState.TRAINING] * 4
