"""What one step trains on: batch sizes, and how ranks share them. Pure.

Of torchtitan 0.2.2 (``experiments/ft/train.py``, ``FTManager.get_dp_info``): the data is split over
all replica groups of the run, those too that are away, and ``training.global_batch_size`` counts
samples of one step over all of them::

    accumulation = global_batch_size / (local_batch_size x data-parallel ranks of a group x groups)

A group that is lost takes its share of the batch with it until it is back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.titan import whole

#: Defaults of torchtitan 0.2.2 (``config/job_config.py``).
LOCAL_BATCH_SIZE, SEQ_LEN = 8, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the ranks of a replica group work together; the degrees of ``parallelism``."""

    ranks: int
    replicate: int
    shard: int
    context: int
    tensor: int
    pipeline: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], flags: Sequence[str], ranks: int) -> Layout:
        """The layout of a group of ``ranks``, with what torchtitan fills in for -1.

        Raises:
            ValueError: a degree is not a whole number.
        """
        names = (
            "data_parallel_replicate",
            "context_parallel",
            "tensor_parallel",
            "pipeline_parallel",
        )
        replicate, context, tensor, pipeline = (
            whole(settings, flags, "parallelism", f"{name}_degree", 1) for name in names
        )
        shard = whole(settings, flags, "parallelism", "data_parallel_shard_degree", -1)
        if shard == -1:
            shard = ranks // max(1, replicate * context * tensor * pipeline)
        return cls(
            ranks=ranks,
            replicate=replicate,
            shard=shard,
            context=context,
            tensor=tensor,
            pipeline=pipeline,
        )

    @property
    def data_parallel(self) -> int:
        """Ranks of a group that read different data."""
        return self.replicate * self.shard

    @property
    def sharded(self) -> bool:
        """Whether torchtitan wraps the model in FSDP."""
        return self.shard > 1 or self.context > 1

    def problems(self) -> Iterator[str]:
        """What torchtitan would refuse."""
        degrees = (self.replicate, self.shard, self.context, self.tensor, self.pipeline)
        product = 1
        for degree in degrees:
            product *= degree
        if min(degrees) < 1 or product != self.ranks:
            yield (
                f"a replica group has {self.ranks} ranks, and parallelism asks for replicate "
                f"{self.replicate} x shard {self.shard} x context {self.context} x tensor "
                f"{self.tensor} x pipeline {self.pipeline} = {product}: "
                "data_parallel_shard_degree = -1 takes all that are left"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Samples and tokens of one step of a run with all its replica groups."""

    local: int
    """Samples of one rank's forward (``training.local_batch_size``)."""
    accumulation: int
    """Forwards of a rank in one step."""
    readers: int
    """Ranks of a group that read different data."""
    groups: int
    seq_len: int

    @property
    def rank(self) -> int:
        """Samples of one rank in one step."""
        return self.local * self.accumulation

    @property
    def group(self) -> int:
        """Samples of one replica group in one step."""
        return self.rank * self.readers

    @property
    def whole(self) -> int:
        """Samples of all replica groups in one step (``training.global_batch_size``)."""
        return self.group * self.groups

    @property
    def tokens(self) -> int:
        """Tokens of all replica groups in one step."""
        return self.whole * self.seq_len

    def line(self) -> str:
        """One line for a person."""
        times = "once" if self.accumulation == 1 else f"{self.accumulation} times"
        return (
            f"batch: {self.local} a rank, {times} a step; {self.group} a replica group "
            f"({self.readers} data-parallel rank{'s' * (self.readers > 1)}); {self.whole} a step over "
            f"{self.groups} groups = {self.tokens:,} tokens"
        )


def batches(
    settings: Mapping[str, Any], flags: Sequence[str], layout: Layout, groups: int
) -> Batches:
    """Batch sizes of a run.

    Args:
        groups: replica groups that the run was submitted with.

    Raises:
        ValueError: they do not come out even, or are not numbers; says how to mend it.
    """
    local = whole(settings, flags, "training", "local_batch_size", LOCAL_BATCH_SIZE)
    seq_len = whole(settings, flags, "training", "seq_len", SEQ_LEN)
    if local < 1:
        raise ValueError(f"training.local_batch_size must be at least 1, not {local}")
    once = local * layout.data_parallel * groups
    wanted = whole(settings, flags, "training", "global_batch_size", -1)
    if wanted < 0:
        wanted = once
    if wanted == 0 or wanted % max(1, once):
        near = max(1, round(wanted / max(1, once))) * once
        raise ValueError(
            f"training.global_batch_size ({wanted}) counts samples of a step over all replica groups, "
            f"and must be a multiple of local_batch_size {local} x {layout.data_parallel} data-parallel "
            f"ranks x {groups} groups = {once}: {near}, for example"
        )
    return Batches(
        local=local,
        accumulation=wanted // once,
        readers=layout.data_parallel,
        groups=groups,
        seq_len=seq_len,
    )
