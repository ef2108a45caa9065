"""Does for a run what it needs done (``launcher monitor --act``), each thing once.

What was done is in the run's ``events.jsonl``, orders to the nodes in ``orders.jsonl``. A
guardian that is started anew reads there what it need not do again.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence

from launcher import orders, spares
from launcher.care import Action, View, needed
from launcher.lock import acquire
from launcher.model import KitError, UsageError
from launcher.rundir import RunDir
from launcher.scheduler import Scheduler
from launcher.slurm import Job
from launcher.state import Notice
from launcher.titan import setting
from launcher.watcher import Watcher

#: Seconds before the same action is taken again, when nothing has come of it.
AGAIN = {
    "release": 15.0,
    "start_now": 3.0,
    "requeue": 15.0,
    "restart": orders.VALID_SECONDS,
    "take_over": 5.0,
}
#: Actions that Slurm carries out, upon what it has said.
OF_SLURM = frozenset({"release", "start_now", "requeue"})
#: Seconds for which a Slurm that refuses is told of only once.
COMPLAIN_EVERY = 60.0
#: torchtitan's own default for a collective between replica groups.
UPSTREAM_COLLECTIVE_SECONDS = 10.0
#: torchft's own, of a process group in a script.
SCRIPT_COLLECTIVE_SECONDS = 60.0
#: Actions in words.
WORDS = {
    "release": "is released",
    "start_now": "starts now",
    "requeue": "is requeued",
    "restart": "is restarted",
    "take_over": "is taken over by a spare",
}


class Guardian:
    """Looks after one run; there is one of it at a time."""

    def __init__(self, run: RunDir, slurm: Scheduler) -> None:
        self._run = run
        self._slurm = slurm
        self._done: dict[tuple[str, int | str, int], float] = {}
        self._complained: dict[str, float] = {}
        self._excluded: dict[int, tuple[str, ...]] = {}
        """Nodes left out for a task, as last told to Slurm."""
        self._owners: dict[int, list[str]] = {}
        """Nodes that its owner had left out before."""
        self._requeued: Counter[int] = Counter()
        self._told: dict[int, float] = {}
        """When Slurm was last told to do something with a task, monotonic seconds."""
        self._collective: float | None = None
        for order in orders.OrderReader(run.orders).every():
            self._done[order.do, order.replica, order.attempt] = order.t

    @classmethod
    @contextlib.contextmanager
    def of(cls, run: RunDir, slurm: Scheduler) -> Iterator[Guardian]:
        """The guardian of a run.

        Raises:
            UsageError: another one looks after it.
        """
        run.path.mkdir(parents=True, exist_ok=True)
        held = acquire(run.guardian_lock)
        if held is None:
            raise UsageError(
                f"another guardian looks after {run.name}: that of its lighthouse, or another "
                "`monitor --act`"
            )
        with held:
            yield cls(run, slurm)

    def tend(self, watcher: Watcher) -> list[Notice]:
        """Do what the run needs now; returns what went wrong (what was done is in its events)."""
        now = time.time()
        view = View(
            state=watcher.state,
            now=now,
            waiting=watcher.waiting,
            jobs=watcher.jobs,
            nodes=watcher.nodes,
            excluded=self._excluded,
            spares=spares.ready(self._run.groups, now),
            requeued=self._requeued,
            collective=self._collective_seconds(),
        )
        notices = []
        for action in needed(view):
            who = action.replica if action.replica is not None else f"spare {action.task}"
            key = (action.kind, who, action.attempt)
            if now - self._done.get(key, 0.0) < AGAIN[action.kind]:
                continue
            if action.kind in OF_SLURM and watcher.jobs_asked < self._told.get(
                action.task, -math.inf
            ):
                continue  # what is known of the task is older than what was done to it
            self._done[key] = now
            try:
                self._do(action, watcher.jobs)
            except (KitError, OSError) as error:
                notices += self._complain(action, str(error), now)
                continue
            with contextlib.suppress(OSError):  # a full disk costs the record of it
                self._record(action, now)
        return notices

    def _collective_seconds(self) -> float:
        """Seconds after which a collective between the run's replica groups fails."""
        if self._collective is None:
            manifest = self._run.manifest()
            where = ("fault_tolerance", "process_group_timeout_ms")
            value = setting(dict(manifest.settings), manifest.extra_args, *where)
            try:
                self._collective = float(value) / 1000
            except (TypeError, ValueError):
                own_script = SCRIPT_COLLECTIVE_SECONDS
                self._collective = own_script if manifest.script else UPSTREAM_COLLECTIVE_SECONDS
        return self._collective

    def _do(self, action: Action, jobs: Sequence[Job]) -> None:
        own = f"{self._run.number}_{action.task}"
        task = next((job.name for job in jobs if job.task == action.task), own)
        if action.kind in OF_SLURM:
            self._told[action.task] = time.monotonic()
        if action.kind == "start_now":
            self._start_now(task, action)
        elif action.kind == "release":
            self._slurm.release(task)
        elif action.kind == "requeue":
            self._slurm.requeue(task)
            self._requeued[action.task] += 1
        elif action.replica is not None:
            orders.give(
                self._run.orders,
                action.kind,
                replica=action.replica,
                attempt=action.attempt,
                why=action.why,
                task=action.task,
            )

    def _start_now(self, task: str, action: Action) -> None:
        """Also leave nodes out, beside those that its owner has left out himself."""
        exclude: tuple[str, ...] | None = None
        if action.exclude or self._excluded.get(action.task):
            if action.task not in self._owners:
                self._owners[action.task] = self._slurm.excluded_nodes(task)
            exclude = tuple(sorted({*action.exclude, *self._owners[action.task]}))
        self._slurm.start_now(task, exclude)
        self._excluded[action.task] = action.exclude

    def _record(self, action: Action, now: float) -> None:
        event = {
            "t": round(now, 3),
            "kind": "action",
            "replica": action.replica,
            "task": action.task,
            "attempt": action.attempt,
            "action": action.kind,
            "what": WORDS[action.kind],
            "why": action.why,
        }
        with self._run.guardian_events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, separators=(",", ":")) + "\n")

    def _complain(self, action: Action, problem: str, now: float) -> list[Notice]:
        who = "a spare" if action.replica is None else f"replica {action.replica}"
        text = f"guardian: {who} (task {action.task}) cannot be helped ({action.kind}): {problem}"
        if now - self._complained.get(text, 0.0) < COMPLAIN_EVERY:
            return []
        self._complained[text] = now
        return [Notice(now, text)]
