"""What the logs say, as events. Pure: lines in, events out.

==========  ======================================================================
kind        fields (every event has ``t``, Unix seconds, and mostly ``replica``)
==========  ======================================================================
launch      ``attempt``, ``host``: the launcher of a replica group started
start       rank's process is up, torch imported
ready       model built, about to train
quorum      a group's own view: ``quorum_id``, ``step``
heal        ``step``, ``source``: took the state of replica ``source``
commit      ``step``, ``committed``, ``quorum_id``
metrics     ``step`` (manager's), ``loss`` (mean over participants), ``participants``
weights     ``step`` (manager's), ``rank``, ``hash``
error       torchft aborted a process group
end         training ended in this rank: ``titan_step``
exit        ``code``, ``reason``: the launcher of a replica group ends
membership  the lighthouse's view: ``quorum_id``, ``members`` {replica: (uuid, step)}
==========  ======================================================================
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened."""

    t: float
    kind: str
    replica: int | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        return self.fields.get(name, default)


#: Kinds a replica group writes about itself.
REPLICA_KINDS = frozenset(
    [
        "launch",
        "start",
        "ready",
        "quorum",
        "heal",
        "commit",
        "metrics",
        "weights",
        "error",
        "end",
        "exit",
    ]
)

_QUORUM = re.compile(
    r"^(?P<time>\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\.(?P<ms>\d{3}) \[INFO\] \[torchft::lighthouse\] - "
    r"Quorum! Quorum \{ quorum_id: (?P<id>\d+), participants: \[(?P<members>.*)\], created: "
)
_MEMBER = re.compile(
    r'QuorumMember \{ replica_id: "(?:[^":]*?)(?P<replica>\d+):(?P<uuid>[^"]*)", '
    r'address: "[^"]*", store_address: "[^"]*", step: (?P<step>\d+),'
)


def parse_replica_event(line: bytes) -> Event | None:
    """An event a replica group wrote (a line of its ``.events.jsonl``); None for another line."""
    try:
        raw = json.loads(line)
        t, kind = float(raw.pop("t")), str(raw.pop("kind"))
        replica = int(raw.pop("replica"))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    if kind not in REPLICA_KINDS:
        return None
    return Event(t=t, kind=kind, replica=replica, fields=raw)


def parse_lighthouse_line(line: bytes) -> Event | None:
    """A quorum the lighthouse announced (local time, as it logs it); None for another line."""
    if b"Quorum! " not in line:
        return None
    match = _QUORUM.match(line.decode(errors="replace"))
    if match is None:
        return None
    try:
        seconds = time.mktime(time.strptime(match["time"], "%Y-%m-%dT%H:%M:%S"))
    except (ValueError, OverflowError):
        return None
    members = {
        int(member["replica"]): (member["uuid"], int(member["step"]))
        for member in _MEMBER.finditer(match["members"])
    }
    return Event(
        t=seconds + int(match["ms"]) / 1000,
        kind="membership",
        fields={"quorum_id": int(match["id"]), "members": members},
    )
