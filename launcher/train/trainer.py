"""torchtitan's fault-tolerant trainer, with what this kit corrects and records."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torchtitan.experiments.ft.train as ft_train
from torchtitan.components.ft import FTManager
from torchtitan.config import ConfigManager, JobConfig
from torchtitan.distributed import utils as dist_utils
from torchtitan.tools.logging import logger

from launcher.train import data, reconfigure, semi_sync, spec
from launcher.train.checkpoint import ReplicaCheckpointManager
from launcher.train.departure import Departure
from launcher.train.metrics import ReplicaMetricsProcessor
from launcher.train.own_work import OwnWork
from launcher.train.recorder import Recorder
from launcher.train.semi_sync import Pace, SemiSync
from launcher.train.weights import weight_hash

#: Seconds after its start in which a restarted replica group looks whether its peers have
#: finished meanwhile (they may need a moment to say so).
TOO_LATE_SECONDS = 60.0
#: Seconds from a group's last heartbeat until its launcher has said that it finished (2 s of sleep
#: in torchtitan, and the end of its processes), and looks in that time.
FINISHING_SECONDS, FINISHING_LOOKS = 10.0, 20


class ReplicaFTManager(FTManager):
    """Keeps torchtitan from summing the loss over replica groups; our metrics
    processor averages it (see ``ReplicaMetricsProcessor``)."""

    semi_sync: SemiSync | None = None
    """The method of groups that train by themselves between two syncs."""

    on_step: Callable[[], None] = staticmethod(lambda: None)
    """Called then after each step of the optimizer, before a sync."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.enabled:
            reconfigure.adapt(self.manager)

    @property
    def loss_sync_pg(self) -> None:
        return None


class ReplicaTrainer(ft_train.FTTrainer):
    """One rank of a replica group (or of a classic job, with fault tolerance off)."""

    metrics_processor: ReplicaMetricsProcessor
    begun = 0.0
    """When this process began, Unix seconds, before its imports."""

    def __init__(self, job_config: JobConfig) -> None:
        self._recorder = Recorder.from_environment()
        self._recorder.attach_to_torchft()
        self._recorder.record("start", pid=os.getpid(), begun=round(self.begun, 3))
        # Semi-sync groups meet seldom: every sync is worth a hash.
        usual = 1 if job_config.fault_tolerance.semi_sync_method else job_config.metrics.log_freq
        self._hash_every = int(os.environ.get("TFT_WEIGHT_HASH_EVERY") or "0") or usual
        self._pace = float(os.environ.get("TFT_MIN_STEP_SECONDS") or "0")
        self._timeout_reduced = False
        self._hashed_step = -1
        self._joined = False
        self._may_be_too_late = int(os.environ.get("TFT_ATTEMPT") or "1") > 1
        self._departure = Departure()
        spec.adapt(job_config)
        data.register()
        super().__init__(job_config)
        self.metrics_processor.ft_manager = self.ft_manager
        self.metrics_processor.recorder = self._recorder
        self._own_work = OwnWork(self.model_parts, self.device)
        self.metrics_processor.own_work = self._own_work
        if self._manager is not None:
            # Rides along with torchft's own state transfer: the healed side learns of it.
            self._manager.register_state_dict_fn("tft", self._on_heal, self._heal_note)
        self._say_when_busy()
        self._ready_at = time.monotonic()
        self._recorder.record("ready")

    @property
    def _manager(self) -> Any:
        ft_manager = self.ft_manager
        return ft_manager.manager if ft_manager is not None and ft_manager.enabled else None

    def train_step(
        self, data_iterator: Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]
    ) -> None:
        if not self._join():
            return
        started = time.monotonic()
        self._stop_if_too_late()
        if self._manager is not None:
            self._departure.leave_if_due(self._manager.current_step(), self._recorder)
        self._own_work.step(self.metrics_processor.data_loading_times)
        super().train_step(data_iterator)
        self._record_weights()
        self._reduce_timeout_after_heal()
        if self._pace:
            time.sleep(max(0.0, self._pace - (time.monotonic() - started)))

    def _join(self) -> bool:
        """Meet the other groups before the first step, where they do not meet at every one; False
        when the others had come to the last step."""
        method = getattr(self.ft_manager, "semi_sync", None)
        if self._joined or method is None:
            return True
        self._joined = True
        if self._recorder.rank == 0:
            timeout = float(os.environ.get("TORCHFT_QUORUM_TIMEOUT_SEC") or "60")
            pace = Pace(self._recorder.record, timeout)
            self.ft_manager.on_step = lambda: pace.step(self.step, method.every)
            pace.joining()
        healed = method.join(self._stop_if_waited_for_nobody)
        self._ready_at = time.monotonic()
        self._record_weights()
        if healed:
            self.lr_schedulers.step()
            if self.step >= self.job_config.training.steps:
                return False
            self.step += 1
        return True

    def _say_when_busy(self) -> None:
        """Tell of what takes long and makes peers wait, so that it is not taken for a hang."""
        self.checkpointer.busy = self._busy
        if self.job_config.validation.enable:
            validate = self.validator.validate

            def validate_busily(*args: Any, **kwargs: Any) -> None:
                self._busy("validation")
                validate(*args, **kwargs)
                self._busy("")

            self.validator.validate = validate_busily

    def _busy(self, what: str) -> None:
        if self._recorder.rank == 0:
            self._recorder.record("busy", what=what)

    def close(self) -> None:
        self._recorder.record("end", titan_step=getattr(self, "step", None))
        super().close()

    def _stop_if_too_late(self) -> None:
        """End a restarted replica group whose peers finished while it was starting: with
        nobody to heal from, it would train alone from the beginning."""
        if not self._may_be_too_late:
            return
        finished = os.environ.get("TFT_FINISHED", "")
        if time.monotonic() - self._ready_at > TOO_LATE_SECONDS or not finished:
            self._may_be_too_late = False
            return
        seen = torch.tensor(float(os.path.exists(finished)), device=self.device)
        torch.distributed.all_reduce(seen)  # the ranks must agree, and may look at other times
        if seen.item() > 0:
            logger.info("the run finished while this replica group was starting: nothing is left")
            sys.exit(0)

    def _stop_if_waited_for_nobody(self) -> None:
        """The same after a wait for the others, which may have ended because they have finished
        just now: their launchers say so when their processes have ended."""
        for _ in range(FINISHING_LOOKS if self._may_be_too_late else 0):  # all ranks look as often
            self._ready_at = time.monotonic()
            self._stop_if_too_late()
            time.sleep(FINISHING_SECONDS / FINISHING_LOOKS)

    def _record_weights(self) -> None:
        """Log the hash of this rank's weights with the manager's step, the only step
        count by which replica groups can be compared (torchtitan's advances on failed
        commits too)."""
        manager = self._manager
        step = self.step if manager is None else manager.current_step()
        if step % self._hash_every == 0 and step != self._hashed_step and step > 0:
            self._hashed_step = step
            method = getattr(self.ft_manager, "semi_sync", None)
            parameters = (p for part in self.model_parts for p in part.parameters())
            try:
                weights = parameters if method is None else method.shared(self.model_parts)
                self._recorder.record("weights", step=step, hash=weight_hash(weights))
            except (NotImplementedError, RuntimeError) as error:
                # A check must not end what it checks: some device may lack hash_tensor.
                logger.warning(f"weights are not hashed from here on: {error}")
                self._hash_every = sys.maxsize

    def _reduce_timeout_after_heal(self) -> None:
        """Works around: torchtitan lowers its process groups' timeout after step 1
        only, and a restarted replica heals past step 1; it would keep the long
        start-up timeout for the rest of its life."""
        if not self._timeout_reduced and self.step != 1:
            seconds = self.job_config.comm.train_timeout_seconds
            dist_utils.set_pg_timeouts(timedelta(seconds=seconds), self.parallel_dims)
        self._timeout_reduced = True

    def _heal_note(self) -> dict[str, int]:
        return {"replica": self._recorder.replica}

    def _on_heal(self, note: dict[str, int]) -> None:
        step = self._manager.current_step()
        self._may_be_too_late = self._may_be_too_late and step == 0
        self._recorder.record("heal", step=step, source=note["replica"])
        logger.info(f"healed: took the state of replica {note['replica']} at step {step}")


def run(begun: float = 0.0) -> None:
    """Train as torchtitan's command line says (``sys.argv``), in a process that began then."""
    ReplicaTrainer.begun = begun
    # torchtitan takes the command line as it was when it was imported: a spare's comes later.
    ConfigManager.parse_args.__defaults__ = (sys.argv[1:],)
    # FTTrainer builds these two itself, by the names it imported.
    ft_train.FTManager = ReplicaFTManager  # type: ignore[misc]
    ft_train.CheckpointManager = ReplicaCheckpointManager  # type: ignore[misc]
    ft_train.maybe_semi_sync_training = semi_sync.attached(ft_train.maybe_semi_sync_training)
    ft_train.main(ReplicaTrainer)
