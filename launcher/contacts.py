"""Which replica groups cannot reach the lighthouse, and what that says of it. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from launcher.incidents import Sign

#: Seconds after a failed contact for which it counts as present.
FAILED_SECONDS = 15.0


@dataclass(slots=True)
class Contacts:
    """Failed contacts with the lighthouse, by replica group, since its newest commit."""

    first: dict[int, Sign] = field(default_factory=dict)
    """First failure in a row."""
    last: dict[int, float] = field(default_factory=dict)

    def failed(self, replica: int, sign: Sign) -> None:
        if replica not in self.first or sign.t - self.last[replica] > FAILED_SECONDS:
            self.first[replica] = sign
        self.last[replica] = sign.t

    def worked(self, replica: int) -> None:
        """It committed, and had asked the lighthouse before."""
        self.first.pop(replica, None)

    def lost(self, members: Collection[int], now: float) -> list[Sign]:
        """The failures, where they are of more than half of the quorum.

        One group that cannot reach the lighthouse tells of its own node, not of the lighthouse.
        """
        signs = [
            sign
            for replica, sign in self.first.items()
            if replica in members and now - self.last[replica] <= FAILED_SECONDS
        ]
        return signs if len(signs) > len(members) // 2 else []
