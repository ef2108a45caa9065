"""What is wrong right now, by pure rules over a snapshot; each with a severity and a remedy."""

from __future__ import annotations

import enum
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from launcher.lighthouse_log import Waiting
from launcher.model import GroupState
from launcher.stalls import overdue, silent
from launcher.state import RunState

#: Starts of one group within this time that make a storm.
STORM_STARTS, STORM_SECONDS = 3, 600.0
#: Losses on one node within this time that make it a bad node.
BAD_NODE_LOSSES, BAD_NODE_SECONDS = 3, 1800.0
#: Seconds during which a failed contact with the lighthouse counts as its absence.
LIGHTHOUSE_SECONDS = 15.0
#: Seconds for which an Xid error counts as present.
XID_SECONDS = 600.0
#: Degrees Celsius above the median of its node that make a GPU hot.
HOTTER = 12
#: Own work of a group over that of the others which makes it a straggler: GPUs of one kind differ by
#: some percent, and a slowed clock, a busy neighbour or a failing disk by more than half.
STRAGGLER_RATIO = 1.5
#: … and what it must cost, as a part of a step: where little is computed, little is measured well.
STRAGGLER_COST = 0.05
#: Measurements of each group in the present quorum that are needed for a comparison.
STRAGGLER_SAMPLES = 5
#: Lines of a log without one event in them that mean its format is not understood.
STRANGE_LINES = 500


class Severity(enum.Enum):
    """How bad it is."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, and what to do about it."""

    kind: str
    severity: Severity
    message: str
    replica: int | None = None

    @property
    def key(self) -> str:
        """Equal for the same thing at a later look."""
        return f"{self.kind}:{'' if self.replica is None else self.replica}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that the rules may look at."""

    state: RunState
    now: float
    waiting: Waiting = field(default_factory=Waiting)
    """What the lighthouse's next quorum waits for."""
    blind: Mapping[str, str] = field(default_factory=dict)
    """Sources that cannot be read, with why."""
    lines: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Lines read and events found, by log."""
    job: str = "<job>"
    """Array job id, for remedies."""

    def requeue(self, replica: int) -> str:
        """The command that ends a replica group and starts it again."""
        return f"`python -m launcher requeue tft-{self.job} {replica}`"

    def drain(self, host: str) -> str:
        """What leaves a node out."""
        if self.local:
            return "leave it out of CUDA_VISIBLE_DEVICES of the next run"
        return f"`scontrol update NodeName={host or '<node>'} State=DRAIN`"

    @property
    def local(self) -> bool:
        """Whether Slurm has nothing to do with this run."""
        return self.state.scheduler != "Slurm"


Rule = Callable[[Snapshot], Iterator[Finding]]


def judge(snapshot: Snapshot) -> list[Finding]:
    """Every finding of every rule, the worst first."""
    order = {Severity.CRITICAL: 0, Severity.WARNING: 1, Severity.INFO: 2}
    found = [finding for rule in RULES for finding in rule(snapshot)]
    return sorted(found, key=lambda finding: (order[finding.severity], finding.key))


def _blind(snapshot: Snapshot) -> Iterator[Finding]:
    for name, why in snapshot.blind.items():
        yield Finding(
            kind="monitor_blind",
            severity=Severity.CRITICAL,
            message=f"{name} cannot be read ({why}): what follows from it is not known",
        )


def _strange_logs(snapshot: Snapshot) -> Iterator[Finding]:
    for name, (lines, events) in snapshot.lines.items():
        if lines >= STRANGE_LINES and not events:
            yield Finding(
                kind="log_not_understood",
                severity=Severity.WARNING,
                message=f"{lines} lines of {name} and not one that is understood: is it the right "
                "file, and a supported version of torchft?",
            )


def _stalled(snapshot: Snapshot) -> Iterator[Finding]:
    state, waiting = snapshot.state, snapshot.waiting
    if waiting.since is None or state.finished:
        return
    seconds = snapshot.now - waiting.since
    for replica in silent(waiting, state.members, state.groups, snapshot.now):
        yield Finding(
            kind="replica_stalled",
            severity=Severity.CRITICAL,
            replica=replica,
            message=f"replica {replica} has not joined the quorum that others wait {seconds:.0f} s "
            f"for: look at its stacks, or end it with {snapshot.requeue(replica)}",
        )
    if overdue(waiting, state.groups.values(), snapshot.now) is None:
        return
    if "need at least half" in waiting.status:
        yield Finding(
            kind="survivor_blocked",
            severity=Severity.CRITICAL,
            message=f"no quorum for {seconds:.0f} s: too few of the heartbeating replica groups "
            "join; the silent ones must end before the others can go on",
        )
    elif waiting.requested.issuperset(state.members):
        yield Finding(
            kind="quorum_stalled",
            severity=Severity.WARNING,
            message=f"no new quorum for {seconds:.0f} s: {waiting.status or 'no reason is logged'}",
        )


def _restart_storm(snapshot: Snapshot) -> Iterator[Finding]:
    recent = Counter(
        incident.replica
        for incident in snapshot.state.incidents
        if incident.replica is not None and snapshot.now - incident.lost_at < STORM_SECONDS
    )
    for replica, count in recent.items():
        if count >= STORM_STARTS:
            yield Finding(
                kind="restart_storm",
                severity=Severity.WARNING,
                replica=replica,
                message=f"replica {replica} was lost {count} times in {STORM_SECONDS / 60:.0f} "
                "minutes: see the causes; the same error every time is a configuration error",
            )


def _bad_node(snapshot: Snapshot) -> Iterator[Finding]:
    recent = Counter(
        incident.host
        for incident in snapshot.state.incidents
        if incident.host and snapshot.now - incident.lost_at < BAD_NODE_SECONDS
    )
    for host, count in recent.items():
        leave_out = f"leave it out with `sbatch --exclude={host}`, or {snapshot.drain(host)}"
        if snapshot.local:
            leave_out = "see the causes: it is a share of this machine"
        if count >= BAD_NODE_LOSSES:
            yield Finding(
                kind="bad_node",
                severity=Severity.WARNING,
                message=f"replica groups were lost {count} times on {host}: {leave_out}",
            )


def _weights(snapshot: Snapshot) -> Iterator[Finding]:
    ledger = snapshot.state.weights
    if ledger.differences:
        step, rank = ledger.different[0]
        yield Finding(
            kind="weights_differ",
            severity=Severity.CRITICAL,
            message=f"weights differ between replica groups since step {step} (rank {rank}), at "
            f"{ledger.differences} of {ledger.compared} compared pairs: stop, and start again from a "
            "checkpoint before that step",
        )


def _loss(snapshot: Snapshot) -> Iterator[Finding]:
    for group in snapshot.state.groups.values():
        if group.loss is not None and not math.isfinite(group.loss):
            yield Finding(
                kind="loss_nan",
                severity=Severity.CRITICAL,
                replica=group.replica,
                message=f"the loss of replica {group.replica} is {group.loss}: stop, and start again "
                "from a checkpoint with a lower learning rate or without that data",
            )


def _straggler(snapshot: Snapshot) -> Iterator[Finding]:
    """One group's own work takes longer; the step times of all are equal, for they wait for it."""
    state = snapshot.state
    busy = {
        replica: group.busy_seconds
        for replica, group in state.groups.items()
        if group.busy_seconds is not None
        and group.busy_samples >= STRAGGLER_SAMPLES
        and group.state is GroupState.TRAINING
    }
    for replica, seconds in busy.items() if len(busy) >= 2 else ():
        others = statistics.median(s for other, s in busy.items() if other != replica)
        step = state.groups[replica].pace or 0.0
        if seconds <= STRAGGLER_RATIO * others or seconds - others < STRAGGLER_COST * step:
            continue
        host = state.groups[replica].where
        where = f" on {host}" if host else ""
        yield Finding(
            kind="straggler",
            severity=Severity.WARNING,
            replica=replica,
            message=f"replica {replica}{where} works {seconds:.3g} s a step by itself, the others "
            f"{others:.3g} s and wait for it: look there for heat, other processes and slow data; if "
            f"it stays, {snapshot.drain(host)} and {snapshot.requeue(replica)}",
        )


def _in_the_queue(snapshot: Snapshot) -> Iterator[Finding]:
    for group in snapshot.state.groups.values():
        task = f"{snapshot.job}_{group.replica}"
        if group.waiting == "BeginTime":
            yield Finding(
                kind="waiting_begin_time",
                severity=Severity.INFO,
                replica=group.replica,
                message=f"replica {group.replica} waits for Slurm's requeue delay: its owner can cut "
                f"it with `scontrol update JobId={task} StartTime=now`",
            )
        elif "held" in group.waiting.lower():
            yield Finding(
                kind="held_by_slurm",
                severity=Severity.WARNING,
                replica=group.replica,
                message=f"replica {group.replica} is held ({group.waiting}): `scontrol release {task}`",
            )


def _second_copy(snapshot: Snapshot) -> Iterator[Finding]:
    for replica, uuids in snapshot.state.second_copies.items():
        yield Finding(
            kind="second_copy",
            severity=Severity.CRITICAL,
            replica=replica,
            message=f"{len(uuids)} copies of replica {replica} are in one quorum "
            f"({', '.join(uuid[:8] for uuid in uuids)}): an old one lives on a node that Slurm has "
            "given up; end it there",
        )


def _started_over(snapshot: Snapshot) -> Iterator[Finding]:
    for incident in snapshot.state.incidents:
        if incident.started_over and incident.recovered_at is None:
            yield Finding(
                kind="started_over",
                severity=Severity.CRITICAL,
                replica=incident.replica,
                message=f"replica {incident.replica} was lost at step {incident.lost_at_step} and "
                "trains again from before it, with nobody to heal from: its weights are its own. "
                "Cancel it, and start the run again from a checkpoint",
            )


def _lighthouse(snapshot: Snapshot) -> Iterator[Finding]:
    recent = [t for t in snapshot.state.lighthouse_errors if snapshot.now - t < LIGHTHOUSE_SECONDS]
    if recent:
        yield Finding(
            kind="lighthouse_unreachable",
            severity=Severity.CRITICAL,
            message=f"replica groups cannot reach the lighthouse ({len(recent)} failures in "
            f"{LIGHTHOUSE_SECONDS:.0f} s): `python -m launcher lighthouse status` on its host",
        )


def _stand_in(snapshot: Snapshot) -> Iterator[Finding]:
    if snapshot.state.stand_in is not None and not snapshot.state.finished:
        replica, host, t = snapshot.state.stand_in
        yield Finding(
            kind="lighthouse_stand_in",
            severity=Severity.WARNING,
            message=f"replica {replica} on {host} has stood in for the lighthouse for "
            f"{max(0.0, snapshot.now - t):.0f} s, and no guardian looks after the run: `python -m "
            "launcher lighthouse up --detach` where it ran, or with its --name elsewhere",
        )


def _gpus(snapshot: Snapshot) -> Iterator[Finding]:
    for group in snapshot.state.groups.values():
        for t, host, gpu, xid in list(group.xids)[-1:]:
            if snapshot.now - t < XID_SECONDS:
                yield Finding(
                    kind="gpu_xid",
                    severity=Severity.CRITICAL,
                    replica=group.replica,
                    message=f"the driver reported Xid {xid} on GPU {gpu} of {host} (replica "
                    f"{group.replica}): look it up in NVIDIA's list of Xid errors; if it comes again, "
                    f"{snapshot.drain(host)}",
                )
        warm = sorted(s["celsius"] for s in group.gpus.values() if s.get("celsius") is not None)
        usual = warm[len(warm) // 2] if len(warm) > 2 else None
        for (host, gpu), sample in group.gpus.items():
            where = f"of {host} (replica {group.replica})"
            new = int(sample.get("ecc") or 0) - group.ecc_before.get((host, gpu), 0)
            if new > 0:
                yield Finding(
                    kind="gpu_ecc",
                    severity=Severity.CRITICAL,
                    replica=group.replica,
                    message=f"{new} uncorrected memory errors on GPU {gpu} {where}: {snapshot.drain(host)}",
                )
            if sample.get("slowed"):
                yield Finding(
                    kind="gpu_throttled",
                    severity=Severity.WARNING,
                    replica=group.replica,
                    message=f"GPU {gpu} {where} runs slower than it could "
                    f"({', '.join(sample['slowed'])}): every replica group waits for it",
                )
            if usual is not None and (sample.get("celsius") or 0) >= usual + HOTTER:
                yield Finding(
                    kind="gpu_hot",
                    severity=Severity.WARNING,
                    replica=group.replica,
                    message=f"GPU {gpu} {where} has {sample['celsius']} degrees, its peers {usual}: "
                    "check its cooling before it throttles",
                )


RULES: tuple[Rule, ...] = (
    _gpus,
    _blind,
    _strange_logs,
    _second_copy,
    _started_over,
    _weights,
    _loss,
    _stalled,
    _straggler,
    _lighthouse,
    _stand_in,
    _restart_storm,
    _bad_node,
    _in_the_queue,
)
