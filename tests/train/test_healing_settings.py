"""Settings that the doctor refuses, on the torchtitan that does not survive them.

Where upstream changes, a test fails: then the doctor's check can go (launcher/checks_training.py).
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]


class Model:
    """Stands in for what is saved."""

    def __init__(self, value: float) -> None:
        import torch

        self.value = torch.tensor(value)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]

    def init_cache_state_dict(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    import torch.distributed as dist

    from launcher.train import device

    device.prepare("cpu")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def manager(folder: Path, rank: int = 0, **settings: Any) -> Any:
    """The checkpoint manager of a replica group that is ``rank`` in the quorum."""
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.config.job_config import Checkpoint

    torchft = types.SimpleNamespace(
        set_state_dict_fns=lambda load, save: None, participating_rank=lambda: rank
    )
    return CheckpointManager(
        dataloader=Model(0.0),
        model_parts=[],
        optimizers=Model(1.0),
        lr_schedulers=Model(2.0),
        states={"train_state": Model(3.0)},
        checkpoint_config=Checkpoint(interval=2, last_save_model_only=False, **settings),
        sd_adapter=None,
        base_folder=str(folder),
        ft_manager=types.SimpleNamespace(
            manager=torchft, enabled=True, replica_id=rank, group_size=2
        ),
    )


def test_a_step_to_load_ends_whoever_starts_again(tmp_path: Path) -> None:
    """At the first start it is ignored; once the run has checkpoints of its own, it is not."""
    first = manager(tmp_path, enable=True)
    assert not first.load(step=500)
    first.save(2)
    with pytest.raises(FileNotFoundError, match="load_step=500"):
        manager(tmp_path, enable=True).load(step=500)
    assert manager(tmp_path, enable=True).load()


def test_leaving_the_dataloader_out_ends_whoever_starts_again(tmp_path: Path) -> None:
    manager(tmp_path, enable=True).save(2)
    again = manager(tmp_path, enable=True, exclude_from_loading=["dataloader"])
    with pytest.raises(KeyError, match="dataloader"):
        again.load()


def test_keeping_one_checkpoint_is_refused_also_with_checkpoints_off(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        manager(tmp_path, enable=False, keep_latest_k=1)


def test_without_dataloader_checkpoints_every_group_writes_the_whole_one(tmp_path: Path) -> None:
    written = []
    for on in (True, False):
        other = manager(
            tmp_path / str(on), rank=1, enable=True, enable_ft_dataloader_checkpoints=on
        )
        other.save(2)
        written.append((tmp_path / str(on) / "checkpoint" / "step-2").exists())
    assert written == [False, True]


def test_initial_weights_are_ignored_with_checkpoints_off(tmp_path: Path) -> None:
    weights: dict[str, Any] = {"initial_load_path": str(tmp_path / "nothing is here")}
    assert not manager(tmp_path, enable=False, **weights).load()
    with pytest.raises(ValueError, match="not valid"):
        manager(tmp_path, enable=True, **weights).load()
