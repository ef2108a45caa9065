"""Each correction of the trainer, beside the upstream behaviour that makes it needed.

Where upstream changes, the first half of a test fails: then the correction can go.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module", autouse=True)
def _cpu() -> None:
    from launcher.train import device

    device.prepare("cpu")


@pytest.fixture
def process_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


class TestLearningRateAfterAHeal:
    """The optimizer state sent to a healed replica holds the learning rate of step 0."""

    def healed_rate(self, build: Any) -> tuple[float, float]:
        """(rate of the optimizer after a heal at step 5, rate of its peers)."""
        import torch
        from torchtitan.config.job_config import LRScheduler

        class Optimizers(list[torch.optim.Optimizer]):
            pass

        def one() -> tuple[Any, Any]:
            parameter = torch.nn.Parameter(torch.zeros(1))
            optimizer = torch.optim.AdamW([parameter], lr=1.0)
            return optimizer, build(Optimizers([optimizer]), LRScheduler(warmup_steps=10), 100)

        optimizer, schedulers = one()
        cached_at_start = optimizer.state_dict()
        for _ in range(5):
            optimizer.step()
            schedulers.step()
        healed_optimizer, healed_schedulers = one()
        healed_optimizer.load_state_dict(cached_at_start)
        healed_schedulers.load_state_dict(schedulers.state_dict())
        return healed_optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]

    def test_upstream_is_wrong(self) -> None:
        from torchtitan.components.lr_scheduler import build_lr_schedulers

        healed, peers = self.healed_rate(build_lr_schedulers)
        assert healed != peers

    def test_corrected(self) -> None:
        from torchtitan.components.lr_scheduler import build_lr_schedulers

        from launcher.train.spec import _build_lr_schedulers

        healed, peers = self.healed_rate(_build_lr_schedulers(build_lr_schedulers))
        assert healed == peers


class TestGradientHook:
    """Which layouts would leave gradients unaveraged across replica groups."""

    def layout(self, **degrees: int) -> Any:
        from torchtitan.distributed import ParallelDims

        whole = {"dp_replicate": 1, "dp_shard": 1, "cp": 1, "tp": 1, "pp": 1, "ep": 1, "etp": 1}
        whole |= degrees
        world = 1
        for name in ("dp_replicate", "dp_shard", "cp", "tp", "pp"):
            world *= whole[name]
        return ParallelDims(**whole, world_size=world)

    def config(self, **fault_tolerance: Any) -> Any:
        from torchtitan.config import JobConfig

        config = JobConfig()
        for name, value in fault_tolerance.items():
            setattr(config.fault_tolerance, name, value)
        return config

    def test_one_rank_a_group_gets_the_hook(self) -> None:
        from launcher.train.spec import needs_gradient_hook

        assert needs_gradient_hook(self.layout(), self.config(enable=True))

    def test_sharded_groups_and_other_methods_need_none(self) -> None:
        from launcher.train.spec import needs_gradient_hook

        assert not needs_gradient_hook(self.layout(dp_shard=2), self.config(enable=True))
        assert not needs_gradient_hook(self.layout(), self.config(enable=False))
        semi_sync = self.config(enable=True, semi_sync_method="diloco")
        assert not needs_gradient_hook(self.layout(), semi_sync)

    @pytest.mark.parametrize("degrees", [{"tp": 2}, {"dp_replicate": 2}, {"pp": 2}])
    def test_what_cannot_be_averaged_is_refused(self, degrees: dict[str, int]) -> None:
        from launcher.train.spec import needs_gradient_hook

        with pytest.raises(ValueError, match="data_parallel_shard_degree above 1"):
            needs_gradient_hook(self.layout(**degrees), self.config(enable=True))


class FakeManager:
    """A torchft manager of a quorum of two, in which the peer's row is known."""

    def __init__(self, peer: list[float] | None, *, healing: bool = False) -> None:
        self._peer = peer
        self._healing = healing

    def errored(self) -> None:
        return None

    def is_participating(self) -> bool:
        return not self._healing

    def current_step(self) -> int:
        return 7

    def allreduce(self, tensor: Any, reduce_op: Any) -> Any:
        import torch

        if self._peer is not None:
            tensor[1] += torch.tensor([1.0, *self._peer], dtype=tensor.dtype)
        return types.SimpleNamespace(wait=lambda: True)


class TestLoss:
    """Upstream reports the sum over replica groups; ours is the mean over participants."""

    def rows(self, manager: FakeManager, **more: Any) -> list[list[float]]:
        from launcher.train.metrics import ReplicaMetricsProcessor

        processor = ReplicaMetricsProcessor.__new__(ReplicaMetricsProcessor)
        fake = {"enabled": True, "use_async_quorum": True, "group_size": 2, "replica_id": 0}
        processor.ft_manager = types.SimpleNamespace(manager=manager, **(fake | more))
        return processor._gather([5.0, 6.0])

    def test_both_participate(self) -> None:
        assert self.rows(FakeManager([3.0, 9.0])) == [[5.0, 6.0], [3.0, 9.0]]

    def test_alone(self) -> None:
        assert self.rows(FakeManager(None)) == [[5.0, 6.0]]

    def test_a_healing_group_reports_its_peers_loss(self) -> None:
        assert self.rows(FakeManager([3.0, 9.0], healing=True)) == [[3.0, 9.0]]

    def test_semi_sync_groups_do_not_meet_at_every_step(self) -> None:
        assert self.rows(FakeManager([3.0, 9.0]), use_async_quorum=False) == [[5.0, 6.0]]

    def test_torchtitan_itself_does_not_sum_any_more(self) -> None:
        from launcher.train.trainer import ReplicaFTManager

        assert ReplicaFTManager.__new__(ReplicaFTManager).loss_sync_pg is None


class Reader:
    """A dataloader's state: how far it has read."""

    def __init__(self) -> None:
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@pytest.mark.usefixtures("process_group")
class TestDataloaderCheckpoints:
    """Upstream writes one a step, keeps all, and crashes on another layout."""

    def manager(self, folder: Path, group_size: int = 2, cls: Any = None) -> tuple[Any, Reader]:
        from torchtitan.config.job_config import Checkpoint

        from launcher.train.checkpoint import ReplicaCheckpointManager

        reader = Reader()
        torchft = types.SimpleNamespace(
            set_state_dict_fns=lambda load, save: None, participating_rank=lambda: 1
        )
        ft_manager = types.SimpleNamespace(
            manager=torchft, enabled=True, replica_id=0, group_size=group_size
        )
        manager = (cls or ReplicaCheckpointManager)(
            dataloader=reader,
            model_parts=[],
            optimizers=types.SimpleNamespace(init_cache_state_dict=lambda: None),
            lr_schedulers=None,
            states={},
            checkpoint_config=Checkpoint(),
            sd_adapter=None,
            base_folder=str(folder),
            ft_manager=ft_manager,
        )
        return manager, reader

    def train(self, manager: Any, reader: Reader, steps: int) -> None:
        for step in range(1, steps + 1):
            reader.position = step
            manager.save(step)
        manager._async_wait()

    def saved(self, folder: Path) -> int:
        return len(list(folder.rglob(".metadata")))

    def test_upstream_keeps_one_a_step(self, tmp_path: Path) -> None:
        from torchtitan.components.checkpoint import CheckpointManager

        manager, reader = self.manager(tmp_path, cls=CheckpointManager)
        self.train(manager, reader, 6)
        assert self.saved(tmp_path) == 6

    def test_few_are_written_and_few_kept(self, tmp_path: Path) -> None:
        manager, reader = self.manager(tmp_path)
        self.train(manager, reader, 55)
        assert self.saved(tmp_path) <= 3

    def test_a_restart_goes_on_where_it_was(self, tmp_path: Path) -> None:
        manager, reader = self.manager(tmp_path)
        self.train(manager, reader, 25)
        again, reader = self.manager(tmp_path)
        again.load()
        assert reader.position == 20

    def test_another_layout_is_said_and_left_alone(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.train(*self.manager(tmp_path), 20)
        manager, reader = self.manager(tmp_path, group_size=3)
        with caplog.at_level(logging.WARNING):
            manager.load()
        assert reader.position == 0
        assert "saved for another layout (2x1; now 3x1" in caplog.text

    def test_a_broken_state_costs_the_place_and_not_the_start(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.train(*self.manager(tmp_path), 20)
        for path in tmp_path.rglob("*.distcp"):
            path.write_bytes(b"")
        manager, reader = self.manager(tmp_path)
        with caplog.at_level(logging.WARNING):
            manager.load()
        assert reader.position == 0
        assert "cannot be read" in caplog.text

    def test_a_full_disk_costs_the_save_and_not_the_training(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchtitan.components.checkpoint import CheckpointManager

        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        manager, reader = self.manager(tmp_path)
        monkeypatch.setattr(CheckpointManager, "dcp_save", full)
        with caplog.at_level(logging.WARNING):
            self.train(manager, reader, 20)
        assert caplog.text.count("was not saved: [Errno 28] No space left") == 2


class TestWeightHash:
    def test_any_single_weight_changes_it(self) -> None:
        import torch

        from launcher.train.weights import weight_hash

        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        before = weight_hash(model.parameters())
        assert before == weight_hash(model.parameters())
        assert len(before) == 16
        with torch.no_grad():
            model.weight[3, 5] = torch.nextafter(model.weight[3, 5], torch.tensor(9.0))
        assert weight_hash(model.parameters()) != before


class TestDevice:
    def test_a_node_without_its_gpus_does_not_train_on_cpu(self) -> None:
        import torch

        from launcher.train import device

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(device.DeviceError, match="TFT_DEVICE=cpu"):
            device.prepare("cuda")
        with pytest.raises(device.DeviceError, match="'tpu'"):
            device.prepare("tpu")


class TestRecorder:
    def test_a_full_disk_costs_events_and_not_steps(self, caplog: pytest.LogCaptureFixture) -> None:
        from launcher.train.recorder import Recorder

        recorder = Recorder("/dev/full", replica=0, rank=0, attempt=1)
        recorder.record("commit", step=1)
        recorder.record("commit", step=2)
        assert caplog.text.count("structured events are being lost") == 1

    def test_torchfts_records_become_events(self, tmp_path: Path) -> None:
        import json

        from launcher.train.recorder import Recorder

        path = tmp_path / "events.jsonl"
        Recorder(str(path), replica=3, rank=0, attempt=2).attach_to_torchft()
        for name in ("torchft_quorums", "torchft_commits"):
            logging.getLogger(name).setLevel(logging.INFO)
        extra = {"job_id": "j", "replica_id": "torchtitan_ft_3", "rank": 0, "quorum_id": 5}
        logging.getLogger("torchft_commits").info(
            "", extra={**extra, "step": 9, "commit_result": False}
        )
        (event,) = [json.loads(line) for line in path.read_text().splitlines()]
        assert event["t"] > 0
        assert {k: event[k] for k in ("kind", "replica", "attempt", "step", "committed")} == {
            "kind": "commit",
            "replica": 3,
            "attempt": 2,
            "step": 9,
            "committed": False,
        }
