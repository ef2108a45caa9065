"""The state of a run: a pure fold of events and of what Slurm says, with the story it tells."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from launcher.events import Event
from launcher.model import GroupState
from launcher.slurm import Job


@dataclass(slots=True, kw_only=True)
class Incident:
    """A replica group that left the quorum without having finished. Times are Unix seconds."""

    replica: int
    lost_at: float
    """The first quorum without it."""
    lost_at_step: int
    cause: str = "unknown"
    requeued_at: float | None = None
    started_at: float | None = None
    rejoined_at: float | None = None
    healed_from: int | None = None
    recovered_at: float | None = None
    """Its first commit after coming back."""
    recovered_at_step: int | None = None


@dataclass(slots=True, kw_only=True)
class Group:
    """One replica group."""

    replica: int
    state: GroupState = GroupState.PENDING
    attempt: int = 0
    host: str = ""
    step: int = 0
    """Manager's step: commits, counted over the whole run."""
    commits: int = 0
    failed_commits: int = 0
    loss: float | None = None
    exit_reason: str = ""
    ended_ok: bool = False
    waiting: str = ""
    """Slurm's reason while it waits in the queue."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One line of the story."""

    t: float
    text: str


@dataclass(slots=True)
class RunState:
    """Everything known of a run after some events."""

    group_size: int
    steps: int | None = None
    """Last step of the training, when it is known."""
    groups: dict[int, Group] = field(default_factory=dict)
    quorum_id: int = 0
    members: dict[int, str] = field(default_factory=dict)
    """Replica groups in the current quorum, with the uuid of the copy that is in it."""
    incidents: list[Incident] = field(default_factory=list)
    last_event: float = 0.0

    def __post_init__(self) -> None:
        for replica in range(self.group_size):
            self.groups.setdefault(replica, Group(replica=replica))

    @property
    def finished(self) -> bool:
        return all(group.state is GroupState.DONE for group in self.groups.values())

    def group(self, replica: int) -> Group:
        return self.groups.setdefault(replica, Group(replica=replica))

    def open_incident(self, replica: int) -> Incident | None:
        for incident in reversed(self.incidents):
            if incident.replica == replica:
                return incident if incident.recovered_at is None else None
        return None

    def apply(self, event: Event) -> list[Notice]:
        """Fold one event in; returns what a person wants to hear of it."""
        self.last_event = max(self.last_event, event.t)
        if event.kind == "membership":
            return self._membership(event)
        if event.replica is None:
            return []
        group = self.group(event.replica)
        handler = getattr(self, f"_{event.kind}", None)
        return [] if handler is None else list(handler(group, event))

    def observe(self, jobs: Iterable[Job], now: float) -> list[Notice]:
        """Fold in what Slurm says of the run's array tasks."""
        notices = []
        for job in jobs:
            if job.task is None or job.task not in self.groups:
                continue
            group = self.groups[job.task]
            waiting = job.reason if job.state == "PENDING" and job.reason != "None" else ""
            if waiting and group.attempt and group.state is not GroupState.DONE:
                incident = self.open_incident(job.task)
                if incident is not None and incident.requeued_at is None:
                    incident.requeued_at = now
                if group.state is not GroupState.REQUEUED:
                    notices.append(
                        Notice(now, f"replica {job.task} requeued by Slurm, waiting ({waiting})")
                    )
                    group.state = GroupState.REQUEUED
            group.waiting = waiting
        return notices

    # -- one method a kind of event ----------------------------------------------

    def _membership(self, event: Event) -> list[Notice]:
        members: dict[int, tuple[str, int]] = event.fields["members"]
        now = {replica: uuid for replica, (uuid, _) in members.items()}
        if now == self.members and event.fields["quorum_id"] == self.quorum_id:
            return []
        before, self.members = self.members, now
        self.quorum_id = event.fields["quorum_id"]
        top = max((step for _, step in members.values()), default=0)
        changes = []
        for replica in sorted(set(before) - set(now)):
            if self.group(replica).ended_ok:
                continue
            self.group(replica).state = GroupState.LOST
            self.incidents.append(Incident(replica=replica, lost_at=event.t, lost_at_step=top))
            self.incidents[-1].cause = self.group(replica).exit_reason or "unknown"
            changes.append(f"replica {replica} LOST")
        for replica in sorted(now):
            if replica in before and before[replica] == now[replica]:
                continue
            group = self.group(replica)
            behind = members[replica][1] < top
            group.state = GroupState.HEALING if behind else GroupState.TRAINING
            incident = self.open_incident(replica)
            if incident is None and replica in before:
                # A new copy in place of the old one, with no quorum in between.
                incident = Incident(replica=replica, lost_at=event.t, lost_at_step=top)
                self.incidents.append(incident)
            if incident is not None:
                incident.rejoined_at = event.t
            changes.append(f"replica {replica} joined" + (" (behind: will heal)" if behind else ""))
        size = f"{len(now)} of {self.group_size} replica groups"
        what = f"; {', '.join(changes)}" if changes else ""
        return [Notice(event.t, f"quorum {self.quorum_id} at step {top}: {size}{what}")]

    def _launch(self, group: Group, event: Event) -> Iterable[Notice]:
        group.attempt = int(event.get("attempt", 1))
        group.host = str(event.get("host", ""))
        group.state = GroupState.STARTING
        group.exit_reason = ""
        incident = self.open_incident(group.replica)
        if incident is not None:
            incident.started_at = event.t
        text = f"replica {group.replica} launched (attempt {group.attempt}) on {group.host}"
        yield Notice(event.t, text)

    def _heal(self, group: Group, event: Event) -> Iterable[Notice]:
        step, source = int(event.get("step", 0)), int(event.get("source", -1))
        if step == 0 or int(event.get("rank", 0)) != 0:
            return  # everyone takes replica 0's weights at the very start
        incident = self.open_incident(group.replica)
        if incident is not None:
            incident.healed_from = source
        yield Notice(
            event.t, f"replica {group.replica} healed from replica {source} at step {step}"
        )

    def _commit(self, group: Group, event: Event) -> Iterable[Notice]:
        step = int(event.get("step", 0))
        if not event.get("committed"):
            group.failed_commits += 1
            yield Notice(event.t, f"replica {group.replica} failed to commit step {step}")
            return
        group.commits += 1
        group.step = step + 1
        group.state = GroupState.TRAINING
        incident = self.open_incident(group.replica)
        if incident is not None and incident.started_at is not None:
            incident.recovered_at, incident.recovered_at_step = event.t, group.step
            away = event.t - incident.lost_at
            yield Notice(
                event.t,
                f"replica {group.replica} RECOVERED: commits again at step {group.step}, "
                f"{away:.1f} s after the quorum lost it",
            )

    def _metrics(self, group: Group, event: Event) -> Iterable[Notice]:
        group.loss = event.get("loss")
        return ()

    def _end(self, group: Group, event: Event) -> Iterable[Notice]:
        # Said by every rank when training is over or has failed. At the last step, leaving
        # the quorum is no loss any more; the exit code has the last word.
        if self.steps is not None and int(event.get("titan_step") or 0) >= self.steps:
            group.ended_ok = True
        return ()

    def _exit(self, group: Group, event: Event) -> Iterable[Notice]:
        code, reason = int(event.get("code", 1)), str(event.get("reason", ""))
        name = f"replica {group.replica} (attempt {group.attempt})"
        if code == 0:
            group.state, group.ended_ok = GroupState.DONE, True
            yield Notice(event.t, f"{name} finished at step {group.step}")
            return
        group.state, group.exit_reason, group.ended_ok = GroupState.LOST, reason, False
        incident = self.open_incident(group.replica)
        if incident is not None and incident.cause == "unknown":
            incident.cause = reason
        yield Notice(event.t, f"{name} on {group.host} ended with exit code {code}: {reason}")
