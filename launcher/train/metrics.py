"""Metrics that mean the same whatever the number of participating replica groups."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ReduceOp
from torchtitan.components.ft import FTManager
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.utils import device_type

from launcher.train import tracking
from launcher.train.own_work import OwnWork
from launcher.train.recorder import Recorder


class ReplicaMetricsProcessor(MetricsProcessor):
    """Averages the reported loss over the participating replica groups.

    Works around: torchtitan 0.2.2 sums it, so that it doubles with two replicas and
    jumps with every loss and recovery. One small all-reduce stands in for upstream's
    three: each group fills its own row, and empty rows are those who took no part.
    """

    ft_manager: FTManager | None = None
    recorder: Recorder | None = None
    own_work: OwnWork | None = None

    def __init__(
        self, job_config: JobConfig, parallel_dims: ParallelDims, tag: str | None = None
    ) -> None:
        tracking.adapt()
        super().__init__(job_config, parallel_dims, tag)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        extra = dict(extra_metrics or {})
        tokens = int(extra.get("n_tokens_seen", 0))
        rows = self._gather([global_avg_loss, global_max_loss, float(tokens)])
        mean_loss = sum(row[0] for row in rows) / len(rows)
        max_loss = max(row[1] for row in rows)
        extra["n_tokens_seen"] = int(sum(row[2] for row in rows))
        tokens_before = self.ntokens_since_last_log
        elapsed_from = self.time_last_log
        own_work = self.own_work
        busy = own_work.take(self.data_loading_times) if own_work is not None else None
        super().log(step, mean_loss, max_loss, grad_norm, extra)
        if self.recorder is not None and self.recorder.rank == 0:
            seconds = self.time_last_log - elapsed_from
            self.recorder.record(
                "metrics",
                titan_step=step,
                step=self._manager_step(step),
                loss=mean_loss,
                local_loss=global_avg_loss,
                grad_norm=grad_norm,
                lr=extra.get("lr"),
                participants=len(rows),
                tokens_per_second=round(tokens_before / seconds, 1) if seconds > 0 else None,
                busy_seconds=None if busy is None else round(busy, 6),
            )

    def _manager_step(self, step: int) -> int:
        if self.ft_manager is None or not self.ft_manager.enabled:
            return step
        return int(self.ft_manager.manager.current_step())

    def _gather(self, row: list[float]) -> list[list[float]]:
        """``row`` of every participating replica group; only our own when the groups
        do not meet at this step (semi-sync training, or an error in it)."""
        ft = self.ft_manager
        if ft is None or not ft.enabled or not ft.use_async_quorum:
            return [row]
        manager = ft.manager
        # A group that takes no part still meets the others, with an empty row: a
        # collective that one side skips would hang the rest.
        mine = torch.zeros(ft.group_size, 1 + len(row), dtype=torch.float64)
        if manager.is_participating():
            mine[ft.replica_id] = torch.tensor([1.0, *row], dtype=torch.float64)
        everyone = mine.to(device_type)
        manager.allreduce(everyone, reduce_op=ReduceOp.SUM).wait()
        if manager.errored():
            return [row]
        # A second copy of a group adds to the same row: the mean of the two is theirs.
        present = [
            [value / entry[0] for value in entry[1:]]
            for entry in everyone.tolist()
            if entry[0] >= 1
        ]
        return present or [row]


def build_metrics_processor(
    job_config: JobConfig,
    parallel_dims: ParallelDims,
    model_args: BaseModelArgs | None = None,
    tag: str | None = None,
) -> ReplicaMetricsProcessor:
    """Stands in for torchtitan's function of the same name, with the same arguments."""
    del model_args
    return ReplicaMetricsProcessor(job_config, parallel_dims, tag)
