"""What the doctor thinks of a training configuration: timeouts, and what spoils healing. Pure.

What is said of torchtitan was read in the source of 0.2.2 (``components/checkpoint.py``,
``components/ft/manager.py``). A replica group that was lost heals from its peers with checkpoints
on or off; but with them on it first does what every start does: it loads one. Whatever breaks that
load keeps it from ever coming back.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launcher import timeouts
from launcher.checks import Result, failed, passed, warning
from launcher.titan import setting, switch


def timeouts_order(
    settings: dict[str, Any], extra: Sequence[str], quorum_timeout: float
) -> Iterator[Result]:
    """Each layer must give up before the next one out (launcher/timeouts.py)."""
    sections = {
        "init_timeout_seconds": "comm",
        "train_timeout_seconds": "comm",
        "process_group_timeout_ms": "fault_tolerance",
    }
    known = {name: setting(settings, extra, part, name) for name, part in sections.items()}
    remedy = "set them in the config file or TFT_EXTRA_ARGS in this order (docs/recovery.md)"
    try:
        found = list(timeouts.problems(known, quorum_timeout))
    except (TypeError, ValueError) as error:
        found = [f"one is not a number: {error}"]
    for problem in found:
        yield failed("order of timeouts", problem, remedy)
    if not found:
        yield passed(
            "order of timeouts",
            " < ".join(
                [f"{name} {known[name]}" for name in reversed(sections) if known[name] is not None]
            )
            + f"; quorum {quorum_timeout:g} s",
        )


def healing(
    settings: dict[str, Any],
    extra: Sequence[str],
    device: str,
    is_folder: Callable[[str], bool] = os.path.isdir,
) -> Iterator[Result]:
    """Settings with which a lost replica group cannot come back, or comes back wrong."""
    on = bool(switch(settings, extra, "checkpoint", "enable"))
    found = [
        *_never_back(settings, extra, on),
        *_initial_load(settings, extra, on, is_folder),
        *_costs(settings, extra, on),
        *_between_groups(settings, extra, device),
    ]
    yield from found
    if not found:
        yield passed(
            "healing",
            f"a lost group heals from its peers; checkpoints are {'on' if on else 'off'}"
            + ("" if on else " (losing all groups at once loses the run)"),
        )


def _never_back(settings: dict[str, Any], extra: Sequence[str], on: bool) -> Iterator[Result]:
    def get(key: str) -> Any:
        return setting(settings, extra, "checkpoint", key)

    if switch(settings, extra, "checkpoint", "create_seed_checkpoint"):
        yield failed(
            "healing",
            "checkpoint.create_seed_checkpoint: ranks write a checkpoint and end, without training",
            "leave it out of a run; make the seed in a job of one rank, without fault tolerance",
        )
    keep = get("keep_latest_k")
    if keep is not None and str(keep) == "1":
        yield failed(
            "healing",
            "checkpoint.keep_latest_k is 1: torchtitan refuses it, with checkpoints off as well",
            "set it to 2 or more, or to 0 to keep all",
        )
    if not on:
        return
    step = get("load_step")
    if step is not None and str(step) != "-1":
        yield failed(
            "healing",
            f"checkpoint.load_step is {step}: a group that starts again looks for that step in the "
            "run's own checkpoints, and dies where it is not there (any more)",
            "leave load_step out; start from another run's checkpoint by checkpoint.initial_load_path",
        )
    left_out = get("exclude_from_loading") or []
    names = left_out.split(",") if isinstance(left_out, str) else list(left_out)
    dataloader = switch(settings, extra, "checkpoint", "enable_ft_dataloader_checkpoints")
    if "dataloader" in [str(name).strip() for name in names] and dataloader is not False:
        yield failed(
            "healing",
            "checkpoint.exclude_from_loading names 'dataloader': a group that starts again dies of a "
            "KeyError while it loads (torchtitan leaves it out itself)",
            "take 'dataloader' out of the list",
        )
    if dataloader is False:
        yield failed(
            "healing",
            "checkpoint.enable_ft_dataloader_checkpoints is off: every replica group writes the whole "
            "checkpoint into one folder at once, over the others' files",
            "leave it on, or turn checkpoints off",
        )


def _initial_load(
    settings: dict[str, Any],
    extra: Sequence[str],
    on: bool,
    is_folder: Callable[[str], bool],
) -> Iterator[Result]:
    path = setting(settings, extra, "checkpoint", "initial_load_path")
    from_hub = bool(switch(settings, extra, "checkpoint", "initial_load_in_hf"))
    name = "initial_load_path" if path else "initial_load_in_hf"
    if not path and not from_hub:
        return
    if not on:
        yield failed(
            "initial weights",
            f"checkpoint.{name} is set and checkpoint.enable is not: torchtitan ignores it without a "
            "word, and trains from random weights",
            'TFT_EXTRA_ARGS="--checkpoint.enable", or leave it out',
        )
        return
    if path and not is_folder(str(path)):
        yield failed(
            "initial weights",
            f"checkpoint.initial_load_path {path} is not a folder (from here)",
            "name the folder of one step on the shared file system, e.g. …/checkpoint/step-500",
        )
    if from_hub and switch(settings, extra, "checkpoint", "initial_load_model_only") is False:
        yield failed(
            "initial weights",
            "checkpoint.initial_load_in_hf with initial_load_model_only off: torchtitan refuses it",
            "leave initial_load_model_only on",
        )


def _costs(settings: dict[str, Any], extra: Sequence[str], on: bool) -> Iterator[Result]:
    if (
        switch(settings, extra, "checkpoint", "enable_ft_dataloader_checkpoints") is False
        and not on
    ):
        yield warning(
            "healing",
            "checkpoint.enable_ft_dataloader_checkpoints is off: a group that starts again reads its "
            "data from the beginning",
            "leave it on",
        )
    if not on:
        return
    if switch(settings, extra, "checkpoint", "load_only"):
        yield warning(
            "checkpoints",
            "checkpoint.load_only: none is written, and losing all groups at once loses the run",
            "leave it out",
        )
    if switch(settings, extra, "checkpoint", "last_save_model_only") is not False:
        yield warning(
            "checkpoints",
            "checkpoint.last_save_model_only is on (torchtitan's default): the last checkpoint has no "
            "optimizer, and the run cannot be made longer later",
            "set it to false",
        )
    mode = setting(settings, extra, "checkpoint", "async_mode")
    if (mode or "disabled") == "disabled":
        yield warning(
            "checkpoints",
            "checkpoint.async_mode is disabled: one group writes while the others wait for it, for "
            "process_group_timeout_ms at most, and then lose a commit",
            'set it to "async"',
        )


def _between_groups(
    settings: dict[str, Any], extra: Sequence[str], device: str
) -> Iterator[Result]:
    group = setting(settings, extra, "fault_tolerance", "process_group") or "gloo"
    if group == "nccl" and device == "cpu":
        yield failed(
            "process group",
            "fault_tolerance.process_group is nccl, and TFT_DEVICE=cpu",
            'set it to "gloo", or TFT_DEVICE=cuda',
        )
    if group == "gloo" and device == "cuda":
        yield warning(
            "process group",
            "fault_tolerance.process_group is gloo: gradients between groups go through host memory",
            'set it to "nccl"',
        )
    least = setting(settings, extra, "fault_tolerance", "min_replica_size")
    if str(least or 1).isdigit() and int(least or 1) > 1:
        yield warning(
            "replica groups",
            f"fault_tolerance.min_replica_size is {least}: with fewer groups nobody commits a step",
            "set it to 1 to train on with the last one; `lighthouse up --min-replicas` is the same",
        )
    replicate = setting(settings, extra, "parallelism", "data_parallel_replicate_degree")
    if str(replicate or 1) != "1":
        yield warning(
            "replica groups",
            f"parallelism.data_parallel_replicate_degree is {replicate}; with fault tolerance "
            "torchtitan expects 1, since the groups are the replicas",
            "set it to 1",
        )
