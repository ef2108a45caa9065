"""Incidents: what was lost, why, and what it cost. Pure."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, field, replace

from launcher.events import Event, Source
from launcher.restarts import TIME_IS_UP, UNFIT, Next

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
    UNFIT_NODE = "unfit node"
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
    requeues: bool = False
    """Whether the group's own launcher asked Slurm to requeue it: no person did."""
    line: str = ""
    """The line as it was read, at most 500 characters; empty where none says it."""
    error: bool = False
    """Whether it is an error of the process itself, and not what others made of it."""
    rank: int | None = None
    """Rank whose line it is, where that is known."""
    root: bool = False
    """Whether torchrun names that rank as the root cause."""


@dataclass(slots=True, kw_only=True)
class Incident:
    """A replica group that stopped taking part without having finished, or a lighthouse that was
    not there for a while. Times: Unix seconds."""

    replica: int | None
    """None: the lighthouse."""
    kind: str = "replica_lost"
    host: str = ""
    """Node on which it ran; of several the one that is to blame, and empty while that is not known."""
    nodes: tuple[str, ...] = ()
    """All nodes on which it ran."""
    cause: Cause = Cause.UNKNOWN
    detail: str = ""
    """The line that names the cause, where that says more than the cause itself."""
    first_sign: float
    opened_at: float = 0.0
    """When it was first known of; by default the first sign."""
    detected_at: float | None = None
    """First quorum without the group, or with its next copy already. Of the lighthouse: more than
    half of the groups could not reach it, or it was started again."""
    lost_at_step: int = 0
    steps_lost: int = 0
    """Steps that the survivors tried and could not commit."""
    survivor_stall_s: float = 0.0
    """Longest time between two commits of any other group around the loss."""
    ended_at: float | None = None
    """When its launcher said that the attempt had ended."""
    requeued_at: float | None = None
    started_at: float | None = None
    boot: dict[str, float] = field(default_factory=dict)
    """Where the time of the new start went, seconds by phase."""
    rejoined_at: float | None = None
    healed_at: float | None = None
    healed_from: int | None = None
    recovered_at: float | None = None
    """First commit after coming back; of any group, after the lighthouse did."""
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
    def replaced(self) -> bool:
        """Whether its next copy was in the quorum before it was missed there."""
        return self.detected_at is not None and self.detected_at == self.rejoined_at

    @property
    def lost_at(self) -> float:
        if self.detected_at is not None and not self.replaced:
            return self.detected_at
        return self.first_sign if self.ended_at is None else self.ended_at

    @property
    def where(self) -> str:
        """Its node, or all of them while it is not known which one is to blame."""
        return self.host or ", ".join(self.nodes)

    @property
    def who(self) -> str:
        """What was lost, in words."""
        return "the lighthouse" if self.replica is None else f"replica {self.replica}"

    def touches(self, replica: int, before: float, t: float) -> bool:
        """Whether it fell into the time between two commits of group ``replica``.

        The lighthouse may be gone for several: each of them may have waited for it.
        """
        if self.replica is None:
            return self.first_sign <= t and (
                self.recovered_at is None or before < self.recovered_at
            )
        until = self.lost_at if self.detected_at is None else self.detected_at
        return self.replica != replica and before <= until and self.lost_at <= t

    @property
    def why(self) -> str:
        """The cause in words, with the error where it was a crash."""
        return f"{self.cause.value}: {self.detail}" if self.detail else self.cause.value

    def end_told(self, by: float = float("inf")) -> bool:
        """Whether by that time the node could still say how the group ended: Slurm's step there,
        the launcher or torchrun. An exception (weight 3) is none: a group may get over it."""
        others = (Cause.HANG, Cause.LIGHTHOUSE_LOST, Cause.NODE_UNREACHABLE)
        return any(s.weight != 3 and s.cause not in others and s.t < by for s in self.evidence)

    def __post_init__(self) -> None:
        self.opened_at = self.opened_at or self.first_sign

    def others_noticed(self, t: float) -> None:
        """Take ``t`` for the first sign while nothing tells of its end: the others failed to commit,
        or asked for a quorum that it did not join."""
        if not self.evidence:
            self.first_sign = min(self.first_sign, t)

    def explain(self, signs: list[Sign]) -> None:
        """Take in signs; the heaviest of all names the cause."""
        for sign in signs:
            if sign in self.evidence:
                continue
            if len(self.evidence) >= MOST_SIGNS:
                # The first ones tell most, but not more than a heavier one.
                last = min(reversed(self.evidence), key=lambda kept: kept.weight)
                if last.weight >= sign.weight:
                    continue
                self.evidence.remove(last)
            self.evidence.append(sign)
        if self.evidence:
            self.first_sign = min([self.opened_at, *(sign.t for sign in self.evidence)])
            counted = self.evidence
            if any(sign.requeues for sign in self.evidence):
                counted = [sign for sign in self.evidence if sign.cause is not Cause.REQUEUED]
            main = min(counted, key=lambda sign: (-sign.weight, sign.t))
            self.cause = main.cause
            self.detail = main.text if main.cause in _DETAILED else ""
            if main.cause is Cause.CRASH:
                self.detail = self._first_error(main)

    def _first_error(self, main: Sign) -> str:
        """Of a crash the first error of the rank that torchrun blames (else of any): what is said
        later, a collective that fails for example, is a consequence."""
        if _BY_SIGNAL.search(main.text):
            return main.text  # it could say nothing any more
        errors = [s for s in self.evidence if s.error and s.cause is Cause.CRASH]
        blamed = {s.rank for s in self.evidence if s.root}
        errors = [s for s in errors if s.rank in blamed] or errors
        if not errors:
            return main.text
        first = min(errors, key=lambda s: (s.t, s.source.offset if s.source else 0))
        return main.text if first.text[:_SAME] in main.text else first.text


#: Of a rank that was killed by a signal.
_BY_SIGNAL = re.compile(r"killed by SIG|exited with code -\d|\bSignal \d+ \(")
#: Characters of an error by which it is found again in what the launcher says of the end.
_SAME = 60

_DETAILED = frozenset(
    {Cause.UNFIT_NODE, Cause.CRASH, Cause.OUT_OF_MEMORY, Cause.UNKNOWN, Cause.HANG}
)

#: Slurm's "DUE TO …" in a cancellation line; without one, a person did it.
_DUE = {
    "NODE FAILURE": Cause.NODE_DOWN,
    "PREEMPTION": Cause.PREEMPTED,
    "TIME LIMIT": Cause.TIME_LIMIT,
    "JOB REQUEUE": Cause.REQUEUED,
    "TASK FAILURE": Cause.CRASH,
}


#: What torchrun itself raises when one of its ranks has failed, or it was told to end.
_TORCHRUNS = re.compile(r"(?:[\w.]+\.)?(?:ChildFailedError|SignalException)\b")
_TOLD_TO_END = re.compile(r"SignalException\b.*signal: 15\b")
#: In a reason for which a group ended: it had no memory left.
_NO_MEMORY = re.compile(r"out of memory|OutOfMemory|allocate memory|MemoryError|bad_alloc", re.I)


def sign_of(event: Event) -> Sign | None:
    """What an event of a replica group says about its end; None when nothing."""
    text = str(event.get("text", ""))
    if event.kind == "slurm_cancelled":
        due = event.get("due")
        cause = Cause.CANCELLED if due is None else _DUE.get(str(due), Cause.UNKNOWN)
        return _sign(event, 9, cause, f"Slurm: due to {str(due).lower()}" if due else "scancel")
    if event.kind == "node_failed":
        return _sign(event, 9, Cause.NODE_DOWN, f"Slurm: node {event.get('host')} failed")
    if event.kind == "kill_request":
        return _sign(event, 8, Cause.KILL_REQUEST, text)
    if event.kind == "exit" and event.get("code", 1) != 0:
        requeues = event.get("next") == Next.ELSEWHERE.value
        return replace(_exit_sign(event, str(event.get("reason", ""))), requeues=requeues)
    if event.kind == "action" and event.get("action") == "requeue":
        text = f"its launcher was killed: {event.get('why')}"
        return _sign(event, 1, Cause.CRASH, text)
    return _own_words(event, text)


def _own_words(event: Event, text: str) -> Sign | None:
    """What the group's processes, torchrun and srun say."""
    if event.kind == "out_of_memory":
        return _sign(event, 7, Cause.OUT_OF_MEMORY, text)
    if event.kind == "xid":
        text = f"Xid {event.get('xid')} on GPU {event.get('gpu')}"
        return replace(_sign(event, 7, Cause.CRASH, text), error=True)
    if event.kind == "device_error":
        return replace(_sign(event, 7, Cause.CRASH, text), error=True)
    if event.kind == "rank_failed":
        which = "a rank" if event.get("rank") is None else f"rank {event.get('rank')}"
        text = text or f"{which} exited with code {event.get('exit_code')}"
        return _sign(event, 4, Cause.CRASH, text)
    if event.kind == "task_failed":
        text = f"task {event.get('task')} on {event.get('host')}: {text}"
        # One that was killed may have been so by srun itself, which was told to end.
        return _sign(event, 1 if text.endswith(": Killed") else 4, Cause.CRASH, text)
    if event.kind in ("exception", "fatal", "nccl_error"):
        if _TOLD_TO_END.search(text):
            return _sign(event, 3, Cause.UNKNOWN, "stopped by SIGTERM")
        # torchrun's own exceptions tell of a rank's, and NCCL warns of much that comes to nothing.
        own = event.get("warning") is None and not _TORCHRUNS.match(text)
        return replace(_sign(event, 3, Cause.CRASH, text), error=own)
    return None


def _exit_sign(event: Event, reason: str) -> Sign:
    """Why a group's launcher says that it ended."""
    if "stopped by" in reason:
        return _sign(event, 2, Cause.UNKNOWN, reason)
    if reason.startswith(("hung: ", "stopped: ", "stuck: ")):  # the guardian's words
        return _sign(event, 6, Cause.HANG, reason.partition(": ")[2])
    if reason.startswith(TIME_IS_UP):
        return _sign(event, 8, Cause.TIME_LIMIT, reason)
    if reason.startswith(UNFIT):
        return _sign(event, 8, Cause.UNFIT_NODE, reason.removeprefix(UNFIT))
    if _NO_MEMORY.search(reason):
        return _sign(event, 7, Cause.OUT_OF_MEMORY, reason)
    return _sign(event, 5, Cause.CRASH, reason)


def lighthouse_sign(event: Event) -> Sign | None:
    """What an event of a replica group says of the lighthouse as the cause of its end.

    To be asked only while the lighthouse is known to be lost: a node that is cut off has the
    same complaints.
    """
    text = str(event.get("reason" if event.kind == "exit" else "text", ""))
    ended = event.kind in ("exit", "exception") and "lighthouse" in text.lower()
    if event.kind == "quorum_failed" or ended:
        return _sign(event, 6, Cause.LIGHTHOUSE_LOST, text)
    return None


def contact_sign(event: Event) -> Sign:
    """A group could not reach the lighthouse."""
    text = f"replica {event.replica} cannot reach the lighthouse: {event.get('text', '')}"
    return _sign(event, 5, Cause.LIGHTHOUSE_LOST, text)


def restart_sign(event: Event) -> Sign:
    """The last that was heard of a lighthouse before it was started again."""
    t = event.get("last")
    text = "last line of the lighthouse before it was started again"
    return Sign(
        t=event.t if t is None else t,
        weight=5,
        cause=Cause.LIGHTHOUSE_LOST,
        text=text,
        source=event.source,
        line=event.line,
    )


def left_out_sign(t: float, source: Source | None) -> Sign:
    """Not there when the lighthouse was back: no more is known than that."""
    text = "not in the quorum when the lighthouse was back"
    return Sign(t=t, weight=2, cause=Cause.LIGHTHOUSE_LOST, text=text, source=source)


def unreachable_sign(t: float, host: str) -> Sign:
    """The controller gets no answer from the node.

    As heavy as what slurmstepd prints on the node itself, so that the first of the two names the
    cause: one that prints its cancellation after a silence was cut off, and does so only now that
    it can be reached again. (One that printed it before is not asked about any more.)
    """
    text = f"Slurm: node {host} does not respond"
    return Sign(t=t, weight=9, cause=Cause.NODE_UNREACHABLE, text=text)


def hang_sign(t: float, seconds: float, source: Source | None) -> Sign:
    """Others asked for a quorum, and the group, still heartbeating, did not."""
    text = f"did not join the quorum that others waited {seconds:.0f} s for"
    return Sign(t=t, weight=6, cause=Cause.HANG, text=text, source=source)


def same_process_sign(t: float, source: Source | None) -> Sign:
    """It was gone and came back as the very same process: it had been stopped."""
    text = "its processes were stopped for a while and then went on"
    return Sign(t=t, weight=6, cause=Cause.HANG, text=text, source=source)


def _sign(event: Event, weight: int, cause: Cause, text: str) -> Sign:
    return Sign(
        t=event.t,
        weight=weight,
        cause=cause,
        text=text,
        source=event.source,
        line=event.line,
        rank=event.get("rank"),
        root=bool(event.get("root")),
    )
