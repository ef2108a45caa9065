"""How long the forming of a process group waits for a member that has died."""

from __future__ import annotations

import json
import multiprocessing
import socket
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import AllreduceOptions, TCPStore
from torchft.process_group import ProcessGroupGloo, ReconfigureOptions

from launcher.train import reconfigure
from launcher.train.reconfigure import PromptGloo

pytestmark = pytest.mark.torch
SECONDS = 6.0


def group(kind: type[ProcessGroupGloo]) -> ProcessGroupGloo:
    return kind(timeout=timedelta(seconds=SECONDS))


def options(pg: ProcessGroupGloo, rank: int, world: int, store: str) -> ReconfigureOptions:
    """What the lighthouse gives out for a quorum; the other members' handles are made up."""
    ids = [f"member-{n}" for n in range(world)]
    ids[rank] = pg._handle_id()
    found = ReconfigureOptions()
    found.uuid = 7
    found.handles = [json.dumps({"id": i, "store": store, "global_rank": None}) for i in ids]
    return found


def connect(kind: type[ProcessGroupGloo], store: str, answers: Any, rank: int, world: int,
            late: float) -> None:  # fmt: skip
    pg, began = group(kind), time.monotonic()
    try:
        pg.reconfigure(options(pg, rank, world, store)).wait()
    except Exception as error:
        answers.put(("no group", time.monotonic() - began, type(error).__name__))
        return
    time.sleep(late * rank)
    began, value = time.monotonic(), torch.ones(2)
    pg.allreduce([value], AllreduceOptions()).wait()
    answers.put(("sum", time.monotonic() - began, value[0].item()))


def run(kind: type[ProcessGroupGloo], *, there: int, world: int, late: float = 0.0) -> list[Any]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    address = f"127.0.0.1:{store.port}"
    members = [
        context.Process(target=connect, args=(kind, address, answers, rank, world, late))
        for rank in range(there)
    ]
    for member in members:
        member.start()
    found = [answers.get(timeout=60) for _ in members]
    for member in members:
        member.join(30)
    return found


@pytest.mark.timeout(120)
def test_a_member_that_is_missing_is_waited_for_shortly() -> None:
    ((what, seconds, _),) = run(PromptGloo, there=1, world=2)
    assert what == "no group"
    assert seconds < (reconfigure.CONNECT.total_seconds() + SECONDS) / 2
    ((what, seconds, _),) = run(ProcessGroupGloo, there=1, world=2)
    assert seconds >= SECONDS, "upstream does this by itself now: adapt() may go"


def test_a_store_whose_owner_has_died_is_not_waited_for() -> None:
    with socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{gone.getsockname()[1]}"  # nobody listens there
        pg, began = group(PromptGloo), time.monotonic()
        with pytest.raises(OSError, match="refused"):
            pg.reconfigure(options(pg, 1, 2, address))
        assert time.monotonic() - began < 1.0


@pytest.mark.timeout(120)
def test_collectives_keep_their_own_time() -> None:
    slow = reconfigure.CONNECT.total_seconds() + 0.8  # less than SECONDS
    found = run(PromptGloo, there=2, world=2, late=slow)
    assert [(what, value) for what, _, value in found] == [("sum", 2.0)] * 2
    assert max(seconds for _, seconds, _ in found) > slow / 2


def test_only_gloo_groups_are_changed() -> None:
    class Manager:
        def __init__(self, pg: object) -> None:
            self._pg = pg

    manager, other = Manager(group(ProcessGroupGloo)), Manager(object())
    reconfigure.adapt(manager)
    reconfigure.adapt(other)
    assert type(manager._pg) is PromptGloo
    assert type(other._pg) is object
