"""Compares weight hashes between replica groups as they come, in bounded memory. Pure."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

#: Steps remembered, of every rank: groups say their hashes of a step within seconds of each other.
WINDOW = 128
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
    _newest: dict[tuple[int, int], int] = field(default_factory=dict)
    """Newest step of each (replica group, rank)."""

    def add(self, replica: int, step: int, rank: int, digest: str) -> bool:
        """Take in one hash; True when it reveals a pair that differs."""
        key = (step, rank)
        if step < self._newest.get((replica, rank), step):
            # It trains from an earlier step: the run has started over, with nobody to heal from.
            # What is known of this rank from here on is of the training before.
            for old in [k for k in self._hashes if k[0] >= step and k[1] == rank]:
                del self._hashes[old]
        self._newest[replica, rank] = step
        known = self._hashes.setdefault(key, {})
        differed = len(set(known.values())) > 1
        compared = len(known) > 1
        known[replica] = digest
        if len(known) > 1:
            self.compared += not compared
            self.last_step = max(self.last_step, step)
        ranks = len({rank for _, rank in self._newest})
        while len(self._hashes) > WINDOW * ranks:
            self._hashes.popitem(last=False)
        if differed or len(set(known.values())) < 2:
            return False
        self.differences += 1
        if len(self.different) < MOST_DIFFERENT:
            self.different.append(key)
        return True
