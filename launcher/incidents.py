"""Incidents: what was lost, why, and what it cost. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from launcher.events import Event, Source

#: Seconds before a loss in which a sign counts as a sign of it.
SIGN_WINDOW = 180.0
#: Signs kept for one replica group: the first ones tell most.
MOST_SIGNS = 40


class Cause(enum.Enum):
    """Why a replica group was lost."""

    NODE_DOWN = "node down"
    NODE_UNREACHABLE = "node unreachable"
    CRASH = "process crash"
    OUT_OF_MEMORY = "out of memory"
    KILL_REQUEST = "kill request"
    HANG = "hang"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time limit"
    REQUEUED = "requeued by a person"
    CANCELLED = "cancelled by a person"
    LIGHTHOUSE_LOST = "lighthouse lost"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """One line that points to a cause."""

    t: float
    weight: int
    """How much it says: the heaviest sign names the cause, the earliest among equals."""
    cause: Cause
    text: str
    source: Source | None = None


@dataclass(slots=True, kw_only=True)
class Incident:
    """A replica group that stopped taking part without having finished. Times: Unix seconds."""

    replica: int
    kind: str = "replica_lost"
    host: str = ""
    """Node on which it ran."""
    cause: Cause = Cause.UNKNOWN
    detail: str = ""
    """The line that names the cause, where that says more than the cause itself."""
    first_sign: float
    detected_at: float | None = None
    """First quorum without the group."""
    lost_at_step: int = 0
    steps_lost: int = 0
    """Steps that the survivors tried and could not commit."""
    survivor_stall_s: float = 0.0
    """Longest time between two commits of any survivor around the loss."""
    requeued_at: float | None = None
    started_at: float | None = None
    rejoined_at: float | None = None
    healed_at: float | None = None
    healed_from: int | None = None
    recovered_at: float | None = None
    """First commit after coming back."""
    recovered_at_step: int | None = None
    full_strength_at: float | None = None
    lost_uuid: str = ""
    """uuid of the copy that was lost."""
    started_over: bool = False
    """It came back and trained from before the loss: nobody was there to heal from."""
    compared_before: int = 0
    """Weight comparisons made before the recovery."""
    evidence: list[Sign] = field(default_factory=list)

    @property
    def lost_at(self) -> float:
        return self.detected_at if self.detected_at is not None else self.first_sign

    @property
    def why(self) -> str:
        """The cause in words, with the error where it was a crash."""
        return f"{self.cause.value}: {self.detail}" if self.detail else self.cause.value

    def explain(self, signs: list[Sign]) -> None:
        """Take in signs; the heaviest of all names the cause."""
        for sign in signs:
            if sign not in self.evidence and len(self.evidence) < MOST_SIGNS:
                self.evidence.append(sign)
                self.first_sign = min(self.first_sign, sign.t)
        if self.evidence:
            main = min(self.evidence, key=lambda sign: (-sign.weight, sign.t))
            self.cause = main.cause
            self.detail = main.text if main.cause in _DETAILED else ""


_DETAILED = frozenset({Cause.CRASH, Cause.OUT_OF_MEMORY, Cause.UNKNOWN, Cause.HANG})

#: Slurm's "DUE TO …" in a cancellation line; without one, a person did it.
_DUE = {
    "NODE FAILURE": Cause.NODE_DOWN,
    "PREEMPTION": Cause.PREEMPTED,
    "TIME LIMIT": Cause.TIME_LIMIT,
    "JOB REQUEUE": Cause.REQUEUED,
}


def sign_of(event: Event) -> Sign | None:
    """What an event of a replica group says about its end; None when nothing."""
    text = str(event.get("text", ""))
    if event.kind == "slurm_cancelled":
        due = event.get("due")
        cause = Cause.CANCELLED if due is None else _DUE.get(str(due), Cause.UNKNOWN)
        return _sign(event, 9, cause, f"Slurm: due to {str(due).lower()}" if due else "scancel")
    if event.kind == "kill_request":
        return _sign(event, 8, Cause.KILL_REQUEST, text)
    if event.kind == "out_of_memory":
        return _sign(event, 7, Cause.OUT_OF_MEMORY, text)
    if event.kind == "xid":
        return _sign(event, 7, Cause.CRASH, f"Xid {event.get('xid')} on GPU {event.get('gpu')}")
    if event.kind == "device_error":
        return _sign(event, 7, Cause.CRASH, text)
    if event.kind == "exit" and int(event.get("code", 1)) != 0:
        reason = str(event.get("reason", ""))
        if "stopped by" in reason:
            return _sign(event, 2, Cause.UNKNOWN, reason)
        return _sign(event, 5, Cause.CRASH, reason)
    if event.kind == "rank_failed":
        return _sign(event, 4, Cause.CRASH, f"a rank exited with code {event.get('exit_code')}")
    if event.kind == "exception":
        return _sign(event, 3, Cause.CRASH, text)
    return None


def hang_sign(t: float, seconds: float, source: Source | None) -> Sign:
    """Others asked for a quorum, and the group, still heartbeating, did not."""
    text = f"did not join the quorum that others waited {seconds:.0f} s for"
    return Sign(t=t, weight=6, cause=Cause.HANG, text=text, source=source)


def same_process_sign(t: float, source: Source | None) -> Sign:
    """It was gone and came back as the very same process: it had been stopped."""
    text = "its processes were stopped for a while and then went on"
    return Sign(t=t, weight=6, cause=Cause.HANG, text=text, source=source)


def _sign(event: Event, weight: int, cause: Cause, text: str) -> Sign:
    return Sign(t=event.t, weight=weight, cause=cause, text=text, source=event.source)
