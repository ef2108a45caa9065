"""When the lighthouse is not there: what the groups say of it, and what ends it. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from launcher.contacts import Contacts
from launcher.events import Event
from launcher.groups import Group
from launcher.incidents import contact_sign, restart_sign
from launcher.observed import Notice, Observed

_TIMED_OUT = re.compile(r"time[d ]*out|deadline|Cancelled", re.IGNORECASE)


@dataclass(slots=True)
class Outages(Observed):
    """What a run's events tell of its lighthouse."""

    def _listening(self, event: Event) -> list[Notice]:
        self.lighthouse_starts += 1
        if self.lighthouse_starts == 1 and not self.quorum_id:
            return []
        if self.stand_in is not None:
            return [Notice(event.t, "a lighthouse is up beside the one that stands in")]
        if self.quorum_id and not all(self.group(r).ended_ok for r in self.members):
            outage = self.open_outage(event.t, [restart_sign(event)])
            outage.started_at, outage.rejoined_at = event.t, None
        return [Notice(event.t, "the lighthouse was started again")]

    def _stand_in(self, group: Group, event: Event) -> Iterable[Notice]:
        where = f"replica {group.replica} on {event.get('host')}"
        if event.get("serves"):
            self.stand_in = group.replica, str(event.get("host")), event.t
            yield Notice(event.t, f"{where} stands in for the lighthouse")
        elif self.stand_in is not None and self.stand_in[0] == group.replica:
            self.stand_in = None
            yield Notice(event.t, f"{where} stands in for the lighthouse no more")

    def _heartbeat_failed(self, group: Group, event: Event) -> Iterable[Notice]:
        self.contacts.failed(group.replica, contact_sign(event))
        signs = self.contacts.lost(self.members, event.t)
        if signs:
            if self.outage is None:
                yield Notice(event.t, "the replica groups cannot reach the lighthouse")
            self.open_outage(event.t, signs)

    def _quorum_failed(self, group: Group, event: Event) -> Iterable[Notice]:
        # Where nobody answered within the time, it may have been other groups that did not join.
        if not _TIMED_OUT.search(str(event.get("text", ""))):
            yield from self._heartbeat_failed(group, event)

    def _lighthouse_serves(self, group: Group, t: float) -> Iterable[Notice]:
        """A commit at ``t`` ends an outage, if the lighthouse was asked for it since.

        That is after its first quorum since then; where there was none (it was cut off, not
        restarted), at the second commit without a failed contact in between: the first one may
        have been agreed on before.
        """
        outage, before = self.outage, group.last_commit
        failed = group.replica in self.contacts.first
        self.contacts.worked(group.replica)
        if outage is None:
            return
        again = before is not None and before >= outage.lost_at and not failed
        if outage.rejoined_at is None and (outage.started_at is not None or not again):
            return
        outage.recovered_at, outage.recovered_at_step = t, group.step
        self.contacts, self.outage = Contacts(), None
        yield Notice(
            t,
            f"the lighthouse is back: replica {group.replica} commits again at step {group.step}, "
            f"{t - outage.first_sign:.1f} s after the first sign of its loss",
        )
