"""The timeouts that decide how fast a failure is noticed and survived, chosen together.

A step waits in layers, each of which must give up before the next one out:

====================  ==========================================================================
lighthouse heartbeat  a replica group that is silent for so long is lost
process group         a collective between replica groups fails, and with it one commit
train                 a collective inside a replica group fails, and with it the group
init                  the same before the first step, which compiles and loads
hang                  a group that others wait for is restarted by the guardian
quorum                a group that gets no quorum gives up; nothing should ever come so far
====================  ==========================================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """One choice of the lighthouse's timeouts, milliseconds."""

    heartbeat_timeout_ms: int
    """Managers send ten a second, from native threads that neither the GIL nor a long
    step stops: a second and a half of silence is fifteen missed in a row."""
    join_timeout_ms: int
    """How long a quorum waits for a group that heartbeats and has not joined: one that is coming
    up. A loss is not waited for so long; its heartbeats end."""
    quorum_tick_ms: int
    """How often the lighthouse decides."""


#: What is safe on a busy cluster, and what reacts fastest on a quiet network.
DEFAULT = Timeouts(heartbeat_timeout_ms=1500, join_timeout_ms=10_000, quorum_tick_ms=50)
FAST = Timeouts(heartbeat_timeout_ms=600, join_timeout_ms=5_000, quorum_tick_ms=20)
PROFILES = {"default": DEFAULT, "fast": FAST}

#: Seconds that others must have waited for a group before the guardian restarts it.
HANG_SECONDS = 8.0


def problems(settings: Mapping[str, Any], quorum_timeout: float) -> Iterator[str]:
    """What is wrong with the order of the layers.

    Args:
        settings: ``comm`` and ``fault_tolerance`` of a torchtitan configuration, flat:
            ``init_timeout_seconds``, ``train_timeout_seconds``, ``process_group_timeout_ms``;
            a missing one is not checked.
        quorum_timeout: ``TORCHFT_QUORUM_TIMEOUT_SEC``, seconds.
    """
    names = ("process_group_timeout_ms", "train_timeout_seconds", "init_timeout_seconds")
    known = {
        name: _seconds(name, settings[name]) for name in names if settings.get(name) is not None
    }
    layers = [(name, known[name]) for name in names if name in known]
    for (inner, short), (outer, long) in itertools.pairwise(layers):
        if short >= long:
            yield (
                f"{inner} ({short:g} s) must be shorter than {outer} ({long:g} s): the inner wait "
                "must fail first, or a lost replica group takes this one with it"
            )
    group = known.get("process_group_timeout_ms", 0.0)
    if quorum_timeout <= group + HANG_SECONDS:
        yield (
            f"TORCHFT_QUORUM_TIMEOUT_SEC ({quorum_timeout:g} s) must be longer than "
            f"process_group_timeout_ms and a hang's {HANG_SECONDS:g} s together "
            f"({group + HANG_SECONDS:g} s): a healthy group would give up before the hung one is "
            "restarted"
        )


def _seconds(name: str, value: Any) -> float:
    return float(value) / 1000 if name.endswith("_ms") else float(value)
