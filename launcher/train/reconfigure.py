"""A replica group that dies while the others connect to it does not stop them for long.

torchft 2026.10.26 gives the forming of a process group as much time as a collective in it
(``process_group_timeout_ms``), and a member that has died since the quorum was decided is waited
for all that time; half as long again where that one had the store at which they meet. Forming one
takes well under a second where everybody lives.
"""

from __future__ import annotations

import json
import socket
from datetime import timedelta
from typing import Any

import torch
from torchft.process_group import ProcessGroupGloo

#: Time for all members to have connected to each other.
CONNECT = timedelta(seconds=4)


class PromptGloo(ProcessGroupGloo):
    """torchft's gloo group, whose members have `CONNECT` to meet."""

    def reconfigure(self, opts: Any) -> Any:
        look_for_store(opts)
        usual: timedelta = self._timeout  # type: ignore[has-type]
        self._timeout = min(usual, CONNECT)
        try:
            work = super().reconfigure(opts)
        finally:
            self._timeout = usual
        assert self._pg is not None
        # Collectives take the time that the group was made with.
        self._pg._get_backend(torch.device("cpu"))._set_default_timeout(usual)
        return work


def look_for_store(opts: Any) -> None:
    """Check that the store is there, whose owner is the first member.

    Raises:
        OSError: it is not: its owner has died.
    """
    host, _, port = str(json.loads(opts.handles[0])["store"]).partition("/")[0].rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT.total_seconds()).close()


def adapt(manager: Any) -> None:
    """Have a torchft manager's group meet promptly, where it is gloo's. (NCCL connects at the
    first collective, and its store must wait for the slowest group's until then.)"""
    if type(manager._pg) is ProcessGroupGloo:
        manager._pg.__class__ = PromptGloo
