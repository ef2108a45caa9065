"""A group's own work in a step: measured alone, and in real training of two groups."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher import assets
from launcher.command import replica_flags
from launcher.findings import Snapshot, judge
from launcher.watcher import Watcher
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]


def own_work(slow: float = 0.0) -> tuple[Any, Any]:
    """A model whose forward takes at least ``slow`` seconds, and what measures it."""
    import torch

    from launcher.train.own_work import OwnWork

    model = torch.nn.Linear(2, 2)
    forward = model.forward

    def slowed(values: Any) -> Any:
        time.sleep(slow)
        return forward(values)

    model.forward = slowed
    return model, OwnWork([model], torch.device("cpu"))


def step(model: Any, work: Any, loads: list[float], *, forwards: int = 1, wait: float = 0) -> None:
    import torch

    work.step(loads)
    for _ in range(forwards):
        loads.append(0.5)
        model(torch.zeros(2)).sum().backward()
    time.sleep(wait)


def test_the_first_step_is_left_out() -> None:
    model, work = own_work()
    loads: list[float] = []
    step(model, work, loads)
    assert work.take(loads) is None, "logged after the first step, as torchtitan does"
    loads.clear()
    step(model, work, loads)
    assert work.take(loads) == pytest.approx(0.5, abs=0.1)
    model, work = own_work()
    loads = [100.0]  # the first step's; logged only after the third
    work.step([])
    step(model, work, loads)
    step(model, work, loads)
    assert work.take(loads) == pytest.approx(0.5, abs=0.1)


def test_it_is_the_mean_of_the_steps_and_the_sum_of_their_forwards() -> None:
    model, work = own_work(slow=0.05)
    loads: list[float] = []
    step(model, work, loads)
    loads.clear()
    for _ in range(2):
        step(model, work, loads, forwards=2)
    assert work.take(loads) == pytest.approx(1.0 + 0.1, abs=0.06)
    loads.clear()
    assert work.take(loads) is None, "nothing since"


def test_waiting_outside_of_the_forward_and_validation_do_not_count() -> None:
    model, work = own_work()
    loads: list[float] = []
    step(model, work, loads)
    loads.clear()
    step(model, work, loads, wait=0.3)
    model.eval()
    import torch

    model(torch.zeros(2))
    assert work.take(loads) == pytest.approx(0.5, abs=0.1)


def test_on_a_gpu_events_are_read_when_they_have_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a device that is faked: two forwards, of which it has done one when it is asked."""
    import torch

    clock = [0.0]
    done = [1.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            clock[0] += 1.0
            self.at = clock[0]

        def query(self) -> bool:
            return self.at <= done[0]

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) * 1000

        def synchronize(self) -> None:
            raise AssertionError("a rank must not wait for a measurement")

    class Module:
        pass

    Module.Event = Event  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    from launcher.train.own_work import OwnWork

    model = torch.nn.Linear(2, 2)
    work = OwnWork([model], torch.device("cuda"))
    loads: list[float] = []
    step(model, work, loads)
    loads.clear()
    step(model, work, loads)
    assert work.take(loads) is None, "not done yet"
    loads.clear()
    done[0] = 4.0
    step(model, work, loads)
    assert work.take(loads) == pytest.approx(1.0 + 0.5), "the forward of the step before"


#: A replica group of one rank; argv: seconds by which its forward is slowed, then torchtitan's.
TRAINING = """
import sys, time
slow = float(sys.argv.pop(1))
from launcher.train import device
device.prepare("cpu")
from launcher.train import trainer
from torchtitan.models.llama3.model.model import Transformer
forward = Transformer.forward
def slowed(self, *args, **more):
    time.sleep(slow)
    return forward(self, *args, **more)
Transformer.forward = slowed
trainer.run()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_two_groups_train_and_the_slower_one_is_found(tmp_path: Path) -> None:
    """Their step times are equal, for the fast one waits; their own work is not."""
    from torchft.coordination import LighthouseServer

    slow, steps = 0.5, 7
    corpus, _ = assets.debug(tmp_path)
    lighthouse = LighthouseServer(bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=20000)
    ranks = []
    try:
        for replica in (0, 1):
            extra = [
                f"--training.steps={steps}",
                "--training.seq_len=64",
                f"--training.dataset_path={corpus / 'corpus'}",
                f"--model.hf_assets_path={corpus / 'tokenizer'}",
            ]
            config = REPOSITORY / "configs" / "debug-cpu.toml"
            flags = replica_flags(config, tmp_path, extra, replica=replica, group_size=2)
            env = {
                **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
                "TFT_DEVICE": "cpu",
                "TORCHFT_LIGHTHOUSE": lighthouse.address(),
                "TFT_EVENTS": str(tmp_path / f"tft-1_{replica}.events.jsonl"),
                "REPLICA_GROUP_ID": str(replica),
                "SLURMD_NODENAME": f"worker-{replica}",
                "OMP_NUM_THREADS": "1",
                **dict.fromkeys(("RANK", "LOCAL_RANK", "GROUP_RANK"), "0"),
                **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
            }
            launch = {"t": time.time(), "kind": "launch", "replica": replica, "attempt": 1}
            line = json.dumps(launch | {"host": env["SLURMD_NODENAME"]})
            Path(env["TFT_EVENTS"]).write_text(line + "\n")  # as the launcher of a group does
            argv = [sys.executable, "-c", TRAINING, str(slow * replica), *flags]
            with (tmp_path / f"{replica}.log").open("wb") as log:
                ranks.append(
                    subprocess.Popen(argv, env=env, cwd=REPOSITORY, stdout=log, stderr=log)
                )
        for replica, rank in enumerate(ranks):
            code = rank.wait(timeout=100)
            assert code == 0, (tmp_path / f"{replica}.log").read_text()[-3000:]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        lighthouse.shutdown()
    paths = sorted(tmp_path.glob("*.events.jsonl"))
    own, step_seconds = [], []
    for path in paths:
        events = [json.loads(line) for line in path.read_text().splitlines()]
        metrics = [event for event in events if event["kind"] == "metrics"]
        assert metrics[0]["busy_seconds"] is None
        own.append(sorted(event["busy_seconds"] for event in metrics[1:])[(steps - 1) // 2])
        times = [event["t"] for event in metrics]
        step_seconds.append((times[-1] - times[1]) / (len(times) - 2))
    assert step_seconds[0] == pytest.approx(step_seconds[1], rel=0.1)
    assert own[1] >= slow
    assert own[0] < slow / 2, "what the fast one waits is not its own work"
    with Watcher.of_files(None, paths) as watcher:
        watcher.look(final=True)
        state = watcher.state
        found = judge(Snapshot(state=state, now=state.last_event))
    assert [(f.kind, f.replica) for f in found] == [("straggler", 1)]
    assert "replica 1 on worker-1 works" in found[0].message
