"""Compares weight hashes between replica groups as they come, in bounded memory. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

#: (step, rank) pairs remembered while not every group has said its hash.
WINDOW = 4096
#: Differing pairs kept; further ones are only counted.
MOST_DIFFERENT = 100


@dataclass(slots=True)
class WeightLedger:
    """Hashes by (manager step, rank): the only key by which groups can be compared."""

    compared: int = 0
    """Pairs that at least two replica groups have hashed."""
    differences: int = 0
    """Pairs whose hashes differ."""
    different: list[tuple[int, int]] = field(default_factory=list)
    """The first of those, in the order in which they were found."""
    last_step: int = -1
    """Newest step of a compared pair."""
    _hashes: OrderedDict[tuple[int, int], dict[int, str]] = field(default_factory=OrderedDict)

    def add(self, replica: int, step: int, rank: int, digest: str) -> bool:
        """Take in one hash; True when it reveals a pair that differs."""
        key = (step, rank)
        if self._hashes.get(key, {}).get(replica, digest) != digest:
            # It trains this step again: the run has started over, with nobody to heal from.
            # What is known from here on is of the training before.
            for old in [known for known in self._hashes if known[0] >= step]:
                del self._hashes[old]
        known = self._hashes.setdefault(key, {})
        differed = len(set(known.values())) > 1
        compared = len(known) > 1
        known[replica] = digest
        if len(known) > 1:
            self.compared += not compared
            self.last_step = max(self.last_step, step)
        while len(self._hashes) > WINDOW:
            self._hashes.popitem(last=False)
        if differed or len(set(known.values())) < 2:
            return False
        self.differences += 1
        if len(self.different) < MOST_DIFFERENT:
            self.different.append(key)
        return True
