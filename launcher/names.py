"""What torchft calls a replica group, as the number under which the kit knows it. Pure."""

from __future__ import annotations

import functools
import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

#: Ids remembered of groups whose names have no number: a copy that is started again has a new one.
MOST_IDS = 10_000

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.ASCII)
_NUMBER = re.compile(r"(?<!\d)\d{1,6}$", re.ASCII)


class Parts(NamedTuple):
    """What the id of a copy of a replica group consists of."""

    name: str
    number: int | None
    """Digits (six at most) at the end of the name, as torchft takes them."""
    uuid: str


@functools.lru_cache(MOST_IDS)
def split_id(full: str) -> Parts:
    """The id that torchft gives a copy: ``name:uuid``; the name alone; until 2025-03 the name with
    the uuid at its end; or a bare uuid."""
    name, colon, uuid = full.partition(":")
    if not colon and (match := _UUID.search(full)):
        name, uuid = full[: match.start()], match[0]
    number = _NUMBER.search(name)
    return Parts(name, int(number[0]) if number else None, uuid)


class Names:
    """Numbers of replica groups, by the ids in the quorums of one run.

    Where names have no number, or different names the same one, groups are numbered in the order
    in which quorums first name them. A new copy under such a name takes the number of one of that
    name that is not there: among groups of one name (or of none) it may be another's.
    """

    def __init__(self) -> None:
        self._given: dict[str, int] = {}
        """By id."""
        self._of_name: defaultdict[str, list[int]] = defaultdict(list)
        self._taken: set[int] = set()
        self._clashing: set[str] = set()
        """Names whose numbers do not tell them apart."""

    def of_quorum(self, ids: Sequence[str]) -> list[int | None]:
        """The number of each member; None for what is no replica group.

        That is an id of no number whose second part is no uuid: under such a one the kit itself
        asks a lighthouse, to raise its quorum id.
        """
        parts = [split_id(full) for full in ids]
        names: defaultdict[int | None, set[str]] = defaultdict(set)
        for name, number, _ in parts:
            names[number].add(name)
        for number, same in names.items():
            if number is not None and len(same) > 1:
                self._clashing |= same
        found = [
            self._given.get(full) if number is None or name in self._clashing else number
            for full, (name, number, _) in zip(ids, parts, strict=True)
        ]
        present = {number for number in found if number is not None}
        self._taken |= present
        for index, (full, (name, number, uuid)) in enumerate(zip(ids, parts, strict=True)):
            nobody = number is None and (not full or (":" in full and not _UUID.search(uuid)))
            if found[index] is None and not nobody:
                found[index] = mine = self._give(full, name, present)
                present.add(mine)
        return found

    def known(self, full: str) -> int | None:
        """The number of an id, or of a name, if it has one already."""
        if full in self._given:
            return self._given[full]
        name, number, _ = split_id(full)
        if number is not None and name not in self._clashing:
            return number
        numbers = self._of_name.get(name, [])
        return numbers[0] if name and len(numbers) == 1 else None

    def _give(self, full: str, name: str, present: set[int]) -> int:
        numbers = self._of_name[name]
        number = next((n for n in numbers if n not in present), None)
        if number is None:
            number = next(n for n in itertools.count() if n not in self._taken)
            numbers.append(number)
            self._taken.add(number)
        self._given[full] = number
        while len(self._given) > MOST_IDS:
            del self._given[next(iter(self._given))]
        return number
