"""The state of a run: a pure fold of events and of what is observed, with the story it tells.

Its size depends on the number of replica groups and incidents, never on the number of steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from launcher.events import Event
from launcher.groups import Group, replaced
from launcher.incidents import (
    Cause,
    Sign,
    lighthouse_sign,
    sign_of,
)
from launcher.model import GroupState
from launcher.observed import Notice
from launcher.quorums import Quorums
from launcher.restarts import UNFIT

__all__ = ["Notice", "RunState"]

#: Weight of the newest measurement in the moving mean of a group's own work.
BUSY_WEIGHT = 0.2
#: Causes that lie in the group's processes, and seconds after which a commit shows that an error was
#: got over. (Rank 0 may commit the step before while another rank has run out of memory.)
ITS_OWN, OVERCOME_SECONDS = frozenset({Cause.CRASH, Cause.OUT_OF_MEMORY}), 10.0
#: Kinds that are told of a copy of a group by another, or when another one runs already.
TOLD_OF_OTHERS = frozenset({"fenced", "stand_in", "action"})


@dataclass(slots=True)
class RunState(Quorums):
    """Everything known of a run after some events."""

    events: int = 0
    unfit: dict[str, float] = field(default_factory=dict)
    """Nodes that were found unfit for training, and when."""

    def apply(self, event: Event) -> list[Notice]:
        """Fold one event in; returns what a person wants to hear of it."""
        self.events += 1
        self.last_event = max(self.last_event, event.t)
        if self.first_event is None or event.t < self.first_event:
            self.first_event = event.t
        if event.kind == "membership":
            return self._membership(event)
        if event.kind == "listening":
            return self._listening(event)
        if event.kind in ("steps", "commit_failed"):
            return self._from_quorum(event)
        if event.kind == "resize":
            return self.resize(int(event.get("replicas", self.size)), event.t)
        if event.kind in ("heartbeat_failed", "quorum_failed"):
            self.lighthouse_errors.append(event.t)
        if event.replica is None or event.replica > 1_000_000:
            return self._of_a_spare(event) if event.kind == "action" else []
        group = self.group(event.replica)
        sign = (lighthouse_sign(event) if self.outage is not None else None) or sign_of(event)
        if event.kind not in TOLD_OF_OTHERS and replaced(group, event):
            return self._of_a_replaced_copy(group, event, sign)
        if sign is not None:
            self._sign(group, sign)
        handler = getattr(self, f"_{event.kind}", None)
        return [] if handler is None else list(handler(group, event))

    # -- a replica group's own view: one method a kind of event ----------------------

    def _sign(self, group: Group, sign: Sign) -> None:
        if group.attempt > 1 and sign.t < group.launched_at:
            # Read late: it is of the attempt before, whose incident may be over already.
            last = next((i for i in reversed(self.incidents) if i.replica == group.replica), None)
            if last is not None and last.started_at == group.launched_at:
                last.explain([sign])
            return
        group.signs.append(sign)
        del group.signs[:-40]
        incident = self.open_incident(group.replica)
        if incident is not None and incident.started_at is None:
            incident.explain([sign])

    def _of_a_replaced_copy(self, group: Group, event: Event, sign: Sign | None) -> list[Notice]:
        """What the copy before says, after its node could be reached again: it may tell of its
        own end, and nothing of the copy that runs now."""
        incident = self.open_incident(group.replica)
        if sign is not None and incident is not None:
            incident.explain([sign])
        if event.kind != "exit":
            return []
        name = f"the copy of replica {group.replica} before (attempt {event.get('attempt')})"
        return [Notice(event.t, f"{name} ended on {event.get('host')}: {event.get('reason')}")]

    def _launch(self, group: Group, event: Event) -> Iterable[Notice]:
        group.attempt = int(event.get("attempt", 1))
        group.host = str(event.get("host", ""))
        group.nodes = tuple(map(str, event.get("nodes", ()))) or (group.host,)
        group.task = event.get("task")
        group.last_commit, group.ended_ok, group.ended = None, False, False
        group.left = False
        group.next, group.busy = "", ""
        group.gpus, group.ecc_before = {}, {}
        group.boot, group.boot_at, group.launched_at = {}, event.t, event.t
        group.busy_seconds, group.busy_samples = None, 0
        group.progress_at, group.progress_step, group.own_step_seconds = 0.0, None, None
        self.enter(group, GroupState.STARTING, event.t)
        incident = self.open_incident(group.replica)
        if incident is None and group.attempt > 1 and group.signs:
            incident = self.open(group.replica, event.t, group.step)
        if incident is not None:
            incident.started_at, incident.boot = event.t, group.boot
        group.signs = []
        where = ", ".join(group.nodes)
        text = f"replica {group.replica} launched (attempt {group.attempt}) on {where}"
        yield Notice(event.t, text)

    def _start(self, group: Group, event: Event) -> Iterable[Notice]:
        if int(event.get("rank", 0)) == 0:
            if event.get("begun"):
                group.reached("torchrun", float(event.fields["begun"]))
            group.reached("imports", event.t)
        return ()

    def _ready(self, group: Group, event: Event) -> Iterable[Notice]:
        if int(event.get("rank", 0)) == 0:
            group.reached("model", event.t)
        return ()

    def _quorum(self, group: Group, event: Event) -> Iterable[Notice]:
        """Said by a rank; all that is known of quorums where the lighthouse's log is not at hand."""
        if not self.members:
            self.quorum_id = int(event.get("quorum_id", self.quorum_id))
        return ()

    def _healing(self, group: Group, event: Event) -> Iterable[Notice]:
        if int(event.get("max_step", 0)) > 0:
            self.enter(group, GroupState.HEALING, event.t)
        return ()

    def _heal(self, group: Group, event: Event) -> Iterable[Notice]:
        step, source = int(event.get("step", 0)), int(event.get("source", -1))
        if step == 0 or int(event.get("rank", 0)) != 0:
            return  # everyone takes replica 0's weights at the very start
        incident = self.open_incident(group.replica)
        if group.state is GroupState.STALLED:
            self.enter(group, GroupState.HEALING, event.t)
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
        group.tells = group.tells or not event.get("inferred")
        group.uuid = str(event.get("uuid") or self.members.get(group.replica, ""))
        if not event.get("committed"):
            group.failed_commits += 1
            group.failed_since_commit += 1
            group.failed_at = group.failed_at or t
            yield Notice(t, f"replica {group.replica} failed to commit step {step}")
            return
        group.commits += 1
        group.reached("first step", t)
        group.step = step + 1
        self.step = max(self.step, group.step)
        self.enter(group, GroupState.TRAINING, t)
        self._pause(group, t)
        yield from self._lighthouse_serves(group, t)
        group.last_commit, group.failed_since_commit, group.requeues = t, 0, 0
        group.failed_at = None
        # It got over the errors it logged; only what comes from outside still counts.
        group.signs = [
            sign
            for sign in group.signs
            if sign.weight > 3
            and sign.cause is not Cause.LIGHTHOUSE_LOST
            and (sign.cause not in ITS_OWN or t - sign.t < OVERCOME_SECONDS)
        ]
        incident = self.open_incident(group.replica)
        again = incident is not None and (incident.started_at or incident.rejoined_at)
        if incident is not None and not again:
            pass  # the last words of the copy that was lost, from a clock that is ahead of others
        elif incident is not None and (incident.started_over or group.step < incident.lost_at_step):
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
                f"{t - incident.lost_at:.1f} s after "
                f"{'it ended' if incident.replaced else 'the quorum lost it'} ({incident.why})",
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
            if incident.touches(group.replica, before, t):
                incident.survivor_stall_s = max(incident.survivor_stall_s, pause)
                incident.steps_lost = max(incident.steps_lost, group.failed_since_commit)

    def _metrics(self, group: Group, event: Event) -> Iterable[Notice]:
        loss = event.get("loss")
        group.loss = float(loss) if isinstance(loss, int | float) else None
        speed = event.get("tokens_per_second")
        group.tokens_per_second = float(speed) if isinstance(speed, int | float) else None
        busy = event.get("busy_seconds")
        if isinstance(busy, int | float) and 0 < busy < float("inf"):
            mean = group.busy_seconds
            group.busy_seconds = busy if mean is None else mean + BUSY_WEIGHT * (busy - mean)
            group.busy_samples += 1
        return ()

    def _progress(self, group: Group, event: Event) -> Iterable[Notice]:
        step = event.get("titan_step")
        group.progressed(event.t, step if isinstance(step, int) else None)
        return ()

    def _gpu(self, group: Group, event: Event) -> Iterable[Notice]:
        index = int(event.get("gpu", -1))
        if 0 <= index < 64:
            gpu = (str(event.get("host") or group.host), index)
            group.gpus[gpu] = dict(event.fields)
            group.ecc_before.setdefault(gpu, int(event.get("ecc") or 0))
        return ()

    def _xid(self, group: Group, event: Event) -> Iterable[Notice]:
        gpu, xid = int(event.get("gpu", -1)), int(event.get("xid", 0))
        host = str(event.get("host") or group.host)
        group.xids.append((event.t, host, gpu, xid))
        yield Notice(event.t, f"Xid {xid} on GPU {gpu} of {host} (replica {group.replica})")

    def _weights(self, group: Group, event: Event) -> Iterable[Notice]:
        step, rank = int(event.get("step", -1)), int(event.get("rank", -1))
        differs = self.weights.add(group.replica, step, rank, str(event.get("hash")))
        if differs and self.weights.differences == 1:
            # From then on they differ at every step; the finding stays, and counts them.
            yield Notice(
                event.t, f"WEIGHTS DIFFER between replica groups at step {step}, rank {rank}"
            )

    def _end(self, group: Group, event: Event) -> Iterable[Notice]:
        # Said by every rank when training is over or has failed. At the last step (a script says
        # so by its exit code), leaving the quorum is no loss any more; the exit code of the attempt
        # has the last word.
        last = self.steps is not None and int(event.get("titan_step") or 0) >= self.steps
        if last or event.get("code") == 0:
            group.ended_ok = True
            self._is_done(group, event.t)
        return ()

    def _leave(self, group: Group, event: Event) -> Iterable[Notice]:
        # Said by its ranks, between two steps.
        group.left = group.ended_ok = True
        return ()

    def _exit(self, group: Group, event: Event) -> Iterable[Notice]:
        code, reason = int(event.get("code", 1)), str(event.get("reason", ""))
        group.ended, group.next = True, str(event.get("next", ""))
        node = str(event.get("node", ""))
        if reason.startswith(UNFIT):
            self.unfit[node or group.host] = event.t
        name = f"replica {group.replica} (attempt {group.attempt})"
        if code == 0 or 0 < self.group_size <= group.replica:
            group.ended_ok = True
            self.enter(group, GroupState.DONE, event.t)
            what = "left the run" if group.left else "finished"
            yield Notice(event.t, f"{name} {what} at step {group.step}")
            return
        group.ended_ok = False
        self.enter(group, GroupState.LOST, event.t)
        if group.replica in self.members:
            self.open(group.replica, event.t, group.step)
        incident = self.open_incident(group.replica)
        if incident is not None and incident.ended_at is None:
            incident.ended_at = event.t
            incident.host = node or incident.host
        then = f"; {group.next} ({event.get('why')})" if group.next else ""
        where = node or ", ".join(group.nodes)
        yield Notice(event.t, f"{name} on {where} ended with exit code {code}: {reason}{then}")

    def _fenced(self, group: Group, event: Event) -> Iterable[Notice]:
        """Said by an old copy of the group; the newer one's state is another matter."""
        old = f"the old copy (attempt {event.get('attempt')}) on {event.get('host')}"
        yield Notice(event.t, f"replica {group.replica}: {old} was fenced")

    def _busy(self, group: Group, event: Event) -> Iterable[Notice]:
        group.busy = str(event.get("what", ""))
        return ()

    def _of_a_spare(self, event: Event) -> list[Notice]:
        what, why = event.get("what"), event.get("why")
        return [Notice(event.t, f"guardian: the spare in task {event.get('task')} {what} ({why})")]

    def _action(self, group: Group, event: Event) -> Iterable[Notice]:
        """Said by the guardian."""
        what, why = event.get("what"), event.get("why")
        group.requeues += event.get("action") == "requeue"
        yield Notice(event.t, f"guardian: replica {group.replica} {what} ({why})")
