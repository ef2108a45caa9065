"""What is wrong right now, by pure rules over a snapshot; each with a severity and a remedy."""

from __future__ import annotations

import bisect
import functools
import math
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from launcher.groups import Group
from launcher.model import GroupState
from launcher.remedies import Finding, Severity, Snapshot
from launcher.stalls import overdue, silent

__all__ = ["Finding", "Severity", "Snapshot", "judge"]

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
#: States in which a group's task is in the queue, and those in which its GPUs do its work.
IN_THE_QUEUE = (GroupState.PENDING, GroupState.REQUEUED)
AT_WORK = (GroupState.STARTING, GroupState.HEALING, GroupState.TRAINING, GroupState.STALLED)


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
            what=name,
            message=f"{name} cannot be read ({why}): what follows from it is not known. "
            f"Try {snapshot.look_at(name)}",
        )


def _strange_logs(snapshot: Snapshot) -> Iterator[Finding]:
    for name, (lines, events) in snapshot.lines.items():
        if lines >= STRANGE_LINES and not events:
            yield Finding(
                kind="log_not_understood",
                severity=Severity.WARNING,
                what=name,
                message=f"{lines} lines of {name} and not one that is understood: is it the right "
                f"file (`tail {shlex.quote(name)}`), and the version of torchft that "
                "`python -m launcher doctor` asks for?",
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
            f"for: look at its stacks (`ranks/{replica}.{state.groups[replica].attempt}/stacks.*.txt`, "
            f"where the guardian writes them), or end it with {snapshot.requeue(replica)}",
        )
    if overdue(waiting, state.groups.values(), snapshot.now) is None:
        return
    absent = [
        replica
        for replica, group in sorted(state.groups.items())
        if group.state in AT_WORK and replica not in waiting.requested
    ]
    status = (
        "`python -m launcher lighthouse status` says whether it answers, its log whom it waits for, "
        f"`python -m launcher status tft-{snapshot.job}` how each group stands"
    )
    if "need at least half" in waiting.status:
        who = f"replica {', '.join(map(str, absent))}" if absent else "the silent ones"
        yield Finding(
            kind="survivor_blocked",
            severity=Severity.CRITICAL,
            message=f"no quorum for {seconds:.0f} s: too few of the heartbeating replica groups "
            f"join; {who} must end before the others can go on: "
            f"{' and '.join(map(snapshot.requeue, absent[:3])) or status}",
        )
    elif waiting.requested.issuperset(state.members):
        hung = ""
        if absent:
            first = absent[0]
            hung = (
                f"; if replica {first} hangs while it starts ({snapshot.log(first)}), end it with "
                f"{snapshot.requeue(first)}"
            )
        yield Finding(
            kind="quorum_stalled",
            severity=Severity.WARNING,
            message=f"no new quorum for {seconds:.0f} s: {waiting.status or 'no reason is logged'}. "
            f"{status}{hung}",
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
                f"minutes: {snapshot.report} has the causes, {snapshot.log(replica)} the errors; the "
                "same error every time is one of the configuration or the code: "
                f"{snapshot.cancel}, and submit it corrected",
            )


def _bad_node(snapshot: Snapshot) -> Iterator[Finding]:
    recent = Counter(
        incident.host
        for incident in snapshot.state.incidents
        if incident.host and snapshot.now - incident.lost_at < BAD_NODE_SECONDS
    )
    for host, count in recent.items():
        exclude = f"leave it out with `sbatch --exclude={shlex.quote(host)}`"
        leave_out = f"{exclude}, or {snapshot.drain(host)}"
        if snapshot.local:
            leave_out = f"it is a share of this machine; {snapshot.report} has the causes"
        if count >= BAD_NODE_LOSSES:
            yield Finding(
                kind="bad_node",
                severity=Severity.WARNING,
                what=host,
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
            f"{ledger.differences} of {ledger.compared} compared pairs: {snapshot.cancel}, and start "
            f"again from a checkpoint before that step; {snapshot.report} has what happened then",
        )


def _loss(snapshot: Snapshot) -> Iterator[Finding]:
    for group in snapshot.state.groups.values():
        if group.loss is not None and not math.isfinite(group.loss):
            yield Finding(
                kind="loss_nan",
                severity=Severity.CRITICAL,
                replica=group.replica,
                message=f"the loss of replica {group.replica} is {group.loss}: "
                f"{snapshot.cancel}, and start again from a checkpoint before it, with a lower learning "
                f"rate or without that data; its log is {snapshot.log(group.replica)}",
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
    ordered = sorted(busy.values())
    for replica, seconds in busy.items() if len(busy) >= 2 else ():
        others = _median_without(ordered, seconds)
        step = state.groups[replica].pace or 0.0
        if seconds <= STRAGGLER_RATIO * others or seconds - others < STRAGGLER_COST * step:
            continue
        group = state.groups[replica]
        where = f" on {group.where}" if group.where else ""
        host = group.host if len(group.nodes) < 2 else ""  # of several, which one is not known
        yield Finding(
            kind="straggler",
            severity=Severity.WARNING,
            replica=replica,
            message=f"replica {replica}{where} works {seconds:.3g} s a step by itself, the others "
            f"{others:.3g} s and wait for it: look there for heat, other processes and slow data; if "
            f"it stays, {snapshot.drain(host)} and {snapshot.requeue(replica)}",
        )


def _median_without(ordered: Sequence[float], one: float) -> float:
    """The median of all but ``one`` of at least two numbers in order, that one among them."""
    at, last = bisect.bisect_left(ordered, one), len(ordered) - 2
    low, high = (ordered[i if i < at else i + 1] for i in (last // 2, (last + 1) // 2))
    return (low + high) / 2


def _in_the_queue(snapshot: Snapshot) -> Iterator[Finding]:
    for group in snapshot.state.groups.values():
        if group.state not in IN_THE_QUEUE:
            continue  # started or cancelled since Slurm was asked
        task = snapshot.task(group)
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
    state = snapshot.state
    for replica, uuids in state.second_copies.items():
        here = state.group(replica).where
        before = [i.where for i in state.incidents if i.replica == replica and i.where != here]
        yield Finding(
            kind="second_copy",
            severity=Severity.CRITICAL,
            replica=replica,
            message=f"{len(uuids)} copies of replica {replica} are in one quorum "
            f"({', '.join(uuid[:8] for uuid in uuids)}): an old one lives on "
            f"{before[-1] if before else 'a node'} that Slurm has given up; end it there "
            "(`pgrep -af launcher.task` shows it), or power that node off",
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
                f"{snapshot.cancel}, and start again from a checkpoint",
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
                    what=f"{host}/{gpu}",
                    message=f"the driver reported Xid {xid} on GPU {gpu} of {host} (replica "
                    f"{group.replica}): look it up in NVIDIA's list of Xid errors; if it comes again, "
                    f"{snapshot.drain(host)}",
                )
        usual = _usual_temperatures(group)
        for (host, gpu), sample in group.gpus.items():
            told = functools.partial(Finding, replica=group.replica, what=f"{host}/{gpu}")
            where = f"GPU {gpu} of {host} (replica {group.replica})"
            new = int(sample.get("ecc") or 0) - group.ecc_before.get((host, gpu), 0)
            if new > 0:
                yield told(
                    kind="gpu_ecc",
                    severity=Severity.CRITICAL,
                    message=f"{new} uncorrected memory errors on {where}: {snapshot.drain(host)}",
                )
            if group.state not in AT_WORK:
                continue  # what it was like at its end says nothing of now
            if sample.get("slowed"):
                yield told(
                    kind="gpu_throttled",
                    severity=Severity.WARNING,
                    message=f"{where} runs slower than it could ({', '.join(map(str, sample['slowed']))}), and "
                    "every replica group waits for it: there, `nvidia-smi -q -d "
                    f"PERFORMANCE,TEMPERATURE,POWER -i {gpu}`; if it stays, {snapshot.drain(host)} "
                    f"and {snapshot.requeue(group.replica)}",
                )
            if host in usual and _celsius(sample) >= usual[host] + HOTTER:
                yield told(
                    kind="gpu_hot",
                    severity=Severity.WARNING,
                    message=f"{where} has {_celsius(sample):g} degrees, its peers {usual[host]:g}: check "
                    f"its cooling (there, `nvidia-smi -q -d TEMPERATURE -i {gpu}`) before it throttles",
                )


def _celsius(sample: Mapping[str, object]) -> float:
    """What a GPU's sample says of its temperature; NaN, which is hotter than nothing, where it does not."""
    value = sample.get("celsius")
    return float(value) if isinstance(value, int | float) else math.nan


def _usual_temperatures(group: Group) -> dict[str, float]:
    """The median of the GPUs' temperatures on each of a group's nodes; of two the higher one."""
    warm: dict[str, list[float]] = {}
    for (host, _), sample in group.gpus.items():
        if math.isfinite(celsius := _celsius(sample)):
            warm.setdefault(host, []).append(celsius)
    return {host: statistics.median_high(values) for host, values in warm.items()}


def _ended_early(snapshot: Snapshot) -> Iterator[Finding]:
    state = snapshot.state
    if snapshot.over and not state.finished:
        of = f" of {state.steps}" if state.steps is not None else ""
        yield Finding(
            kind="ended_early",
            severity=Severity.CRITICAL,
            message=f"{state.scheduler} has no task of the run left, and it has not finished ({state.counted} "
            f"{state.step}{of}): the end of its `.err` logs says why; submitted again, it goes on from "
            "its last checkpoint, if it keeps any",
        )


RULES: tuple[Rule, ...] = (
    _ended_early,
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
