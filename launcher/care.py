"""What a run needs done for it right now. Pure: what is known in, actions out.

The owner's rights suffice for all of it. Nothing here waits or remembers: the same state asks
for the same actions, and the guardian does each of them once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from launcher.events import Clock
from launcher.findings import BAD_NODE_LOSSES, BAD_NODE_SECONDS
from launcher.groups import Group
from launcher.incidents import Cause, Incident
from launcher.lighthouse_log import Waiting
from launcher.model import GroupState
from launcher.restarts import Next
from launcher.slurm import Job, Node
from launcher.spares import Spare
from launcher.stalls import FIRST_STEPS_SECONDS, LATE_SECONDS
from launcher.stalls import patience as usual_patience
from launcher.state import RunState

#: Seconds that others wait for a group that said it is busy (with a checkpoint, for example).
BUSY_SECONDS = 1800.0
#: Seconds out of the quorum, with its task running, after which a group counts as stopped.
SILENT_SECONDS = 20.0
#: Seconds after which a group that starts again by itself is not taken over any more.
ALMOST_THERE = 3.0
#: Seconds after a loss in which a spare that stands ready is waited for.
SPARE_COMES_SECONDS = 10.0
#: Seconds after its launcher's last word in which slurmd ends a task, and after which it has
#: killed one (its KillWait is 30 by default).
ENDED_SECONDS, KILL_SECONDS = 3.0, 35.0
#: Seconds after its launcher's last word in which Slurm's own reason has been read.
CAUSE_SECONDS = 2.0
#: Seconds in which a task runs that has no copy of its group, before Slurm is not believed.
GONE_SECONDS = 120.0
#: Seconds that a start may take from launch to quorum.
START_SECONDS = 900.0
#: Requeues of a group by the guardian without one committed step in between.
MOST_REQUEUES = 10
#: Requeues of a spare by one guardian.
MOST_SPARE_REQUEUES = 5
#: Seconds up to which a waiting time can be Slurm's own (its default is 121).
LONGEST_DELAY = 600.0
#: Slurm's states of a task that ended badly, and that a requeue may mend. (A person cancels; a
#: time limit would come again.)
FAILED_STATES = frozenset({"FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"})
#: Slurm's reason when a node refused to start a task (its last copy there had not quite ended):
#: it waits for somebody to release it.
LAUNCH_HELD = "launch failed requeued held"


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One thing to do."""

    kind: str
    """``release``, ``start_now``, ``requeue``, ``restart`` or ``take_over``."""
    replica: int | None
    """None: for a spare, which is nobody's group yet."""
    attempt: int
    task: int
    """Array task that is meant."""
    why: str
    exclude: tuple[str, ...] = ()
    """Nodes to be left out, for ``start_now``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that is known of a run."""

    state: RunState
    now: float
    waiting: Waiting = field(default_factory=Waiting)
    jobs: Sequence[Job] = ()
    nodes: Mapping[str, Node] = field(default_factory=dict)
    excluded: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    """Nodes that were left out for a task, as last told to Slurm."""
    spares: Sequence[Spare] = ()
    """Spares that stand ready."""
    requeued: Mapping[int, int] = field(default_factory=dict)
    """How often each task has been requeued by this guardian."""
    collective: float = 30.0
    """Seconds after which a collective between replica groups fails."""


def needed(view: View) -> list[Action]:
    """Every action that the run needs now."""
    if view.state.finished:
        return []
    return [*_queue(view), *_taken_over(view), *_hung(view), *_silent(view)]


def _queue(view: View) -> Iterator[Action]:
    excluded = excluded_nodes(view)
    for job in view.jobs:
        if job.task is None:
            continue
        group = view.state.group_of_task(job.task)
        if job.state == "PENDING" and job.reason == LAUNCH_HELD:
            yield _act("release", group, f"{view.state.scheduler} says {job.reason}", task=job.task)
        elif job.state == "PENDING" and job.reason == "BeginTime":
            if not _is_requeue_delay(view, job) or _spare_comes(view, job.task):
                continue
            left = _without_the_lost_node(view, group, excluded)
            if left is None:
                continue
            why = "Slurm's requeue delay is cut short"
            if left:
                why += f", without {', '.join(left)}"
            yield _act("start_now", group, why, task=job.task, exclude=tuple(left))
        elif job.state == "PENDING" and "held" not in job.reason.lower():
            # It waits for a node: what was left out before may be all there is now.
            before = view.excluded.get(job.task, ())
            if before and before != tuple(excluded):
                why = f"left out: {', '.join(excluded) or 'no node'}, no longer {', '.join(before)}"
                yield _act("start_now", group, why, task=job.task, exclude=tuple(excluded))
        elif job.state in FAILED_STATES and (
            _may_come_back(group)
            if group is not None
            else view.requeued.get(job.task, 0) < MOST_SPARE_REQUEUES
        ):
            yield _act("requeue", group, f"{view.state.scheduler} says {job.state}", task=job.task)


def _is_requeue_delay(view: View, job: Job) -> bool:
    """Whether a task waits for what Slurm adds to a requeue, and not for a time that a person
    chose: it had started before (a spare is nobody's group yet), and it is a matter of minutes."""
    group = None if job.task is None else view.state.group_of_task(job.task)
    if group is not None and group.attempt == 0:
        return False
    start = Clock().seconds(job.start) if job.start else None
    return start is None or start - view.now < LONGEST_DELAY


def _without_the_lost_node(
    view: View, group: Group | None, excluded: Sequence[str]
) -> Sequence[str] | None:
    """Nodes to be left out of a start that does not wait for Slurm's delay; None: not yet.

    The delay is there so that a node that was given up while its slurmd lived has ended the old
    copy: one that gets the same task before may end the new one with it, or refuse it. The group
    starts on another node, or when the old copy has said that it ends.
    """
    if group is None:
        return excluded
    incident = view.state.open_incident(group.replica)
    if incident is None:
        unnoticed = group.replica in view.state.members
        return None if unnoticed and view.now - group.since < SPARE_COMES_SECONDS else excluded
    suspects = set(_suspects(view, group)) - set(excluded)
    if not suspects:
        return excluded
    end = incident.first_sign if incident.ended_at is None else incident.ended_at
    since = view.now - (end if incident.started_at is None else max(end, group.launched_at))
    if incident.cause is Cause.UNKNOWN and since < CAUSE_SECONDS:
        return None  # what Slurm says of it has not been read
    if incident.cause not in (Cause.NODE_DOWN, Cause.NODE_UNREACHABLE, Cause.UNKNOWN):
        return excluded  # Slurm itself waits until the node has ended the old copy
    free = _spare_nodes(view) - len(excluded)
    known = [node for name in suspects if (node := view.nodes.get(name)) is not None]
    down = len(known) == len(suspects) and not any(node.up for node in known)
    if free >= len(suspects) or down:
        return sorted([*excluded, *suspects])
    told = incident.ended_at is not None or incident.started_at is not None
    return excluded if since > (ENDED_SECONDS if told else KILL_SECONDS) else None


def _suspects(view: View, group: Group) -> Sequence[str]:
    """Nodes of a group, one of which was lost: those that are not up, or else all of them."""
    nodes = group.nodes or (group.host,)
    return [name for name in nodes if (node := view.nodes.get(name)) and not node.up] or nodes


def _spare_comes(view: View, task: int) -> bool:
    """Whether a spare is about to take over the group of a task, which need not hurry then: the
    group that it started would be fenced on its way."""
    group = view.state.group_of_task(task)
    if group is None:
        return False
    incident = view.state.open_incident(group.replica)
    if incident is not None:
        lost, since = _nodes_of(incident), incident.lost_at
    elif group.replica in view.state.members:  # its loss is about to be noticed
        lost, since = group.nodes or (group.host,), group.since
    else:
        return False
    fits = any(spare.host not in lost for spare in view.spares)
    return fits and view.now - since < SPARE_COMES_SECONDS


def _taken_over(view: View) -> Iterator[Action]:
    """Lost groups, each with a spare that stands ready."""
    free = list(view.spares)
    for group in view.state.groups.values():
        incident = view.state.open_incident(group.replica)
        if incident is None or incident.rejoined_at is not None or group.ended_ok:
            continue
        if 0 < view.state.group_size <= group.replica:
            continue  # the run has been scaled down
        if group.next == Next.NEVER.value or not _out(view, group):
            continue
        fitting = [spare for spare in free if spare.host not in _nodes_of(incident)]
        if not fitting:
            continue
        spare = fitting[0]
        free.remove(spare)
        why = f"the spare in task {spare.task} on {spare.host} stands ready"
        yield _act("take_over", group, why, task=spare.task)


def _out(view: View, group: Group) -> bool:
    """Whether a group is away, and not just about to come back by itself."""
    # Between two syncs there is no quorum that would tell: its own last word does.
    ended = group.ended and view.state.sync_every > 1
    if group.replica in view.state.members and not ended:
        return False
    starting = group.state is GroupState.STARTING and view.now - group.since > ALMOST_THERE
    return group.state is not GroupState.DONE and not starting


def _may_come_back(group: Group) -> bool:
    """A failed task whose launcher was killed, or could not requeue itself. One that never
    started its training failed for something that a person must mend."""
    if group.attempt == 0 or group.ended_ok or group.left or group.next == Next.NEVER.value:
        return False
    # One that was told to end, by whomever, is CANCELLED or pending if that was meant. (It may also
    # have been killed before it could do what it said it would.)
    return group.requeues < MOST_REQUEUES


def _hung(view: View) -> Iterator[Action]:
    """Members of the quorum that others wait for too long."""
    state, waiting = view.state, view.waiting
    if waiting.since is None or not waiting.requested:
        return
    for replica in state.members:
        group = state.group(replica)
        if replica in waiting.requested or not _runs(group):
            continue
        waited = view.now - max(waiting.since, group.progress_at)
        longer = view.collective if _another_is_away(view, replica) else 0.0
        if waited > patience(state, group) + longer:
            why = f"hung: did not join the quorum that others waited {waited:.0f} s for"
            yield _act("restart", group, why, task=group.task_index)


def _another_is_away(view: View, replica: int) -> bool:
    """Whether one more member has not joined, or is a new copy: that one may have died in a
    collective, in which this one then waits until the collective's own time is over, while
    others saw it break at once."""
    return any(
        other not in view.waiting.requested or not _runs(view.state.group(other))
        for other in view.state.members
        if other != replica
    )


def patience(state: RunState, group: Group) -> float:
    """Seconds that others wait for a group before it is taken to be hung."""
    if group.busy:
        return BUSY_SECONDS
    if group.last_commit is None or group.last_commit < (state.quorum_since or 0.0):
        return FIRST_STEPS_SECONDS
    if group.warming:
        return FIRST_STEPS_SECONDS
    late = LATE_SECONDS if group.progress_at else 0.0
    return usual_patience(state.groups.values()) + late


def _silent(view: View) -> Iterator[Action]:
    """Groups that are out of the quorum, or never come to it, while their tasks run."""
    running = {job.task for job in view.jobs if job.state == "RUNNING"}
    for group in view.state.groups.values():
        nodes = map(view.nodes.get, group.nodes or (group.host,))
        if group.task_index not in running or not all(n is None or n.responds for n in nodes):
            continue
        seconds = view.now - max(group.since, group.progress_at)
        if group.ended or group.state is GroupState.REQUEUED:
            # Slurm may have lost its copy: a late word of the one before ended it.
            if seconds > GONE_SECONDS and _may_come_back(group):
                why = f"{view.state.scheduler} says RUNNING, and nothing of it has run for {seconds:.0f} s"
                yield _act("requeue", group, why, task=group.task_index)
            continue
        if group.replica in view.waiting.requested:
            continue  # it waits for the others, with a semi-sync method until their next sync
        if group.state is GroupState.LOST and seconds > SILENT_SECONDS and view.state.members:
            why = f"stopped: silent for {seconds:.0f} s, and its task runs"
            yield _act("restart", group, why, task=group.task_index)
        elif group.state is GroupState.STARTING and seconds > START_SECONDS:
            why = f"stuck: starting for {seconds:.0f} s"
            yield _act("restart", group, why, task=group.task_index)


def _runs(group: Group) -> bool:
    return group.state in (GroupState.TRAINING, GroupState.HEALING, GroupState.STALLED)


def excluded_nodes(view: View) -> list[str]:
    """Nodes that are to be left out: unfit ones, and those on which groups were lost again and
    again; never so many that the run could not have all its nodes."""
    losses: Counter[str] = Counter()
    for incident in view.state.incidents:
        if incident.host and view.now - incident.lost_at < BAD_NODE_SECONDS:
            losses[incident.host] += 1
    bad = {host: count for host, count in losses.items() if count >= BAD_NODE_LOSSES}
    for host, t in view.state.unfit.items():
        if view.now - t < BAD_NODE_SECONDS:
            bad[host] = bad.get(host, 0) + 1000  # it said so itself
    worst = sorted(bad, key=lambda host: (-bad[host], host))
    return sorted(worst[: _spare_nodes(view)])


def _spare_nodes(view: View) -> int:
    """Nodes that are up beyond those that the run needs."""
    tasks = max(view.state.size, len({job.task for job in view.jobs}))
    up = sum(node.up for node in view.nodes.values())
    return max(0, up - tasks * view.state.nodes_per_group)


def _nodes_of(incident: Incident) -> tuple[str, ...]:
    return incident.nodes or (incident.host,)


def _act(
    kind: str, group: Group | None, why: str, *, task: int, exclude: tuple[str, ...] = ()
) -> Action:
    return Action(
        kind=kind,
        replica=None if group is None else group.replica,
        attempt=0 if group is None else group.attempt,
        task=task,
        why=why,
        exclude=exclude,
    )
