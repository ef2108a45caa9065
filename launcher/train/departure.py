"""When the ranks of a replica group leave a run that goes on, as ``launcher/leaving.py`` tells them."""

from __future__ import annotations

import contextlib
import os
import sys
import time

from launcher.train.recorder import Recorder

#: Seconds between two looks.
LOOK_SECONDS = 0.5


class Departure:
    """The step at which this rank leaves; far enough ahead for all ranks to have read it."""

    def __init__(self) -> None:
        self._at, self._looked = sys.maxsize, 0.0

    def leave_if_due(self, step: int, recorder: Recorder) -> None:
        """End this process, between two steps, when its group is to leave.

        Args:
            step: the manager's.

        Raises:
            SystemExit: it is.
        """
        if self._at == sys.maxsize and time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked, path = time.monotonic(), os.environ.get("TFT_LEAVE", "")
            with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
                self._at = int(file.read())
        if step >= self._at:
            recorder.record("leave", step=step)
            print(f"leaves the run at step {step}, as it was told to", flush=True)
            sys.exit(0)
