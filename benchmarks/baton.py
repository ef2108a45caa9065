"""Lets several trainings share a machine by turns: only the one with the baton takes steps.

Imported by torchtitan in each of them (``--experimental.custom_import benchmarks.baton``). Every few
steps the rank tells how long they took, in seconds and in CPU seconds, and waits for its next turn.
"""

from __future__ import annotations

import json
import os
import socket
import time

from torchtitan.train import Trainer

#: Where the benchmark listens, and which of its trainings this is.
PLACE, NAME = "BENCH_BATON", "BENCH_NAME"


class Baton:
    """One rank's side."""

    def __init__(self) -> None:
        self._left = 0
        self._steps = 0
        self._began = (0.0, 0.0)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(os.environ[PLACE])
        self._file = self._socket.makefile("rw")
        self._say(name=os.environ[NAME])

    def _say(self, **words: object) -> None:
        self._file.write(json.dumps(words) + "\n")
        self._file.flush()

    def step(self) -> bool:
        """Between two steps; False when it is enough."""
        if self._left == 0:
            if self._steps:
                wall, cpu = (a - b for a, b in zip(_now(), self._began, strict=True))
                self._say(wall=wall / self._steps, cpu=cpu / self._steps)
            self._left = self._steps = int(self._file.readline() or "0")
            if not self._left:
                return False
            self._began = _now()
        self._left -= 1
        return True


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


if PLACE in os.environ:
    _baton = Baton()
    # torchtitan asks it once before every step, whatever the trainer.
    Trainer.should_continue_training = lambda self: _baton.step()
