"""Structured events of one rank: JSON lines beside the replica group's text log.

Every line carries ``t`` (Unix seconds), ``kind``, ``replica``, ``rank``,
``attempt`` and ``host``; the rest depends on the kind (docs in ``launcher/events.py``).
Recording must never slow or stop training: each line is one unbuffered append
of less than a page, and a full disk costs events, not steps.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from typing import Any

#: Fields that torchft puts on its records through ``extra``.
_TORCHFT_FIELDS = ("quorum_id", "step", "commit_result", "error", "uuid")
#: Loggers to which torchft writes those.
TORCHFT_LOGGERS = ("torchft_errors", "torchft_quorums", "torchft_commits")


class Recorder:
    """Appends events to the file named by ``TFT_EVENTS``; without it, drops them."""

    def __init__(self, path: str | None, *, replica: int, rank: int, attempt: int) -> None:
        self.replica, self.rank = replica, rank
        self._identity: dict[str, Any] = {
            "replica": replica,
            "rank": rank,
            "attempt": attempt,
            "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        }
        self._dropped = 0
        self._fd: int | None = None
        if path:
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            except OSError as error:
                logging.getLogger(__name__).warning(f"no structured events: {path}: {error}")

    @classmethod
    def from_environment(cls) -> Recorder:
        return cls(
            os.environ.get("TFT_EVENTS"),
            replica=int(os.environ.get("REPLICA_GROUP_ID", "0")),
            rank=int(os.environ.get("RANK", "0")),
            attempt=int(os.environ.get("TFT_ATTEMPT", "1")),
        )

    def record(self, kind: str, **fields: Any) -> None:
        """Append one event. Never raises on a failing disk."""
        if self._fd is None:
            return
        event = {"t": round(time.time(), 3), "kind": kind, **self._identity, **fields}
        line = json.dumps(event, default=str, separators=(",", ":")) + "\n"
        try:
            os.write(self._fd, line.encode())
        except OSError as error:
            if self._dropped == 0:
                logging.getLogger(__name__).warning(f"structured events are being lost: {error}")
            self._dropped += 1

    def attach_to_torchft(self) -> None:
        """Turn torchft's structured records (quorums, commits, errors) into events."""
        names = {"torchft_errors": "error"}
        if self.rank == 0:
            # Every rank of a group logs the same quorums and commits: one suffices.
            names |= {"torchft_quorums": "quorum", "torchft_commits": "commit"}
        for name, kind in names.items():
            logging.getLogger(name).addHandler(_TorchftHandler(self, kind))
        for name in TORCHFT_LOGGERS:
            # Their message is empty: in the text log they are blank lines. Their level is the
            # root logger's otherwise, and a script may have left that at WARNING.
            logging.getLogger(name).propagate = False
            logging.getLogger(name).setLevel(logging.INFO)


class _TorchftHandler(logging.Handler):
    def __init__(self, recorder: Recorder, kind: str) -> None:
        super().__init__()
        self._recorder = recorder
        self._kind = kind

    def emit(self, record: logging.LogRecord) -> None:
        fields = {name: getattr(record, name) for name in _TORCHFT_FIELDS if hasattr(record, name)}
        if "commit_result" in fields:
            fields["committed"] = bool(fields.pop("commit_result"))
        self._recorder.record(self._kind, **fields)
