"""What the lighthouse's quorums tell of a run: who is there, who is lost, who is back. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from launcher.events import Event
from launcher.groups import Group
from launcher.incidents import Cause, Incident, hang_sign, left_out_sign, same_process_sign
from launcher.lighthouse_log import Waiting
from launcher.model import GroupState
from launcher.observed import Notice
from launcher.outages import Outages
from launcher.timeouts import HANG_SECONDS


@dataclass(slots=True)
class Quorums(Outages):
    """What a run's events tell of its quorums."""

    def _commit(self, group: Group, event: Event) -> Iterable[Notice]:
        """A step that a group has committed, or tried to."""
        raise NotImplementedError

    def _membership(self, event: Event) -> list[Notice]:
        entries: list[tuple[int, str, int, str]] = event.fields["members"]
        now: dict[int, str] = {}
        self.second_copies = {}
        steps: dict[int, int] = {}
        for replica, uuid, step, _ in sorted(entries, key=lambda e: e[2]):
            if replica in now:
                self.second_copies.setdefault(replica, [now[replica]]).append(uuid)
            now[replica], steps[replica] = uuid, step
        self.count_time(event.t)
        for group in self.groups.values():
            # Measured in another quorum, with another load on network and nodes: not comparable.
            group.busy_seconds, group.busy_samples = None, 0
        before, self.members = self.members, now
        self.quorum_id, self.quorum_since = event.fields["quorum_id"], event.t
        top = max(steps.values(), default=0)
        self.step = max(self.step, top)
        outage = self.outage
        changes = []
        for replica in sorted(set(before) - set(now)):
            group = self.group(replica)
            group.last_commit = None  # its own absence is no pause of a survivor
            if group.ended_ok:
                self._is_done(group, event.t)
            else:
                lost = self._lost(event, replica, top)
                lost.explain([left_out_sign(event.t, event.source)] if outage is not None else [])
                changes.append(f"replica {replica} LOST")
        for replica in sorted(now):
            if before.get(replica) != now[replica]:
                changes.append(self._joined(event, replica, before, steps[replica], top))
        for replica, uuids in self.second_copies.items():
            changes.append(f"replica {replica} is there {len(uuids)} times")
        if outage is not None:
            outage.rejoined_at = outage.rejoined_at or event.t
        if len(now) >= self.size:
            self.seen_full = True
            for incident in self.incidents[-64:]:
                if incident.rejoined_at is not None and incident.full_strength_at is None:
                    incident.full_strength_at = event.t
        size = f"{len(now)} of {self.size} replica groups"
        what = f"; {', '.join(changes)}" if changes else ""
        return [Notice(event.t, f"quorum {self.quorum_id} at step {top}: {size}{what}")]

    def _from_quorum(self, event: Event) -> list[Notice]:
        """Steps of groups that do not tell of them: nobody joins a quorum for a step who has not
        committed the one before."""
        notices: list[Notice] = []
        failed = event.kind == "commit_failed"
        steps = event.get("steps") or [(r, self.group(r).step) for r in event.get("replicas", ())]
        for replica, step in steps:
            group = self.group(replica)
            if group.tells or not (failed or step > group.step):
                continue
            if not failed and not event.get("in_a_row"):
                group.last_commit = None  # what came between was not looked at: it was no pause
            skipped = step - 1 - group.step
            if not failed and group.state is GroupState.TRAINING and skipped > 0:
                group.commits += skipped
            fields = {
                "step": step if failed else step - 1,
                "committed": not failed,
                "inferred": True,
            }
            commit = Event(
                t=event.t, kind="commit", replica=replica, fields=fields, source=event.source
            )
            notices += self._commit(group, commit)
        return notices

    def _lost(self, event: Event, replica: int, step: int) -> Incident:
        group = self.group(replica)
        incident = self.open(replica, event.t, step)
        incident.detected_at = event.t
        incident.rejoined_at = incident.healed_at = None  # it may be lost again before it was back
        failed: list[float] = []
        waited = event.get("waited")
        if waited is not None and waited.since is not None and replica not in waited.requested:
            since = max(waited.since, group.progress_at)
            failed.append(since)
            seconds = event.t - since
            ended = incident.end_told(since + HANG_SECONDS)  # another one was waited for
            hung = seconds > HANG_SECONDS or self._is_alive(waited, replica)
            if waited.requested and hung and not ended:
                incident.explain([hang_sign(since, seconds, event.source)])
        self._others_noticed(incident, failed)
        if group.state not in (GroupState.STARTING, GroupState.REQUEUED):
            self.enter(group, GroupState.LOST, event.t)
        return incident

    def _others_noticed(self, incident: Incident, when: list[float]) -> None:
        """What the others noticed of a loss first: at ``when``, or as they failed to commit."""
        failed = (group.failed_at for group in self.groups.values())
        for t in [*when, *(t for t in failed if t is not None)]:
            incident.others_noticed(t)

    def _is_alive(self, waited: Waiting, replica: int) -> bool:
        """Whether a group left the quorum with its heartbeats going on: more of them came than of
        those who are in it, and of those who may be starting."""
        away = sum(
            other not in self.members and other != replica and group.state is not GroupState.DONE
            for other, group in self.groups.items()
        )
        return waited.heartbeating is not None and waited.heartbeating > len(self.members) + away

    def _is_done(self, group: Group, t: float) -> None:
        """It has said that its training is over; where a launcher runs it, that has the last word."""
        if not group.attempt:
            self.enter(group, GroupState.DONE, t)

    def _joined(
        self, event: Event, replica: int, before: dict[int, str], step: int, top: int
    ) -> str:
        group = self.group(replica)
        if group.joined_as(self.members[replica]) and not group.attempt:
            group.ended_ok = False  # one that ended was another copy
            group.step = group.step if group.tells else step
        behind = step < top
        self.enter(group, GroupState.HEALING if behind else GroupState.TRAINING, event.t)
        incident = self.open_incident(replica)
        if incident is None and replica in before:
            # A new copy in place of the old one, with no quorum in between.
            incident = self.open(replica, event.t, top)
            incident.detected_at = event.t
            waited = event.get("waited")
            since = waited.since if waited is not None else None
            self._others_noticed(incident, [] if since is None else [since])
            if group.attempt > 1:
                incident.started_at, incident.boot = group.launched_at, group.boot
        if incident is not None:
            incident.rejoined_at = incident.rejoined_at or event.t
            if incident.detected_at is None and replica in before:
                incident.detected_at = event.t
            group.reached("quorum", event.t)
            uuid = self.members[replica]
            same = incident.started_at is None and bool(uuid) and incident.lost_uuid == uuid
            if same and incident.cause is not Cause.LIGHTHOUSE_LOST:
                incident.explain([same_process_sign(incident.lost_at, event.source)])
        return f"replica {replica} joined" + (" (behind: will heal)" if behind else "")
