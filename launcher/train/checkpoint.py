"""Dataloader state that neither piles up nor breaks a restart."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.ft import FTManager
from torchtitan.tools.logging import logger

#: Steps between two saves of a replica group's dataloader state. After a loss the
#: group repeats at most this many batches of its own data.
SAVE_EVERY = int(os.environ.get("TFT_DATALOADER_SAVE_EVERY") or "10")
#: How many saves are kept: the newest may be half written when its node is lost.
KEEP = 2


class ReplicaCheckpointManager(CheckpointManager):
    """torchtitan's checkpoint manager with tamed per-replica dataloader checkpoints.

    Works around, in torchtitan 0.2.2:

    - they are written at every step and never deleted;
    - a restart with another group size, rank count or replica id crashes on them.
      The layout is part of the folder's name here, so that only a matching state is
      ever loaded, and a changed layout is said in one line;
    - they live inside the checkpoint folder, whose mere existence makes a restarted
      replica ignore ``checkpoint.initial_load_path``.
    """

    def __init__(self, *args: Any, ft_manager: FTManager | None = None, **kwargs: Any) -> None:
        super().__init__(*args, ft_manager=ft_manager, **kwargs)
        if not self.enable_ft_dataloader_checkpoints:
            return
        assert ft_manager is not None
        base_folder = kwargs.get("base_folder", "")
        self._layout = f"{ft_manager.group_size}x{dist.get_world_size()}"
        self._dataloader_root = os.path.join(base_folder, "dataloader")

    #: Told what keeps the group from its next step, and with an empty text that it is over.
    busy: Callable[[str], None] = staticmethod(lambda what: None)

    def save(self, curr_step: int, last_step: bool = False) -> None:
        long = self._should_save(curr_step, last_step)
        if long:
            self.busy("checkpoint")  # its peers wait meanwhile: this is no hang
        super().save(curr_step, last_step)
        if long:
            self.busy("")
        if last_step and self.enable_ft_dataloader_checkpoints:
            # The process group ends soon; a save under way would be left half written.
            try:
                self._async_wait()
            except (Exception, CheckpointException) as error:
                self._lost_save(error)

    def _lost_save(self, error: BaseException) -> None:
        """A full disk costs the place in the data at the next restart, and not the training."""
        self.save_future = None
        logger.warning(f"dataloader state was not saved: {_last_line(error)}")

    def _ft_folder(self) -> str:
        name = f"replica-{self.ft_replica_id}-of-{self._layout}"
        return os.path.join(self._dataloader_root, name)

    def _ft_save(self, step: int) -> None:
        if step % SAVE_EVERY:
            return
        try:
            super()._ft_save(step)
        except (Exception, CheckpointException) as error:
            self._lost_save(error)
            return
        if dist.get_rank() == 0:
            self._purge_dataloader_states()

    def _ft_load(self) -> None:
        others = self._other_layouts()
        if self._find_load_step(folder=self._ft_folder()) == -1 and others:
            logger.warning(
                f"dataloader state of replica {self.ft_replica_id} was saved for another layout "
                f"({', '.join(others)}; now {self._layout}, as groups x ranks): it is left alone, "
                "and this replica reads its share of the data from the beginning"
            )
        try:
            super()._ft_load()
        except (Exception, CheckpointException) as error:
            # (torch derives CheckpointException from BaseException.) Losing the place in the
            # data costs some repeated batches; not starting costs the replica group.
            logger.warning(
                f"dataloader state in {self._ft_folder()} cannot be read ({_last_line(error)}): this "
                "replica reads its share of the data from the beginning; delete that folder to "
                "silence this"
            )

    def _other_layouts(self) -> list[str]:
        pattern = re.compile(rf"replica-{self.ft_replica_id}-of-(\d+x\d+)$")
        if not os.path.isdir(self._dataloader_root):
            return []
        found = (pattern.match(name) for name in sorted(os.listdir(self._dataloader_root)))
        return [match[1] for match in found if match and match[1] != self._layout]

    def _purge_dataloader_states(self) -> None:
        folder = self._ft_folder()
        try:
            steps = sorted(
                int(name.removeprefix("step-"))
                for name in os.listdir(folder)
                if re.fullmatch(r"step-\d+", name)
                and os.path.isfile(os.path.join(folder, name, ".metadata"))
            )
        except OSError:
            return
        for step in steps[:-KEEP]:
            shutil.rmtree(os.path.join(folder, f"step-{step}"), ignore_errors=True)


def _last_line(error: BaseException) -> str:
    """torch's checkpoint errors carry a traceback as text; its last line says what it was."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
