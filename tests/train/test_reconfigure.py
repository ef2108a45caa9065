"""How long the forming of a process group waits for a member that has died."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import AllreduceOptions, TCPStore
from torchft.process_group import ProcessGroupGloo, ReconfigureOptions

from launcher.train import reconfigure
from launcher.train.reconfigure import PromptGloo
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.torch
SECONDS = 6.0
KINDS = {"prompt": PromptGloo, "upstream": ProcessGroupGloo}


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


def connect(kind: str, store: str, rank: int, world: int, late: float) -> tuple[str, float, Any]:
    """What one member finds: (what, seconds, the sum or the error's kind)."""
    pg, began = group(KINDS[kind]), time.monotonic()
    try:
        pg.reconfigure(options(pg, rank, world, store)).wait()
    except Exception as error:
        return "no group", time.monotonic() - began, type(error).__name__
    time.sleep(late * rank)
    began, value = time.monotonic(), torch.ones(2)
    pg.allreduce([value], AllreduceOptions()).wait()
    return "sum", time.monotonic() - began, value[0].item()


def run(kind: str, *, there: int, world: int, late: float = 0.0) -> list[Any]:
    """Members of a group, each a process: this module, run with what it is to do."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    members = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps([kind, f"127.0.0.1:{store.port}", rank, world, late])],
            cwd=REPOSITORY, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(there)
    ]  # fmt: skip
    found = [member.communicate(timeout=90)[0].splitlines()[-1] for member in members]
    return [json.loads(line) for line in found]


@pytest.mark.timeout(120)
def test_a_member_that_is_missing_is_waited_for_shortly() -> None:
    ((what, seconds, _),) = run("prompt", there=1, world=2)
    assert what == "no group"
    assert seconds < (reconfigure.CONNECT.total_seconds() + SECONDS) / 2
    ((what, seconds, _),) = run("upstream", there=1, world=2)
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
    found = run("prompt", there=2, world=2, late=slow)
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


if __name__ == "__main__":
    print(json.dumps(connect(*json.loads(sys.argv[1]))))
