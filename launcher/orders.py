"""What the guardian tells the launchers on the nodes: one append-only file in a run's directory.

An order names a replica group and the attempt it is meant for: whoever has started anew since
then does not obey it, and obeying it twice is the same as once.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

#: Seconds for which an order stands: one that arrives later (the node could not be reached)
#: was given for a state of things that is over.
VALID_SECONDS = 60.0
#: What can be ordered.
KINDS = frozenset({"restart", "leave", "take_over"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """``restart``: end this attempt of that replica group, and start it anew. ``leave``: end it
    between two steps, for good. ``take_over``: the spare in array task ``task`` becomes that
    replica group, in place of this attempt of it."""

    t: float
    """When it was given, Unix seconds."""
    do: str
    replica: int
    attempt: int
    why: str
    task: int | None = None

    def stands(self, now: float) -> bool:
        return now - self.t < VALID_SECONDS


def give(
    path: Path, do: str, *, replica: int, attempt: int, why: str, task: int | None = None
) -> Order:
    """Append an order.

    Raises:
        OSError: it cannot be written.
    """
    order = Order(t=time.time(), do=do, replica=replica, attempt=attempt, why=why, task=task)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(order)) + "\n")
    return order


class OrderReader:
    """Reads orders as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def of_attempt(self, replica: int, attempt: int) -> Order | None:
        """The newest standing order for this attempt to end that was not returned before."""
        return self._newest(
            lambda o: o.do != "take_over" and (o.replica, o.attempt) == (replica, attempt)
        )

    def take_over(self, task: int) -> Order | None:
        """The newest standing order for the spare in ``task`` that was not returned before."""
        return self._newest(lambda o: o.do == "take_over" and o.task == task)

    def _newest(self, wanted: Callable[[Order], bool]) -> Order | None:
        now = time.time()
        found = [order for order in self.every() if order.stands(now) and wanted(order)]
        return found[-1] if found else None

    def every(self) -> Iterator[Order]:
        """Every order, whomever it is for, that was not read before."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return
        whole = data.rfind(b"\n") + 1
        self._offset += whole
        for line in data[:whole].splitlines():
            with contextlib.suppress(ValueError, TypeError):
                order = Order(**json.loads(line))
                if isinstance(order.t, float | int) and order.do in KINDS:
                    yield order
