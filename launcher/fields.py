"""What the fields of a structured event may be: one table, by name. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

#: Most replica groups of a run, and nodes of a group.
MOST_GROUPS = 65_536
#: Numbers up to which every integer is a float too.
EXACT = 2**53


def _whole(least: int = 0, most: int = EXACT - 1) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < EXACT and math.isfinite(value)


def _measured(value: Any) -> bool:
    return _finite(value) or (type(value) is float and not math.isfinite(value))


_HALF = re.compile("[\ud800-\udfff]")


def _text(value: Any) -> bool:
    """A string that can be written down: JSON may hold half a character."""
    return type(value) is str and (value.isascii() or not _HALF.search(value))


def _texts(value: Any) -> bool:
    return type(value) is list and len(value) <= MOST_GROUPS and all(map(_text, value))


def _flag(value: Any) -> bool:
    return type(value) is bool


def _or_null(allowed: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or allowed(value)


#: What a field of a structured event may be, in whichever kind. (Others are read by nobody.)
FIELDS: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(["step", "quorum_id", "pid", "participants"], _whole()),
    **dict.fromkeys(["titan_step", "ecc"], _or_null(_whole())),
    **dict.fromkeys(["rank", "attempt", "xid"], _whole(0, 2**31)),
    **dict.fromkeys(["code", "source", "gpu"], _whole(-(2**31), 2**31)),
    "task": _or_null(_whole(0, 2**31)),
    "replicas": _whole(1, MOST_GROUPS),
    # A loss that is no number is worth knowing; what is made of it too is none then.
    **dict.fromkeys(["loss", "local_loss", "grad_norm"], _or_null(_measured)),
    **dict.fromkeys(["tokens_per_second", "busy_seconds", "lr", "celsius", "begun"], _or_null(_finite)),
    **dict.fromkeys(["committed", "serves", "trained", "joining", "silent"], _flag),
    **dict.fromkeys(["host", "reason", "hash", "error", "what", "next", "node", "action", "state"], _text),
    **dict.fromkeys(["why", "uuid"], _or_null(_text)),
    **dict.fromkeys(["nodes", "slowed"], _texts),
}  # fmt: skip

#: A replica group's number.
is_group = _whole(0, 1_000_000)


def is_time(value: Any) -> bool:
    """Whether it may be a time, Unix seconds."""
    return _finite(value) and 0 <= value < 1e11


def are_sound(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of an event are what their names say."""
    for name, value in fields.items():
        allowed = FIELDS.get(name)
        if allowed is not None and not allowed(value):
            return False
    return True
