"""What a script of the user's own may tell the monitor; commits and heals it sees by itself.

::

    from launcher.train import tell

    tell.weights(manager.current_step(), model)      # compared between the replica groups
    tell.metrics(manager.current_step(), loss=1.5)

Outside the kit these do nothing.
"""

from __future__ import annotations

from functools import cache

import torch

from launcher.train.recorder import Recorder
from launcher.train.weights import weight_hash


@cache
def _recorder() -> Recorder:
    return Recorder.from_environment()


def weights(step: int, *models: torch.nn.Module) -> None:
    """Hash this rank's weights, where those of all replica groups must be equal.

    Args:
        step: the manager's, which is the same count in every group.
    """
    shares = [weight for model in models for weight in model.parameters()]
    _recorder().record("weights", step=step, hash=weight_hash(shares))


def metrics(step: int, **values: float) -> None:
    """Figures of this replica group: ``loss`` and ``tokens_per_second`` are shown."""
    if _recorder().rank == 0:
        _recorder().record("metrics", step=step, **values)
