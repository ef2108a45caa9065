"""Leases, orders and spares: who runs a replica group, and who is told to."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from launcher import lease, orders, spares
from launcher.model import KitError
from launcher.rundir import RunDir
from tests.unit.conftest import MANIFEST


def test_a_newer_start_takes_the_lease(hostile: Path) -> None:
    path = hostile / "groups" / "0.lease.json"
    assert lease.current(path) is None
    first = lease.take(path, replica=0, task=0, host="a" * 200)
    assert not lease.lost(path, first)
    second = lease.take(path, replica=0, task=3, host="b")
    assert (first.number, second.number) == (1, 2)
    assert lease.lost(path, first)
    assert not lease.lost(path, second)
    assert lease.current(path) == second
    # A damaged file changes nothing: a number is given out once.
    path.write_text('{"replica": 0, "num')
    assert lease.current(path) == second
    assert lease.lost(path, first)
    assert not lease.held(path, second), "who cannot see it, is not let through"
    assert lease.take(path, replica=0, task=0, host="c").number == 3
    path.write_text('{"replica": 0, "number": null, "task": 0, "host": "", "t": 0}')
    assert lease.take(path, replica=0, task=0, host="d").number == 4
    for file in path.parent.glob("0.*.taken"):
        file.write_text("")
    path.write_text("")
    with pytest.raises(KitError, match="cannot be read"):
        lease.take(path, replica=0, task=0, host="e")


def test_two_who_take_a_lease_at_once_get_two_numbers(tmp_path: Path) -> None:
    path = tmp_path / "0.lease.json"
    got: list[lease.Lease] = []
    for _ in range(40):
        both = [
            threading.Thread(
                target=lambda: got.append(lease.take(path, replica=0, task=0, host="h"))
            )
            for _ in range(2)
        ]
        for one in both:
            one.start()
        for one in both:
            one.join()
        last = max(got, key=lambda one: one.number)
        assert [one for one in got if not lease.lost(path, one)] == [last]
    assert sorted(one.number for one in got) == list(range(1, 81))


def test_orders_are_for_one_attempt_and_grow_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "orders.jsonl"
    reader = orders.OrderReader(path)
    assert reader.of_attempt(1, 1) is None
    for replica, attempt in ((0, 1), (1, 2), (1, 1)):
        orders.give(path, "restart", replica=replica, attempt=attempt, why=f"{replica}.{attempt}")
    orders.give(path, "take_over", replica=1, attempt=1, why="spare", task=7)
    with path.open("a") as file:
        file.write("not json\n{}\n")
    found = reader.of_attempt(1, 1)
    assert found is not None
    assert found.why == "1.1"
    assert reader.of_attempt(1, 1) is None, "an order is obeyed once"
    taken = orders.OrderReader(path).take_over(7)
    assert taken is not None
    assert (taken.replica, taken.why) == (1, "spare")
    assert orders.OrderReader(path).take_over(6) is None
    monkeypatch.setattr(orders, "VALID_SECONDS", -1.0)
    assert orders.OrderReader(path).of_attempt(1, 2) is None


def test_a_task_keeps_its_group_until_a_spare_has_it(run: RunDir) -> None:
    assert [spares.role(run, MANIFEST, task) for task in (0, 1, 2)] == [0, 1, None]
    lease.take(run.lease(1), replica=1, task=1, host="a")
    assert spares.role(run, MANIFEST, 1) == 1
    lease.take(run.lease(1), replica=1, task=2, host="b")
    assert [spares.role(run, MANIFEST, task) for task in (0, 1, 2)] == [0, None, 1]


def test_a_spare_is_ready_while_it_says_so(tmp_path: Path) -> None:
    spare = spares.Spare(task=2, host="w2", t=100.0)
    spares.show(tmp_path, spare)
    spares.show(tmp_path, spares.Spare(task=10, host="a longer name", t=100.0))
    (tmp_path / "spare-11.json").write_text("{")
    assert [s.task for s in spares.ready(tmp_path, 105.0)] == [10, 2]
    assert not spares.ready(tmp_path, 100.0 + spares.FRESH)
    spares.withdraw(tmp_path, 10)
    assert spares.ready(tmp_path, 105.0) == [spare]
