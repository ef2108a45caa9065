"""Where a run stands, and what is observed of it in time: Slurm's word, and waiting. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from launcher.contacts import Contacts
from launcher.events import Event
from launcher.groups import Group
from launcher.incidents import SIGN_WINDOW, Cause, Incident, Sign, unreachable_sign
from launcher.lighthouse_log import Waiting
from launcher.model import GroupState
from launcher.slurm import Job, Node
from launcher.stalls import patience, silent, stalls_at
from launcher.weights import WeightLedger

#: Incidents kept; older ones are only counted.
MOST_INCIDENTS = 2000


@dataclass(frozen=True, slots=True)
class Notice:
    """One line of the story."""

    t: float
    text: str


@dataclass(slots=True)
class Observed:
    """Where a run stands, and what is seen of it besides its events."""

    group_size: int
    """Replica groups that the run is to have; 0 when it is not known (bare logs)."""
    steps: int | None = None
    """Last step of the training, when it is known."""
    nodes_per_group: int = 1
    sync_every: int = 1
    """Steps of a group between two syncs; every commit is one, and ``step`` counts those."""
    groups: dict[int, Group] = field(default_factory=dict)
    quorum_id: int = 0
    quorum_since: float | None = None
    step: int = 0
    members: dict[int, str] = field(default_factory=dict)
    """Replica groups in the current quorum, with the uuid of the copy that is in it."""
    second_copies: dict[int, list[str]] = field(default_factory=dict)
    """Groups of which two copies are in the current quorum, with their uuids."""
    incidents: list[Incident] = field(default_factory=list)
    weights: WeightLedger = field(default_factory=WeightLedger)
    first_event: float | None = None
    last_event: float = 0.0
    seconds_below_full: float = 0.0
    wanted_seconds: float = 0.0
    """Integral of the run's size over the same time; it may be scaled."""
    member_seconds: float = 0.0
    """Integral of the quorum's size over time, for the mean participation."""
    lighthouse_starts: int = 0
    lighthouse_errors: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """Times at which replicas could not reach the lighthouse."""
    seen_full: bool = False
    """Whether all groups have been in one quorum."""
    contacts: Contacts = field(default_factory=Contacts)
    outage: Incident | None = None
    """The incident of the lighthouse that has not ended."""
    stand_in: tuple[int, str, float] | None = None
    """Replica group that runs the lighthouse, its node, and since when."""
    scheduler: str = "Slurm"
    """Who runs its tasks, in words."""

    def __post_init__(self) -> None:
        for replica in range(self.group_size):
            self.groups.setdefault(replica, Group(replica=replica))

    @property
    def size(self) -> int:
        return self.group_size or len(self.groups)

    @property
    def counted(self) -> str:
        """What ``step`` counts, in a word."""
        return "sync" if self.sync_every > 1 else "step"

    @property
    def finished(self) -> bool:
        return bool(self.groups) and all(g.state is GroupState.DONE for g in self.groups.values())

    def group(self, replica: int) -> Group:
        group = self.groups.get(replica)
        if group is None:
            group = self.groups[replica] = Group(replica=replica)
        return group

    def group_of_task(self, task: int) -> Group | None:
        """The replica group that array task ``task`` runs; None for a spare."""
        for group in self.groups.values():
            if group.task_index == task:
                return group
        return None

    def open_incident(self, replica: int) -> Incident | None:
        """The incident of a replica group that has not ended."""
        for incident in reversed(self.incidents):
            if incident.replica == replica:
                return incident if incident.recovered_at is None else None
        return None

    def enter(self, group: Group, state: GroupState, t: float) -> None:
        if group.state is not state:
            group.state, group.since = state, t

    def open(self, replica: int, t: float, step: int) -> Incident:
        group = self.group(replica)
        incident = self.open_incident(replica)
        if incident is None:
            nodes = group.nodes
            host = group.host if len(nodes) < 2 else ""
            incident = Incident(
                replica=replica, host=host, nodes=nodes, first_sign=t, lost_at_step=step
            )
            incident.lost_uuid = group.uuid
            self._keep(incident)
        incident.explain([sign for sign in group.signs if t - sign.t < SIGN_WINDOW])
        return incident

    def open_outage(self, t: float, signs: list[Sign]) -> Incident:
        """The incident of the lighthouse, which is not there at ``t``."""
        if self.outage is None:
            self.outage = Incident(
                replica=None, kind="lighthouse_lost", first_sign=t, lost_at_step=self.step
            )
            self.outage.detected_at = t
            self._keep(self.outage)
        self.outage.explain(signs)
        return self.outage

    def _keep(self, incident: Incident) -> None:
        self.incidents.append(incident)
        del self.incidents[:-MOST_INCIDENTS]

    def count_time(self, t: float) -> None:
        """Account for the time of the quorum that ends at ``t``."""
        if self.quorum_since is None or not self.members:
            return
        seconds = max(0.0, t - self.quorum_since)
        self.member_seconds += seconds * len(self.members)
        if self.seen_full or len(self.members) >= self.size:
            self.wanted_seconds += seconds * self.size
        if self.seen_full and len(self.members) < self.size:
            self.seconds_below_full += seconds

    def resize(self, replicas: int, t: float) -> list[Notice]:
        """The run is to have another number of replica groups from now on."""
        self.count_time(t)
        self.quorum_since = t if self.members else self.quorum_since
        before, self.group_size = self.size, replicas
        self.__post_init__()
        self.seen_full = len(self.members) >= self.size
        for group in self.groups.values():
            if group.replica < self.group_size:
                continue
            group.left = group.ended_ok = True
            if group.replica not in self.members:
                self.enter(group, GroupState.DONE, t)
        return [Notice(t, f"the run is resized: {self.size} replica groups, before {before}")]

    def observe(self, jobs: Iterable[Job], asked: float) -> list[Event]:
        """Note what Slurm says of the run's array tasks, who were asked about at ``asked``.

        Returns:
            What of it belongs to the story. It is folded in as every other event, and recorded,
            for Slurm will not say it again.
        """
        events = []
        for group in self.groups.values():
            group.waiting = group.slurm_state = group.expected_start = ""
        of_task = {group.task_index: group for group in self.groups.values()}
        for job in jobs:
            known = None if job.task is None else of_task.get(job.task)
            if known is None:
                continue
            group = known
            waiting = job.reason if job.state == "PENDING" and job.reason != "None" else ""
            group.waiting, group.slurm_state = waiting, job.state
            group.expected_start = job.start if job.state == "PENDING" else ""
            incident = self.open_incident(group.replica)
            untold = incident is not None and incident.requeued_at is None
            if waiting and group.attempt and (untold or group.state is not GroupState.REQUEUED):
                event = Event(
                    t=asked, kind="queued", replica=group.replica, fields={"reason": waiting}
                )
                events += [event] if self._is_queued(group, asked) else []
        return events

    def _is_queued(self, group: Group, t: float) -> bool:
        """Whether a group can have waited in the queue at ``t``; not if it has started since."""
        return group.state is not GroupState.DONE and group.launched_at < t

    def _queued(self, group: Group, event: Event) -> Iterable[Notice]:
        """Recorded by who looks after the run: Slurm has put the group back into its queue."""
        if not self._is_queued(group, event.t):
            return
        incident = self.open_incident(group.replica)
        if incident is not None and incident.requeued_at is None:
            incident.requeued_at = event.t
        if group.state is not GroupState.REQUEUED:
            self.enter(group, GroupState.REQUEUED, event.t)
            name = f"replica {group.replica} requeued by {self.scheduler}"
            yield Notice(event.t, f"{name}, waiting ({event.get('reason')})")

    def observe_nodes(self, nodes: Iterable[Node], asked: float) -> list[Event]:
        """Note Slurm's word, asked for at ``asked``, on the nodes of groups that are lost.

        Returns:
            What of it belongs to the story, as ``observe`` does.
        """
        nodes = list(nodes)
        silent = {node.name: node.state for node in nodes if not node.responds}
        unusable = {node.name for node in nodes if not (node.up and node.responds)}
        events = []
        for incident in self.incidents[-64:]:
            if incident.recovered_at is not None or incident.replica is None:
                continue
            host = incident.host
            if not host:
                down = [name for name in incident.nodes if name in unusable]
                host = down[0] if len(down) == 1 else ""
            # A node that falls silent later did not cause it; one that was resumed has the mark
            # too, until it has registered.
            told = incident.end_told() or _is_blamed(incident)
            quiet = host in silent and not told
            if quiet or host != incident.host:
                fields = {"host": host, "state": silent.get(host, ""), "silent": quiet}
                events.append(Event(t=asked, kind="node", replica=incident.replica, fields=fields))
        return events

    def _node(self, group: Group, event: Event) -> Iterable[Notice]:
        """Recorded by who looks after the run: which node of a lost group is to blame."""
        incident = self.open_incident(group.replica)
        if incident is None:
            return
        host = str(event.get("host", ""))
        incident.host = incident.host or host
        if not event.get("silent") or host != incident.host:
            return
        if incident.end_told() or _is_blamed(incident):
            return
        incident.explain([unreachable_sign(event.t, host)])
        text = f"node {host} of replica {group.replica} does not respond"
        yield Notice(event.t, f"{text} ({self.scheduler}: {event.get('state')})")

    def observe_waiting(self, waiting: Waiting, now: float) -> None:
        """Fold in what the lighthouse's next quorum waits for: a stall shows by time alone.

        It changes states only, and no incident: what a wait was about is told, with the same
        words after every restart of the monitor, by the quorum that ends it.
        """
        stalled = [] if self.finished else silent(waiting, self.members, self.groups, now)
        usual = patience(self.groups.values()) if stalled else 0.0
        for group in self.groups.values():
            if group.replica in stalled:
                if group.state is not GroupState.STALLED:
                    group.before_stall = group.state
                since = stalls_at(waiting, group, usual)
                self.enter(group, GroupState.STALLED, since)
            elif group.state is GroupState.STALLED:
                self.enter(group, group.before_stall, now)


def _is_blamed(incident: Incident) -> bool:
    """Whether its node's silence is noted already."""
    return any(sign.cause is Cause.NODE_UNREACHABLE for sign in incident.evidence)
