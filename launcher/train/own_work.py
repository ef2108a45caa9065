"""How long a rank works itself in a step, without what it waits for in others.

With a sync at every step all replica groups have the same step time: the fast ones wait for the
slowest in the all-reduce. torchft waits for quorum and gradients in backward and in the optimizer,
never in the forward: data loading plus forward is what a group does by itself, and tells which one
the others wait for.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

import torch

#: Forwards whose end the device has not reported yet; more are never waited for.
MOST_PENDING = 256


class OwnWork:
    """Measures data loading and forward; costs two time stamps a forward, and no synchronisation."""

    def __init__(self, model_parts: Iterable[torch.nn.Module], device: torch.device) -> None:
        # On a device the forward is over on the host long before it is done: events in its
        # stream tell, and are read when they have passed by themselves.
        self._device = None if device.type == "cpu" else torch.get_device_module(device)
        self._start: Any = None
        self._pending: deque[tuple[Any, Any]] = deque(maxlen=MOST_PENDING)
        self._begun = self._warm = False
        self._skipped_loads = 0
        self._reset()
        for part in model_parts:
            part.register_forward_pre_hook(self._before, prepend=True)
            part.register_forward_hook(self._after)

    def _reset(self) -> None:
        self._steps = self._forwards = self._measured = 0
        self._seconds = 0.0

    def step(self, loads: Sequence[float]) -> None:
        """A step begins.

        Args:
            loads: seconds of each data loading since the last log, as torchtitan counts them.
        """
        if self._begun and not self._warm:
            # The first step compiles, allocates and starts the loader: no measure of a node.
            self._reset()
            self._pending.clear()
            self._warm, self._skipped_loads = True, len(loads)
        self._begun = True
        self._steps += 1

    def take(self, loads: Sequence[float]) -> float | None:
        """Mean seconds of own work a step since the last call; None before it was measured."""
        if not self._warm:
            return None
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.popleft()
            self._add(start.elapsed_time(end) / 1000)
        loaded = sum(loads[self._skipped_loads :])
        steps, forwards, measured, seconds = (
            self._steps,
            self._forwards,
            self._measured,
            self._seconds,
        )
        self._reset()
        self._skipped_loads = 0
        if not steps or not measured:
            return None
        return seconds / measured * forwards / steps + loaded / steps

    def _add(self, seconds: float) -> None:
        self._seconds += seconds
        self._measured += 1

    def _stamp(self) -> Any:
        if self._device is None:
            return time.perf_counter()
        event = self._device.Event(enable_timing=True)
        event.record()
        return event

    def _before(self, module: torch.nn.Module, args: Any) -> None:
        if module.training:  # a forward of a validation is no part of the step
            self._start = self._stamp()

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if not module.training or self._start is None:
            return
        start, self._start, end = self._start, None, self._stamp()
        self._forwards += 1
        if self._device is None:
            self._add(end - start)
        else:
            self._pending.append((start, end))
