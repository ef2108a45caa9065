"""torchft's manager in a script of the user's own: known by name, telling of heals.

The trainer of this kit does the same through torchtitan's classes.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torchft
import torchft.manager

from launcher.train.departure import Departure
from launcher.train.recorder import TORCHFT_LOGGERS, Recorder

#: Name of a script's replica groups in the quorum, before torchft's own part; also in
#: ``launcher/inject.py``, for drills.
NAME = "replica_{replica}"
#: Seconds after its first step in which a restarted replica group looks whether its peers have
#: finished meanwhile, as in the trainer.
TOO_LATE_SECONDS = 60.0
_SIGNATURE = inspect.signature(torchft.manager.Manager.__init__)


class ReplicaManager(torchft.manager.Manager):
    """A ``torchft.Manager`` that the monitor can follow.

    - The group is named by the kit, whatever ``replica_id`` the script passes: the monitor, the
      drills and a spare that takes the group over must know it.
    - Who healed, from whom and at which step is recorded: torchft has no structured record of it.
    - A restarted group whose peers have finished meanwhile ends: with nobody to heal from, it would
      train alone from the beginning.
    """

    recorder = Recorder(None, replica=0, rank=0, attempt=1)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = _SIGNATURE.bind(self, *args, **kwargs)
        given.arguments["replica_id"] = NAME.format(replica=self.recorder.replica)
        self._told_of_heals = self._healed = False
        self._started = self._step_began = 0.0
        self._looks = 0
        self._departure = Departure()
        self._may_be_too_late = int(os.environ.get("TFT_ATTEMPT") or "1") > 1
        self._pace = float(os.environ.get("TFT_MIN_STEP_SECONDS") or "0")
        super().__init__(*given.args[1:], **given.kwargs)
        for name in TORCHFT_LOGGERS:
            # ``logging.config`` disables every logger that it does not name.
            logging.getLogger(name).disabled = False

    def register_state_dict_fn(
        self, key: str, load_state_dict: Callable[[Any], None], state_dict: Callable[[], Any]
    ) -> None:
        super().register_state_dict_fn(key, load_state_dict, state_dict)
        if not self._told_of_heals:
            # Rides along with torchft's own state transfer. Not before the script's own: torchft
            # says so when a script has registered none.
            self._told_of_heals = True
            super().register_state_dict_fn("tft", self._on_heal, self._heal_note)

    def start_quorum(self, *args: Any, **kwargs: Any) -> None:
        if not self._started:
            self._started = time.monotonic()
            self.recorder.record("ready")
        if self._may_be_too_late:
            self._stop_if_too_late()
        self._departure.leave_if_due(self.current_step(), self.recorder)
        time.sleep(max(0.0, self._step_began + self._pace - time.monotonic()))
        self._step_began = time.monotonic()
        super().start_quorum(*args, **kwargs)

    def _heal_note(self) -> dict[str, int]:
        return {"replica": self.recorder.replica}

    def _on_heal(self, note: dict[str, int]) -> None:
        self._healed = self.current_step() > 0
        self.recorder.record("heal", step=self.current_step(), source=note["replica"])

    def _stop_if_too_late(self) -> None:
        """Rank 0 looks and the others ask it: they must agree, also on when to look no more."""
        self._looks += 1
        key = f"tft/too_late/{self._looks}"
        if self._group_rank == 0:
            answer = "look again"
            if self._healed or time.monotonic() - self._started > TOO_LATE_SECONDS:
                answer = "go on"
            elif os.path.exists(os.environ.get("TFT_FINISHED", "")):
                answer = "end"
            self._store.set(key, answer)
        answer = self._store.get(key).decode()
        self._may_be_too_late = answer == "look again"
        if answer == "end":
            print("the run finished while this replica group was starting: nothing is left")
            sys.exit(0)


def adapt(recorder: Recorder) -> None:
    """Have scripts find ``ReplicaManager`` where torchft keeps its ``Manager``."""
    ReplicaManager.recorder = recorder
    torchft.manager.Manager = torchft.Manager = ReplicaManager
