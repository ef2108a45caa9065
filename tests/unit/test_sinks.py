"""What a sink gets of a run, and that it can harm nobody."""

import copy
import dataclasses
import re
import threading
import time

import pytest

from launcher import sinks
from launcher.events import Event
from launcher.incidents import Incident, hang_sign
from launcher.model import KitError
from launcher.sinks import Delivery, Update
from launcher.state import RunState
from tests.unit.telling import SECRET, Keep, run, story, updates

__all__ = ["run", "story"]


def test_a_sink_hears_of_a_loss_and_of_a_recovery_once(story: list[Event]) -> None:
    got = updates(story)
    assert [i.replica for update in got for i in update.lost] == [1]
    assert [i.recovered_at_step for update in got for i in update.recovered] == [37]
    assert [f.kind for update in got for f in update.appeared] == ["loss_nan"]
    assert [f.kind for update in got for f in update.gone] == ["loss_nan"]
    assert got[-1].last_recovery == pytest.approx(17.5, abs=0.1)


def test_a_sink_that_raises_hangs_or_is_slow_costs_the_monitor_nothing(
    story: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "QUEUE", 2)
    monkeypatch.setattr(sinks, "HUNG_SECONDS", 0.0)
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.3)
    held = threading.Event()

    class Raises:
        name = "broken"

        def deliver(self, update: Update) -> None:
            raise ValueError(SECRET)

        def close(self) -> None:
            raise KitError("cannot close")

    class Hangs:
        name = "stuck"

        def deliver(self, update: Update) -> None:
            held.wait()

        def close(self) -> None:
            pass

    delivery = Delivery([Raises(), Hangs()])
    state, said = RunState(2, 120), []
    started = time.monotonic()
    for event in story:
        notices = state.apply(event)
        said += [n.text for n in delivery.deliver(state, notices, [], blind=False)]
    said += delivery.close()
    assert time.monotonic() - started < 5
    held.set()
    told = "\n".join(said)
    assert told.count("broken failed (ValueError); further failures are only counted") == 1
    assert told.count("broken did not end well (cannot close)") == 1
    assert told.count("stuck has not answered for") == 1
    assert told.count("stuck is too slow, its news are being dropped") == 1
    assert "stuck did not finish in time and was left behind" in told
    assert re.search(r"stuck: \d+ updates were not delivered", told)
    assert SECRET not in told


def lost(at: float, *, back: float | None = None, replica: int = 1) -> Incident:
    """An incident that is certain: the quorum lacks the group."""
    return Incident(
        replica=replica, first_sign=at - 2, detected_at=at, lost_at_step=7, recovered_at=back
    )


class Told:
    """Deliveries of hand-made stories, and what of them is news."""

    def __init__(self) -> None:
        self._keep, self._now = Keep(), 0.0
        self._delivery = Delivery([self._keep], clock=lambda: self._now)
        self._seen = 0

    def at(self, now: float, *incidents: Incident) -> tuple[list[float], list[float]]:
        """First signs of what is told as lost, and as recovered, of this story at this time."""
        self._now = now
        state = RunState(2)
        state.incidents = copy.deepcopy(list(incidents))  # others at every look, as after a refold
        self._delivery.deliver(state, [], [], blind=False)
        while len(self._keep.got) == self._seen:
            time.sleep(0.001)
        self._seen += 1
        update = self._keep.got[-1]
        return [i.first_sign for i in update.lost], [i.first_sign for i in update.recovered]

    def changed(self) -> int:
        return len(self._keep.got[-1].incidents)


def test_a_hang_is_told_although_it_was_waited_for_long() -> None:
    waited = lost(1000.0)
    waited.explain([hang_sign(780.0, 220.0, None)])
    assert waited.first_sign == 780.0
    assert Told().at(1000.5, waited) == ([780.0], [])


def test_what_is_known_only_by_its_signs_is_told_when_it_is_certain() -> None:
    told, signs = Told(), Incident(replica=1, first_sign=700.0)
    assert told.at(1000.0, signs) == ([], [])
    signs.ended_at = 1001.0
    assert told.at(1001.0, signs) == ([700.0], [])
    signs.detected_at = 1009.0
    assert told.at(1009.0, signs) == ([], [])
    fresh = Incident(replica=0, first_sign=1010.0)
    assert told.at(1011.0, signs, fresh) == ([1010.0], [])
    fresh.detected_at = 1012.0
    assert told.at(1012.0, signs, fresh) == ([], []), "it was told of by its signs"


def test_history_is_no_alarm() -> None:
    told, old = Told(), lost(1000.0)
    assert told.at(1121.0, old, lost(500.0, back=600.0)) == ([], [])
    old.ended_at = 1130.0  # its node could be reached again, and told the end of the old copy
    assert told.at(1131.0, old) == ([], [])


def test_a_story_that_is_corrected_is_not_told_again() -> None:
    told = Told()
    assert told.at(1000.0, lost(1000.0), lost(999.0, replica=0)) == ([998.0, 997.0], [])
    assert told.at(1001.0, lost(1000.0), lost(999.0, replica=0)) == ([], [])
    assert told.changed() == 0
    moved = lost(995.0)  # another time, another step, another place in the list
    moved.lost_at_step, moved.first_sign = 6, 900.0
    assert told.at(1002.0, lost(999.0, replica=0), moved) == ([], [])
    assert told.changed() == 1
    assert told.at(1030.0, lost(995.0, back=1030.0), lost(999.0, replica=0)) == ([], [993.0])
    first = lost(990.0, back=1029.0)
    assert told.at(1031.0, first, lost(999.0, replica=0)) == ([], []), "it has ended already"
    assert told.at(1050.0, first, lost(1050.0), lost(999.0, replica=0)) == ([1048.0], [])
    outage = Incident(replica=None, kind="lighthouse_lost", first_sign=1050.0, detected_at=1050.0)
    assert told.at(1051.0, first, lost(1050.0), outage) == ([1050.0], [])


def test_an_incident_that_turns_out_never_to_have_been_hides_no_other() -> None:
    told = Told()
    assert told.at(1000.0, lost(1000.0)) == ([998.0], [])
    assert told.at(1001.0) == ([], [])
    assert told.at(1002.0, lost(1002.0)) == ([1000.0], [])


def test_one_incident_that_turns_out_to_be_two_is_told_as_two() -> None:
    told = Told()
    assert told.at(1000.0, lost(1000.0)) == ([998.0], [])
    assert told.at(1060.0, lost(1000.0, back=1030.0), lost(1050.0)) == ([1048.0], [998.0])


def test_what_a_sink_has_does_not_change_under_it() -> None:
    keep, state = Keep(), RunState(2)
    state.incidents = [lost(5.0)]
    delivery = Delivery([keep], clock=lambda: 5.0)
    delivery.deliver(state, [], [], blind=False)
    state.incidents[0].recovered_at, state.incidents[0].boot["model"] = 6.0, 1.0
    delivery.deliver(state, [], [], blind=False)
    assert delivery.close() == []
    first, second = (update.incidents[0] for update in keep.got)
    assert (first.recovered_at, first.boot) == (None, {})
    assert (second.recovered_at, second.boot) == (6.0, {"model": 1.0})
    assert dataclasses.replace(first, recovered_at=6.0, boot={"model": 1.0}) == second
