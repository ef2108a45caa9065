"""Adapts a torchtitan train spec: what is swapped, and which upstream behaviour each
swap works around. Nothing of torchtitan's code is changed; the spec is registered anew
under its own name, with these functions in place of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torchtitan.protocols.train_spec as train_spec
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.ft.diloco import FaultTolerantTrainSpec, fragment_llm
from torchtitan.components.lr_scheduler import LRSchedulersContainer
from torchtitan.config import TORCH_DTYPE_MAP, JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3.infra.parallelize import apply_fsdp
from torchtitan.tools.utils import device_type

from launcher.train.metrics import build_metrics_processor


def adapt(job_config: JobConfig) -> None:
    """Register the adapted spec for the model that ``job_config`` names."""
    if job_config.experimental.custom_import:
        # The user's own spec must be registered before it can be adapted.
        importlib.import_module(job_config.experimental.custom_import)
    name = job_config.model.name
    spec = train_spec.get_train_spec(name)
    if not hasattr(spec, "fragment_fn"):
        spec = _fragmentable(spec)
    adapted = dataclasses.replace(
        spec,
        parallelize_fn=_parallelize(spec.parallelize_fn),
        build_lr_schedulers_fn=_build_lr_schedulers(spec.build_lr_schedulers_fn),
        build_metrics_processor_fn=build_metrics_processor,
    )
    # register_train_spec refuses a name that is taken; replacing is what is wanted.
    train_spec._extra_train_specs[name] = adapted


def _fragmentable(spec: Any) -> FaultTolerantTrainSpec:
    """Works around: torchtitan 0.2.2 cuts only ``llama3_ft`` into fragments for streaming DiLoCo. Of
    any other model ``num_fragments`` would be left out in silence. Its function knows models of
    embeddings, layers, norm and output, as all of torchtitan's language models are."""
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    return FaultTolerantTrainSpec(**fields, fragment_fn=fragment_llm)


def _parallelize(original: Callable[..., Any]) -> Callable[..., Any]:
    """Works around two upstream behaviours:

    - torchtitan 0.2.2 hangs the cross-replica gradient all-reduce on FSDP modules
      only. A group of one rank has none, so its gradients would never be averaged
      with the other replica groups', in silence. Wrapping the model in FSDP over
      that one rank gives it the hook (and the same bucketing and overlap).
    - FSDP asks gloo for ReduceOp.PREMUL_SUM, which gloo does not have.
    """

    def parallelize(
        model: torch.nn.Module, parallel_dims: ParallelDims, job_config: JobConfig
    ) -> torch.nn.Module:
        model = original(model, parallel_dims, job_config)
        if needs_gradient_hook(parallel_dims, job_config):
            compute_dtype = job_config.training.dtype  # AMP casts; FSDP must not cast again
            apply_fsdp(
                model,
                parallel_dims.world_mesh,
                param_dtype=TORCH_DTYPE_MAP[compute_dtype],
                reduce_dtype=TORCH_DTYPE_MAP[job_config.training.mixed_precision_reduce],
                pp_enabled=False,
            )
        if device_type == "cpu":
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
        return model

    return parallelize


def needs_gradient_hook(parallel_dims: ParallelDims, job_config: JobConfig) -> bool:
    """Whether this layout would leave gradients unaveraged across replica groups.

    Raises:
        ValueError: it would, and wrapping the model cannot mend it (several ranks
            that hold one replica without sharding it).
    """
    ft = job_config.fault_tolerance
    per_step = ft.enable and ft.semi_sync_method is None
    if not per_step or parallel_dims.fsdp_enabled:
        return False
    if parallel_dims.world_size == 1:
        return True
    raise ValueError(
        "per-step fault tolerance averages gradients across replica groups through FSDP, "
        f"and this layout has no FSDP inside its group of {parallel_dims.world_size} ranks "
        f"(data_parallel_shard_degree {parallel_dims.dp_shard}, "
        f"data_parallel_replicate_degree {parallel_dims.dp_replicate}, "
        f"tensor_parallel_degree {parallel_dims.tp}, "
        f"pipeline_parallel_degree {parallel_dims.pp}). "
        "Set --parallelism.data_parallel_shard_degree above 1 (-1 takes all ranks), or use one "
        "rank per replica group; replication is what the replica groups are for."
    )


def _build_lr_schedulers(
    original: Callable[..., LRSchedulersContainer],
) -> Callable[..., LRSchedulersContainer]:
    """Works around: a healed replica's first optimizer step uses the learning rate of
    step 0 (the optimizer state sent to it was cached at start-up), and its weights
    then differ from its peers' for ever. The schedulers are restored last, and know
    the right rate: they write it into the parameter groups.
    """

    def build(*args: Any, **kwargs: Any) -> LRSchedulersContainer:
        container = original(*args, **kwargs)

        def load_state_dict(state_dict: dict[str, Any]) -> None:
            for scheduler in container.schedulers:
                scheduler.load_state_dict(copy.deepcopy(state_dict))
                rates = scheduler.get_last_lr()
                for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate

        container.load_state_dict = load_state_dict  # type: ignore[method-assign]
        return container

    return build
