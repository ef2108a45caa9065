"""Reads what W&B writes to disk in offline mode."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def records(path: Path) -> Iterator[Any]:
    """What a ``.wandb`` file holds: records in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def config_of(found: Iterable[Any]) -> dict[str, Any]:
    """The run's config after all updates of it."""
    updates = [(r.run.config if r.HasField("run") else r.config).update for r in found]
    return {item.key: json.loads(item.value_json) for items in updates for item in items}
