"""Looks at a node's GPUs from beside the training, through NVML; silent where there are none.

Runs in the launcher of a replica group, in a thread of its own, and only reports: nothing it
meets can end the training. (Written against nvidia-ml-py and tested with a stand-in for it;
not yet seen on a GPU.)
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

#: Seconds between two samples. Each is a handful of driver calls a GPU.
SAMPLE_EVERY = 15.0

#: Reasons of ``nvmlDeviceGetCurrentClocksEventReasons`` that mean a GPU runs slower than it
#: could, by the bits of NVML's API reference (idling and set limits are left out).
SLOWED = {
    0x0000000000000008: "hardware slowdown",
    0x0000000000000020: "software thermal slowdown",
    0x0000000000000040: "hardware thermal slowdown",
    0x0000000000000080: "power brake",
}


class GpuSampler:
    """Samples every GPU of this node until it is stopped.

    ``record(kind, **fields)`` gets ``gpu`` events (``gpu`` index, ``celsius``, ``slowed``: list of
    reasons, ``ecc``: uncorrected errors since the driver was loaded) and ``xid`` events (``gpu``,
    ``xid``: the driver's error number).
    """

    def __init__(self, record: Callable[..., None], nvml: Any = None) -> None:
        self._record = record
        self._nvml = nvml
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpus", daemon=True)

    def __enter__(self) -> GpuSampler:
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        self._stop.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        # A driver that is missing, old or dying answers with errors of many kinds.
        with contextlib.suppress(Exception):
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            try:
                self._watch()
            finally:
                self._nvml.nvmlShutdown()

    def _watch(self) -> None:
        nvml = self._nvml
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        errors = nvml.nvmlEventSetCreate()
        for handle in handles:
            with contextlib.suppress(Exception):  # not every GPU tells of Xid errors
                nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, errors)
        while True:
            for index, handle in enumerate(handles):
                self._record("gpu", gpu=index, **self._sample(handle))
            self._tell_xids(errors, handles)
            if self._stop.wait(SAMPLE_EVERY):
                return

    def _sample(self, handle: Any) -> dict[str, Any]:
        nvml, sample = self._nvml, dict[str, Any]()
        with contextlib.suppress(Exception):
            sample["celsius"] = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        with contextlib.suppress(Exception):
            reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
            sample["slowed"] = [name for bit, name in SLOWED.items() if reasons & bit]
        with contextlib.suppress(Exception):
            sample["ecc"] = nvml.nvmlDeviceGetTotalEccErrors(
                handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
            )
        return sample

    def _tell_xids(self, errors: Any, handles: list[Any]) -> None:
        nvml = self._nvml
        for _ in range(64):
            try:
                event = nvml.nvmlEventSetWait_v2(errors, 0)
            except Exception:
                return  # a timeout: nothing (more) happened
            index = next((i for i, handle in enumerate(handles) if _same(handle, event.device)), -1)
            self._record("xid", gpu=index, xid=int(event.eventData))


def _same(one: Any, other: Any) -> bool:
    return bool(getattr(one, "value", one) == getattr(other, "value", other))


def capability(nvml: Any = None) -> tuple[int, int] | None:
    """Lowest CUDA compute capability of this node's GPUs; None when NVML does not tell."""
    try:
        if nvml is None:
            import pynvml

            nvml = pynvml
        nvml.nvmlInit()
        try:
            handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            found = [tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)) for handle in handles]
        finally:
            nvml.nvmlShutdown()
    except Exception:  # a driver that is missing, old or dying answers with errors of many kinds
        return None
    return min(found, default=None)
