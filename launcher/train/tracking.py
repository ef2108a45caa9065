"""Weights & Biases in training: where it runs is said, and it ends nothing and delays nothing."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

from torchtitan.components import metrics as upstream
from torchtitan.components.metrics import BaseLogger, WandBLogger
from torchtitan.tools.logging import logger

#: Seconds that W&B's server has to answer before the run is kept on disk instead.
PROBE_SECONDS = 5.0
#: Seconds that the end of training waits for what is still to be logged and uploaded. Above
#: WANDB_FINISH_TIMEOUT (``launcher/environment.py``), after which W&B gives up by itself.
CLOSE_SECONDS = 15.0
#: Rows that wait while W&B starts or is stuck; further ones are dropped.
MOST_ROWS = 10_000


def adapt() -> None:
    """Let torchtitan build our logger where it would build its own."""
    upstream.WandBLogger = BackgroundLogger


class BackgroundLogger(BaseLogger):
    """Works around: torchtitan 0.2.2 starts W&B, logs to it and ends it in the training loop.
    With a server that cannot be reached, the start takes half a minute, while all ranks wait;
    an error of a later ``wandb.log`` or ``wandb.finish`` (its service process died, a full
    disk) ends the rank, and with it the whole replica group.

    Here all of that happens in a thread of its own, which gets the rows through a queue.
    """

    def __init__(self, log_dir: str, job_config: Any, tag: str | None = None) -> None:
        # In this thread: a module that is half imported must not be met by a fork.
        import wandb

        self._wandb = wandb
        self._start: Callable[[], WandBLogger] = lambda: WandBLogger(log_dir, job_config, tag)
        self._place = place()
        self._rows: queue.Queue[tuple[dict[str, Any], int]] = queue.Queue(MOST_ROWS)
        self._ending = threading.Event()
        self._complained = False
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        try:
            self._rows.put_nowait((dict(metrics), step))
        except queue.Full:
            self._complain("it does not keep up")

    def close(self) -> None:
        """Wait for what is under way, for a limited time."""
        self._ending.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._complain(f"it did not end within {CLOSE_SECONDS:g} s")

    def _work(self) -> None:
        try:
            inner = self._begin()
        except Exception as error:
            self._complain(repr(error))
            return
        self._try(lambda: self._describe(inner.wandb.run))
        while True:
            try:
                metrics, step = self._rows.get(timeout=0.1)
            except queue.Empty:
                if self._ending.is_set():
                    break
                continue
            self._try(lambda: inner.log(metrics, step))  # noqa: B023 - called at once
        self._try(inner.close)

    def _begin(self) -> WandBLogger:
        """Start W&B; on disk only where its server gives no answer."""
        settings = self._wandb.setup().settings
        if settings.mode == "online":
            problem = unreachable(settings.base_url)
            if not problem:
                try:
                    return self._start()
                except (self._wandb.Error, OSError) as error:
                    problem = type(error).__name__
            self._wandb.teardown()  # its service still holds the run that did not start
            self._wandb.setup(settings=self._wandb.Settings(mode="offline"))
            inner = self._start()
            logger.warning(
                f"W&B cannot be reached ({problem}): this start is kept on disk, training goes "
                f"on; upload it with `wandb sync {inner.wandb.run.settings.sync_dir}`"
            )
            return inner
        return self._start()

    def _describe(self, run: Any) -> None:
        """Add to the run's config what torchtitan does not know: where this start of it runs."""
        if run is not None:
            run.config.update({"slurm": self._place}, allow_val_change=True)

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self._complain(repr(error))

    def _complain(self, problem: str) -> None:
        """Once: what follows is the same."""
        if not self._complained:
            self._complained = True
            if key := os.environ.get("WANDB_API_KEY"):
                problem = problem.replace(key, "***")
            logger.warning(f"W&B lacks data from here on ({problem}); training goes on")


def unreachable(url: str) -> str:
    """Why no server answers at ``url``; empty when one does, whatever it says."""
    import requests

    began = time.monotonic()
    try:
        # Not its body, and not where it would send us: any answer will do.
        requests.head(url, timeout=PROBE_SECONDS, allow_redirects=False).close()
    except requests.exceptions.SSLError:
        return ""  # it is there, and W&B has certificates of its own
    except requests.exceptions.Timeout:
        return f"no answer within {time.monotonic() - began:.0f} s"
    except (requests.RequestException, OSError) as error:
        return type(error).__name__
    return ""


def place() -> dict[str, str]:
    """Job, node and attempt of this process, as far as they are known."""
    names = {
        "job": "SLURM_JOB_ID",
        "array_job": "SLURM_ARRAY_JOB_ID",
        "array_task": "SLURM_ARRAY_TASK_ID",
        "node": "SLURMD_NODENAME",
        "attempt": "TFT_ATTEMPT",
        "config": "TFT_CONFIG",
    }
    return {key: os.environ[name] for key, name in names.items() if name in os.environ}
