"""GPU samples and what follows from them, with a stand-in for NVML (no GPU here)."""

from __future__ import annotations

import threading
import types
from typing import Any

from launcher.events import Event
from launcher.findings import Snapshot, judge
from launcher.gpus import GpuSampler
from launcher.state import RunState


class Nvml:
    """Answers what a node of four GPUs would; GPU 2 is hot, slowed, and reports an Xid."""

    NVML_TEMPERATURE_GPU = NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 0
    nvmlEventTypeXidCriticalError = 8

    def __init__(self) -> None:
        self.xids = [79]
        self.sampled = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None  # nvmlInit, nvmlShutdown, registering

    def nvmlDeviceGetCount(self) -> int:
        return 4

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetTemperature(self, handle: int, kind: int) -> int:
        return 84 if handle == 2 else 60 + handle

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return 0x40 | 0x1 if handle == 2 else 0x1

    def nvmlDeviceGetTotalEccErrors(self, handle: int, *kinds: int) -> int:
        if handle == 3:
            raise RuntimeError("not supported")
        return 5

    def nvmlEventSetWait_v2(self, errors: Any, milliseconds: int) -> Any:
        if not self.xids:
            self.sampled.set()
            raise TimeoutError
        return types.SimpleNamespace(device=2, eventData=self.xids.pop())


def sampled() -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    nvml = Nvml()
    with GpuSampler(lambda kind, **fields: found.append((kind, fields)), nvml):
        assert nvml.sampled.wait(5)
    return found


def test_every_gpu_is_sampled_and_errors_are_told() -> None:
    found = sampled()
    assert found[2] == (
        "gpu",
        {"gpu": 2, "celsius": 84, "slowed": ["hardware thermal slowdown"], "ecc": 5},
    )
    assert found[3] == ("gpu", {"gpu": 3, "celsius": 63, "slowed": []})
    assert found[4] == ("xid", {"gpu": 2, "xid": 79})


def test_a_node_without_nvml_is_silent() -> None:
    class Broken:
        def nvmlInit(self) -> None:
            raise OSError("no driver")

    found: list[str] = []
    with GpuSampler(lambda kind, **fields: found.append(kind), Broken()) as sampler:
        sampler._thread.join(5)
    assert found == []


def test_what_follows_for_the_one_who_watches() -> None:
    state = RunState(1)
    launch = {"attempt": 1, "host": "w-3", "nodes": ["w-3", "w-4"]}
    state.apply(Event(t=1.0, kind="launch", replica=0, fields=launch))
    for kind, fields in sampled():
        state.apply(Event(t=2.0, kind=kind, replica=0, fields=fields))
    more = {"gpu": 0, "celsius": 60, "slowed": [], "ecc": 7}
    state.apply(Event(t=3.0, kind="gpu", replica=0, fields=more))
    found = {finding.kind: finding for finding in judge(Snapshot(state=state, now=4.0))}
    assert set(found) == {"gpu_xid", "gpu_ecc", "gpu_throttled", "gpu_hot"}
    assert "Xid 79 on GPU 2 of w-3" in found["gpu_xid"].message
    assert found["gpu_ecc"].message.startswith("2 uncorrected memory errors on GPU 0 of w-3")
    assert "84 degrees, its peers 63" in found["gpu_hot"].message
    # On another node of the group the same index is another GPU.
    other = {"gpu": 0, "host": "w-4", "celsius": 60, "slowed": [], "ecc": 90}
    for kind, fields in (("gpu", other), ("xid", {"gpu": 0, "host": "w-4", "xid": 48})):
        state.apply(Event(t=3.5, kind=kind, replica=0, fields=fields))
    found = {finding.kind: finding for finding in judge(Snapshot(state=state, now=4.0))}
    assert found["gpu_ecc"].message.startswith("2 uncorrected memory errors on GPU 0 of w-3")
    assert "Xid 48 on GPU 0 of w-4 (replica 0)" in found["gpu_xid"].message
    assert "NodeName=w-4 State=DRAIN" in found["gpu_xid"].message
    later = Snapshot(state=state, now=4000.0)
    assert "gpu_xid" not in {finding.kind for finding in judge(later)}
