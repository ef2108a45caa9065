"""Lets torchtitan train on CPU; on a GPU it changes nothing."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from typing import Any

import torch


class DeviceError(Exception):
    """The device that was asked for is not to be had on this node."""


def prepare(kind: str) -> None:
    """Settle on ``"cuda"`` or ``"cpu"`` before torchtitan is imported.

    Raises:
        DeviceError: as ``require``.
    """
    require(kind)
    if kind == "cpu":
        _present_cpu_as_accelerator()


def require(kind: str) -> None:
    """Check that ``"cuda"`` or ``"cpu"`` is to be had.

    Raises:
        DeviceError: ``kind`` is neither of the two, or CUDA sees no device. A
            node whose driver is gone must not train on its CPUs in silence.
    """
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(
                "no CUDA device is visible on this node (driver, GRES or CUDA_VISIBLE_DEVICES); "
                "set TFT_DEVICE=cpu to train on CPU on purpose"
            )
    elif kind != "cpu":
        raise DeviceError(f"TFT_DEVICE must be 'cuda' or 'cpu', not {kind!r}")


def _present_cpu_as_accelerator() -> None:
    """Works around: torchtitan 0.2.2 falls back to "cuda" when no accelerator is
    found, and asks of the device module what ``torch.cpu`` lacks."""
    torch._utils._get_available_device_type = lambda: "cpu"

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    missing: dict[str, Any] = {
        "get_device_name": lambda device=None: "cpu",
        "get_device_properties": lambda device=None: types.SimpleNamespace(total_memory=memory),
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_stats": lambda device=None: {},
    }
    for name, function in missing.items():
        if not hasattr(torch.cpu, name):
            setattr(torch.cpu, name, function)
    # torch.cpu.current_device() answers "cpu"; barrier(device_ids=[…]) wants an int.
    torch.cpu.current_device = lambda: 0  # type: ignore[assignment, return-value]

    if importlib.util.find_spec("triton") is None:
        sys.modules["torchtitan.models.moe.kernels"] = _moe_kernels_stand_in()


def _moe_kernels_stand_in() -> types.ModuleType:
    """Works around: torchtitan 0.2.2 imports its mixture-of-experts triton kernels
    for every model, and triton has no CPU build."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("mixture-of-experts models need triton, which has no CPU build")

    module = types.ModuleType("torchtitan.models.moe.kernels")
    vars(module)["generate_permute_indices"] = refuse
    return module
