"""Weights & Biases in training: where it runs is said, and its errors end nothing."""

from __future__ import annotations

import os
from typing import Any

from torchtitan.components.metrics import BaseLogger, LoggerContainer, WandBLogger
from torchtitan.tools.logging import logger


def guard(metrics_logger: BaseLogger) -> BaseLogger:
    """Make the W&B logger in ``metrics_logger``, if there is one, a harmless one."""
    if isinstance(metrics_logger, LoggerContainer):
        metrics_logger._loggers = [
            GuardedLogger(inner) if isinstance(inner, WandBLogger) else inner
            for inner in metrics_logger._loggers
        ]
    return metrics_logger


class GuardedLogger(BaseLogger):
    """Works around: torchtitan 0.2.2 guards only the start of W&B. An error of a later
    ``wandb.log`` or ``wandb.finish`` (its service process died, a full disk) ends the rank,
    and with it the whole replica group."""

    def __init__(self, inner: WandBLogger) -> None:
        self._inner = inner
        self._failures = 0
        self._try(lambda: self._describe(inner.wandb.run))

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self._try(lambda: self._inner.log(metrics, step))

    def close(self) -> None:
        self._try(self._inner.close)

    def _describe(self, run: Any) -> None:
        """Add to the run's config what torchtitan does not know: where this start of it runs."""
        if run is not None:
            run.config.update({"slurm": place()}, allow_val_change=True)

    def _try(self, call: Any) -> None:
        try:
            call()
        except Exception as error:
            if self._failures == 0:
                logger.warning(f"W&B lacks data from here on ({error!r}); training goes on")
            self._failures += 1


def place() -> dict[str, str]:
    """Job, node and attempt of this process, as far as they are known."""
    names = {
        "job": "SLURM_JOB_ID",
        "array_job": "SLURM_ARRAY_JOB_ID",
        "array_task": "SLURM_ARRAY_TASK_ID",
        "node": "SLURMD_NODENAME",
        "attempt": "TFT_ATTEMPT",
        "config": "TFT_CONFIG",
    }
    return {key: os.environ[name] for key, name in names.items() if name in os.environ}
