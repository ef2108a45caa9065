"""The state of a run: a pure fold of events and of what Slurm says, with the story it tells.

Its size depends on the number of replica groups and incidents, never on the number of steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from launcher.events import Event
from launcher.groups import Group
from launcher.incidents import SIGN_WINDOW, Incident, Sign, hang_sign, same_process_sign, sign_of
from launcher.model import GroupState
from launcher.slurm import Job
from launcher.weights import WeightLedger

#: Seconds that others must have waited for a group before its silence counts as a hang.
HANG_SECONDS = 8.0
#: Incidents kept; older ones are only counted.
MOST_INCIDENTS = 2000


@dataclass(frozen=True, slots=True)
class Notice:
    """One line of the story."""

    t: float
    text: str


@dataclass(slots=True)
class RunState:
    """Everything known of a run after some events."""

    group_size: int
    """Replica groups of the whole run; 0 when it is not known (bare logs)."""
    steps: int | None = None
    """Last step of the training, when it is known."""
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
    member_seconds: float = 0.0
    """Integral of the quorum's size over time, for the mean participation."""
    events: int = 0
    lighthouse_starts: int = 0
    lighthouse_errors: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """Times at which replicas could not reach the lighthouse."""
    _seen_full: bool = False

    def __post_init__(self) -> None:
        for replica in range(self.group_size):
            self.groups.setdefault(replica, Group(replica=replica))

    @property
    def size(self) -> int:
        return self.group_size or len(self.groups)

    @property
    def finished(self) -> bool:
        return bool(self.groups) and all(g.state is GroupState.DONE for g in self.groups.values())

    def group(self, replica: int) -> Group:
        return self.groups.setdefault(replica, Group(replica=replica))

    def open_incident(self, replica: int) -> Incident | None:
        for incident in reversed(self.incidents):
            if incident.replica == replica:
                return incident if incident.recovered_at is None else None
        return None

    def apply(self, event: Event) -> list[Notice]:
        """Fold one event in; returns what a person wants to hear of it."""
        self.events += 1
        self.last_event = max(self.last_event, event.t)
        if self.first_event is None or event.t < self.first_event:
            self.first_event = event.t
        if event.kind == "membership":
            return self._membership(event)
        if event.kind == "listening":
            self.lighthouse_starts += 1
            if self.lighthouse_starts > 1 or self.quorum_id:
                return [Notice(event.t, "the lighthouse was started again")]
        if event.kind in ("heartbeat_failed", "quorum_failed"):
            self.lighthouse_errors.append(event.t)
        if event.replica is None or event.replica > 1_000_000:
            return []
        group = self.group(event.replica)
        sign = sign_of(event)
        if sign is not None:
            self._sign(group, sign)
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
                    self._enter(group, GroupState.REQUEUED, now)
            group.waiting, group.slurm_state = waiting, job.state
            group.expected_start = job.start if job.state == "PENDING" else ""
        return notices

    # -- the lighthouse's view -----------------------------------------------------

    def _membership(self, event: Event) -> list[Notice]:
        entries: list[tuple[int, str, int, str]] = event.fields["members"]
        now: dict[int, str] = {}
        self.second_copies = {}
        steps: dict[int, int] = {}
        for replica, uuid, step, _ in sorted(entries, key=lambda e: e[2]):
            if replica in now:
                self.second_copies.setdefault(replica, [now[replica]]).append(uuid)
            now[replica], steps[replica] = uuid, step
        self._count_time(event.t)
        before, self.members = self.members, now
        self.quorum_id, self.quorum_since = event.fields["quorum_id"], event.t
        top = max(steps.values(), default=0)
        self.step = max(self.step, top)
        changes = []
        for replica in sorted(set(before) - set(now)):
            if not self.group(replica).ended_ok:
                self._lost(event, replica, top)
                changes.append(f"replica {replica} LOST")
        for replica in sorted(now):
            if before.get(replica) != now[replica]:
                changes.append(self._joined(event, replica, before, steps[replica], top))
        for replica, uuids in self.second_copies.items():
            changes.append(f"replica {replica} is there {len(uuids)} times")
        if len(now) >= self.size:
            self._seen_full = True
            for incident in self.incidents[-64:]:
                if incident.rejoined_at is not None and incident.full_strength_at is None:
                    incident.full_strength_at = event.t
        size = f"{len(now)} of {self.size} replica groups"
        what = f"; {', '.join(changes)}" if changes else ""
        return [Notice(event.t, f"quorum {self.quorum_id} at step {top}: {size}{what}")]

    def _lost(self, event: Event, replica: int, step: int) -> None:
        group = self.group(replica)
        incident = self._open(replica, event.t, step)
        incident.detected_at = event.t
        waited = event.get("waited")
        if waited is not None and waited.since is not None and replica not in waited.requested:
            seconds = event.t - waited.since
            if waited.requested and seconds > HANG_SECONDS:
                sign = hang_sign(waited.since, seconds, event.source)
                incident.explain([sign])
        if group.state not in (GroupState.STARTING, GroupState.REQUEUED):
            self._enter(group, GroupState.LOST, event.t)

    def _joined(
        self, event: Event, replica: int, before: dict[int, str], step: int, top: int
    ) -> str:
        group = self.group(replica)
        behind = step < top
        self._enter(group, GroupState.HEALING if behind else GroupState.TRAINING, event.t)
        incident = self.open_incident(replica)
        if incident is None and replica in before:
            # A new copy in place of the old one, with no quorum in between.
            incident = self._open(replica, event.t, top)
            incident.detected_at = event.t
        if incident is not None:
            incident.rejoined_at = incident.rejoined_at or event.t
            if incident.started_at is None and incident.lost_uuid == self.members[replica]:
                incident.explain([same_process_sign(incident.lost_at, event.source)])
        return f"replica {replica} joined" + (" (behind: will heal)" if behind else "")

    def _open(self, replica: int, t: float, step: int) -> Incident:
        group = self.group(replica)
        incident = self.open_incident(replica)
        if incident is None:
            incident = Incident(replica=replica, host=group.host, first_sign=t, lost_at_step=step)
            incident.lost_uuid = group.uuid
            self.incidents.append(incident)
            del self.incidents[:-MOST_INCIDENTS]
        incident.explain([sign for sign in group.signs if t - sign.t < SIGN_WINDOW])
        return incident

    def _count_time(self, t: float) -> None:
        if self.quorum_since is None or not self.members:
            return
        seconds = max(0.0, t - self.quorum_since)
        self.member_seconds += seconds * len(self.members)
        if len(self.members) >= self.size:
            self.seconds_full += seconds
        elif self._seen_full:
            self.seconds_below_full += seconds

    # -- a replica group's own view: one method a kind of event ----------------------

    def _enter(self, group: Group, state: GroupState, t: float) -> None:
        if group.state is not state:
            group.state, group.since = state, t

    def _sign(self, group: Group, sign: Sign) -> None:
        group.signs.append(sign)
        del group.signs[:-40]
        incident = self.open_incident(group.replica)
        if incident is not None and incident.started_at is None:
            incident.explain([sign])

    def _launch(self, group: Group, event: Event) -> Iterable[Notice]:
        group.attempt = int(event.get("attempt", 1))
        group.host = str(event.get("host", ""))
        group.last_commit, group.ended_ok = None, False
        group.gpus, group.ecc_before = {}, {}
        self._enter(group, GroupState.STARTING, event.t)
        incident = self.open_incident(group.replica)
        if incident is None and group.attempt > 1 and group.signs:
            incident = self._open(group.replica, event.t, group.step)
        if incident is not None:
            incident.started_at = event.t
        group.signs = []
        text = f"replica {group.replica} launched (attempt {group.attempt}) on {group.host}"
        yield Notice(event.t, text)

    def _healing(self, group: Group, event: Event) -> Iterable[Notice]:
        if int(event.get("max_step", 0)) > 0:
            self._enter(group, GroupState.HEALING, event.t)
        return ()

    def _heal(self, group: Group, event: Event) -> Iterable[Notice]:
        step, source = int(event.get("step", 0)), int(event.get("source", -1))
        if step == 0 or int(event.get("rank", 0)) != 0:
            return  # everyone takes replica 0's weights at the very start
        incident = self.open_incident(group.replica)
        if incident is not None:
            incident.healed_from, incident.healed_at = source, event.t
        yield Notice(
            event.t, f"replica {group.replica} healed from replica {source} at step {step}"
        )

    def _healed(self, group: Group, event: Event) -> Iterable[Notice]:
        """torchft's own line, where our structured event is not at hand."""
        step = int(event.get("step", 0))
        incident = self.open_incident(group.replica)
        if step == 0 or int(event.get("rank", 0)) != 0 or incident is None:
            return
        incident.healed_at = event.t
        yield Notice(event.t, f"replica {group.replica} healed at step {step}")

    def _commit(self, group: Group, event: Event) -> Iterable[Notice]:
        if int(event.get("rank", 0)) != 0:
            return
        step, t = int(event.get("step", 0)), event.t
        group.uuid = str(event.get("uuid") or self.members.get(group.replica, ""))
        if not event.get("committed"):
            group.failed_commits += 1
            group.failed_since_commit += 1
            yield Notice(t, f"replica {group.replica} failed to commit step {step}")
            return
        group.commits += 1
        group.step = step + 1
        self.step = max(self.step, group.step)
        self._enter(group, GroupState.TRAINING, t)
        self._pause(group, t)
        group.last_commit, group.failed_since_commit = t, 0
        # It got over the errors it logged; only what comes from outside still counts.
        group.signs = [sign for sign in group.signs if sign.weight > 3]
        incident = self.open_incident(group.replica)
        if incident is not None and (incident.started_over or group.step < incident.lost_at_step):
            if not incident.started_over:
                incident.started_over = True
                yield Notice(
                    t,
                    f"replica {group.replica} STARTED OVER at step {group.step} (lost at step "
                    f"{incident.lost_at_step}): it found nobody to heal from",
                )
        elif incident is not None and incident.rejoined_at is not None:
            incident.recovered_at, incident.recovered_at_step = t, group.step
            incident.compared_before = self.weights.compared
            group.signs = []
            yield Notice(
                t,
                f"replica {group.replica} RECOVERED: commits again at step {group.step}, "
                f"{t - incident.lost_at:.1f} s after the quorum lost it ({incident.why})",
            )

    def _pause(self, group: Group, t: float) -> None:
        """Account for the time since this group's last commit: its own, and of losses in it."""
        before = group.last_commit
        if before is None:
            return
        pause = t - before
        group.longest_pause = max(group.longest_pause, pause)
        mean = group.step_seconds
        group.step_seconds = pause if mean is None else mean + 0.1 * (pause - mean)
        for incident in self.incidents[-64:]:
            if incident.replica != group.replica and before <= incident.lost_at <= t:
                incident.survivor_stall_s = max(incident.survivor_stall_s, pause)
                incident.steps_lost = max(incident.steps_lost, group.failed_since_commit)

    def _metrics(self, group: Group, event: Event) -> Iterable[Notice]:
        loss = event.get("loss")
        group.loss = float(loss) if isinstance(loss, int | float) else None
        speed = event.get("tokens_per_second")
        group.tokens_per_second = float(speed) if isinstance(speed, int | float) else None
        return ()

    def _gpu(self, group: Group, event: Event) -> Iterable[Notice]:
        index = int(event.get("gpu", -1))
        if 0 <= index < 64:
            group.gpus[index] = dict(event.fields)
            group.ecc_before.setdefault(index, int(event.get("ecc") or 0))
        return ()

    def _xid(self, group: Group, event: Event) -> Iterable[Notice]:
        gpu, xid = int(event.get("gpu", -1)), int(event.get("xid", 0))
        group.xids.append((event.t, gpu, xid))
        yield Notice(event.t, f"Xid {xid} on GPU {gpu} of {group.host} (replica {group.replica})")

    def _weights(self, group: Group, event: Event) -> Iterable[Notice]:
        step, rank = int(event.get("step", -1)), int(event.get("rank", -1))
        differs = self.weights.add(group.replica, step, rank, str(event.get("hash")))
        if differs and self.weights.differences == 1:
            # From then on they differ at every step; the finding stays, and counts them.
            yield Notice(
                event.t, f"WEIGHTS DIFFER between replica groups at step {step}, rank {rank}"
            )

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
            group.ended_ok = True
            self._enter(group, GroupState.DONE, event.t)
            yield Notice(event.t, f"{name} finished at step {group.step}")
            return
        group.ended_ok = False
        self._enter(group, GroupState.LOST, event.t)
        if group.replica in self.members:
            self._open(group.replica, event.t, group.step)
        yield Notice(event.t, f"{name} on {group.host} ended with exit code {code}: {reason}")
