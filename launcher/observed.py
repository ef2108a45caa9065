"""Where a run stands, and what is observed of it in time: Slurm's word, and waiting. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from launcher.contacts import Contacts
from launcher.groups import Group
from launcher.incidents import SIGN_WINDOW, Cause, Incident, Sign, unreachable_sign
from launcher.lighthouse_log import Waiting
from launcher.model import GroupState
from launcher.slurm import Job, Node
from launcher.stalls import silent, stalls_at
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
    seconds_full: float = 0.0
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
        return self.groups.setdefault(replica, Group(replica=replica))

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
        if len(self.members) >= self.size:
            self.seconds_full += seconds
        elif self.seen_full:
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

    def observe(self, jobs: Iterable[Job], now: float) -> list[Notice]:
        """Fold in what Slurm says of the run's array tasks."""
        notices = []
        for job in jobs:
            group = None if job.task is None else self.group_of_task(job.task)
            if group is None:
                continue
            waiting = job.reason if job.state == "PENDING" and job.reason != "None" else ""
            if waiting and group.attempt and group.state is not GroupState.DONE:
                incident = self.open_incident(group.replica)
                if incident is not None and incident.requeued_at is None:
                    incident.requeued_at = now
                if group.state is not GroupState.REQUEUED:
                    text = (
                        f"replica {group.replica} requeued by {self.scheduler}, waiting ({waiting})"
                    )
                    notices.append(Notice(now, text))
                    self.enter(group, GroupState.REQUEUED, now)
            group.waiting, group.slurm_state = waiting, job.state
            group.expected_start = job.start if job.state == "PENDING" else ""
        return notices

    def observe_nodes(self, nodes: Iterable[Node], now: float) -> list[Notice]:
        """Fold in Slurm's word on the nodes of groups that are lost."""
        nodes = list(nodes)
        silent_hosts = {node.name: node.state for node in nodes if not node.responds}
        unusable = {node.name for node in nodes if not (node.up and node.responds)}
        notices = []
        for incident in self.incidents[-64:]:
            if incident.recovered_at is not None:
                continue
            if not incident.host:
                down = [name for name in incident.nodes if name in unusable]
                incident.host = down[0] if len(down) == 1 else ""
            if incident.host not in silent_hosts:
                continue
            known = any(sign.cause is Cause.NODE_UNREACHABLE for sign in incident.evidence)
            if known or incident.end_told():
                # A node that falls silent later did not cause it; one that was resumed has the
                # mark too, until it has registered.
                continue
            incident.explain([unreachable_sign(now, incident.host)])
            state = silent_hosts[incident.host]
            text = f"node {incident.host} of replica {incident.replica} does not respond"
            notices.append(Notice(now, f"{text} ({self.scheduler}: {state})"))
        return notices

    def observe_waiting(self, waiting: Waiting, now: float) -> None:
        """Fold in what the lighthouse's next quorum waits for: a stall shows by time alone.

        It changes states only, and no incident: what a wait was about is told, with the same
        words after every restart of the monitor, by the quorum that ends it.
        """
        stalled = [] if self.finished else silent(waiting, self.members, self.groups, now)
        for group in self.groups.values():
            if group.replica in stalled:
                if group.state is not GroupState.STALLED:
                    group.before_stall = group.state
                since = stalls_at(waiting, group, self.groups.values())
                self.enter(group, GroupState.STALLED, since)
            elif group.state is GroupState.STALLED:
                self.enter(group, group.before_stall, now)
