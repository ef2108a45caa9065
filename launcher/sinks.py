"""Where the monitor's news goes besides the terminal: what a sink gets, and how safely.

Every sink has a thread and a bounded queue of its own. A sink that raises, hangs or is slow
costs its own news, which are counted and told once; never a look of the monitor.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from launcher.findings import Finding
from launcher.groups import Group
from launcher.incidents import Incident
from launcher.model import KitError
from launcher.snapshot import figures
from launcher.state import Notice, RunState

#: Updates that may wait for one sink; further ones are dropped and counted.
QUEUE = 256
#: Seconds for one update after which a sink counts as hung.
HUNG_SECONDS = 30.0
#: Seconds that all sinks together get to finish when the monitor ends.
CLOSE_SECONDS = 25.0
#: Losses and recoveries known for longer are history that a monitor reads at its start, no alarm.
FRESH_SECONDS = 120.0
#: Newest incidents that every update holds.
MOST_HISTORY = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What there is to know after one look: copies, safe in another thread."""

    t: float
    quorum_id: int
    step: int
    group_size: int
    members: tuple[int, ...]
    groups: tuple[Group, ...]
    figures: Mapping[str, float | None]
    findings: tuple[Finding, ...]
    appeared: tuple[Finding, ...]
    """Findings that were not there at the look before."""
    gone: tuple[Finding, ...]
    notices: tuple[Notice, ...]
    incidents: tuple[Incident, ...]
    """New ones, and those of which more is known now."""
    history: tuple[Incident, ...]
    """The newest of all incidents, as they stand."""
    lost: tuple[Incident, ...]
    """Incidents that have just begun."""
    recovered: tuple[Incident, ...]
    """Incidents that have just ended."""
    causes: Mapping[str, int]
    """Number of incidents by cause."""
    last_recovery: float | None
    """Seconds that the latest recovery of a replica group took."""
    weights_differences: int
    blind: bool
    ended: str = ""
    """How the run ended early; empty while it did not."""

    @property
    def news(self) -> bool:
        """Whether anything has happened since the look before."""
        return bool(self.notices or self.incidents or self.appeared or self.gone or self.ended)


class Sink(Protocol):
    """Somewhere to send news to. Called from one thread only, its own."""

    name: str

    def deliver(self, update: Update) -> None:
        """Send what is wanted of it; a KitError's text is told to the person watching."""

    def close(self) -> None:
        """Finish; called once."""


class Delivery:
    """Hands each look's news to every sink, without waiting for any."""

    def __init__(
        self, sinks: Sequence[Sink] = (), *, clock: Callable[[], float] = time.time
    ) -> None:
        self._workers = [_Worker(sink) for sink in sinks]
        self._clock = clock
        self._findings: dict[str, Finding] = {}
        self._incidents: dict[_Kind, list[_Known]] = {}

    def deliver(
        self,
        state: RunState,
        notices: Sequence[Notice],
        findings: Sequence[Finding],
        *,
        blind: bool,
        ended: str = "",
    ) -> list[Notice]:
        """Queue the news; returns what there is to tell of the sinks themselves.

        Args:
            ended: how the run ended early, at the last look of all.
        """
        if not self._workers:
            return []
        update = self._update(state, notices, findings, blind, ended)
        for worker in self._workers:
            worker.offer(update)
        return [Notice(update.t, text) for worker in self._workers for text in worker.told()]

    def close(self) -> list[str]:
        """Let the sinks finish, for a limited time; returns what was not delivered."""
        deadline = time.monotonic() + CLOSE_SECONDS
        for worker in self._workers:
            worker.ask_to_end()
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        return [text for worker in self._workers for text in [*worker.told(), *worker.summary()]]

    def _update(
        self,
        state: RunState,
        notices: Sequence[Notice],
        findings: Sequence[Finding],
        blind: bool,
        ended: str,
    ) -> Update:
        now = self._clock()
        before, current = self._findings, {finding.key: finding for finding in findings}
        self._findings = current
        known, self._incidents = self._incidents, {}
        history, changed, lost, recovered = [], [], [], []
        for incident in state.incidents:
            old = _take_same(known, incident)
            values = _values(incident)
            same = old is not None and old.values == values
            new = old if old is not None and same else _Known(incident, values)
            self._incidents.setdefault(_kind(incident), []).append(new)
            history.append(new.incident)
            if new is old:
                continue
            changed.append(new.incident)
            new.told = old is not None and old.told
            if not new.told and (old is None or not _certain(old.incident)):
                new.told = now - _known_at(incident) < FRESH_SECONDS
                lost += [new.incident] if new.told else []
            back = incident.recovered_at
            if back is not None and (old is None or old.incident.recovered_at is None):
                recovered += [new.incident] if now - back < FRESH_SECONDS else []
        times = [
            (i.recovered_at, i.recovered_at - i.lost_at)
            for i in state.incidents
            if i.recovered_at is not None and i.replica is not None
        ]
        return Update(
            t=now,
            quorum_id=state.quorum_id,
            step=state.step,
            group_size=state.size,
            members=tuple(sorted(state.members)),
            groups=tuple(
                dataclasses.replace(group, signs=[]) for _, group in sorted(state.groups.items())
            ),
            figures=figures(state, now),
            findings=tuple(findings),
            appeared=tuple(f for key, f in current.items() if key not in before),
            gone=tuple(f for key, f in before.items() if key not in current),
            notices=tuple(notices),
            incidents=tuple(changed),
            history=tuple(history[-MOST_HISTORY:]),
            lost=tuple(lost),
            recovered=tuple(recovered),
            causes=Counter(incident.cause.value for incident in state.incidents),
            last_recovery=max(times)[1] if times else None,
            weights_differences=state.weights.differences,
            blind=blind,
            ended=ended,
        )


#: Replica group and kind of an incident.
_Kind = tuple[int | None, str]


class _Known:
    """An incident as it was at the look before: a copy."""

    def __init__(self, incident: Incident, values: tuple[object, ...]) -> None:
        self.incident = dataclasses.replace(incident, evidence=[], boot=dict(incident.boot))
        self.values = values
        self.told = False
        """Whether its beginning was news for the sinks."""


def _kind(incident: Incident) -> _Kind:
    return incident.replica, incident.kind


def _take_same(known: dict[_Kind, list[_Known]], incident: Incident) -> _Known | None:
    """Take out of ``known`` what was known of ``incident``.

    An event that is read late may correct the whole story: the objects are others then, their
    order too, and any of their times may be. What stays is that a replica group has one incident
    of a kind at a time: those that overlap in time are one, each of them taken once and the
    oldest first.
    """
    of_its_kind = known.get(_kind(incident), [])
    for place, old in enumerate(of_its_kind):
        if _overlap(old.incident, incident):
            del of_its_kind[: place + 1]  # those before it are in the story no more
            return old
    return None


def _overlap(one: Incident, other: Incident) -> bool:
    return one.first_sign <= _end(other) and other.first_sign <= _end(one)


def _end(incident: Incident) -> float:
    return float("inf") if incident.recovered_at is None else incident.recovered_at


def _certain(incident: Incident) -> bool:
    """Whether it is known by more than its signs: the quorum lacks it, or its launcher told."""
    return incident.detected_at is not None or incident.ended_at is not None


def _known_at(incident: Incident) -> float:
    """When it became known. Its first sign may be much older: a hang is waited for."""
    told = [t for t in (incident.detected_at, incident.ended_at) if t is not None]
    started = incident.started_at
    return max(told) if told else incident.first_sign if started is None else started


_FIELDS = [f.name for f in dataclasses.fields(Incident) if f.name not in ("evidence", "boot")]
_simple = operator.attrgetter(*_FIELDS)


def _values(incident: Incident) -> tuple[object, ...]:
    """All that is told of an incident, to be compared at the next look."""
    return (*_simple(incident), tuple(incident.boot.items()))


class _Worker:
    """One sink in its thread."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._queue: queue.Queue[Update] = queue.Queue(QUEUE)
        self._ending = threading.Event()
        self._busy_since: float | None = None
        self._tell: deque[str] = deque()
        self._told: set[str] = set()
        self._failed = 0
        self._dropped = 0
        # A daemon: a sink that hangs must not keep the monitor from ending.
        self._thread = threading.Thread(target=self._run, name=f"sink {sink.name}", daemon=True)
        self._thread.start()

    def offer(self, update: Update) -> None:
        since = self._busy_since
        if since is not None and time.monotonic() - since > HUNG_SECONDS:
            self._tell_once("hung", f"has not answered for {HUNG_SECONDS:.0f} s")
        if not update.news and not self._queue.empty():
            return  # it is behind, and a later update will say the same
        try:
            self._queue.put_nowait(update)
        except queue.Full:
            self._dropped += 1
            self._tell_once("full", "is too slow, its news are being dropped")

    def told(self) -> list[str]:
        return [self._tell.popleft() for _ in range(len(self._tell))]

    def ask_to_end(self) -> None:
        self._ending.set()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._tell_once("open", "did not finish in time and was left behind")

    def summary(self) -> list[str]:
        lost = self._failed + self._dropped
        name = self._sink.name
        return [f"{name}: {lost} updates were not delivered"] if lost else []

    def _run(self) -> None:
        while True:
            try:
                update = self._queue.get(timeout=0.2)
            except queue.Empty:
                if self._ending.is_set():
                    break
                continue
            problem = self._guarded(functools.partial(self._sink.deliver, update))
            if problem:
                self._failed += 1
                self._tell_once("failed", f"failed ({problem}); further failures are only counted")
        problem = self._guarded(self._sink.close)
        if problem:
            self._tell_once("closed", f"did not end well ({problem})")

    def _guarded(self, call: Callable[[], None]) -> str:
        """What went wrong; empty when nothing did."""
        self._busy_since = time.monotonic()
        try:
            call()
        except KitError as error:
            return str(error)
        except Exception as error:  # whatever it is, it is the sink's own affair
            # Its text may hold an address or a key.
            return type(error).__name__
        finally:
            self._busy_since = None
        return ""

    def _tell_once(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self._tell.append(f"{self._sink.name} {text}")
