"""Keeps one replica group going on its node: starts it, starts it again, and lets go of it.

::

    attempt ends ─┬─ finished ───────────────► done
                  ├─ told to stop (signal) ──► the task ends; Slurm says what comes next
                  ├─ fenced (a newer copy) ──► ends, or becomes a spare
                  └─ failed, hung ───────────► restarts.decide: in place, elsewhere, or never

A spare does all of this before it is a group: it starts, and waits to be told which.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from launcher import lease, leaving, nodecheck, records, spares, stacks
from launcher.deputy import Deputy
from launcher.environment import Task, replica_environment
from launcher.files import create_once
from launcher.gpus import GpuSampler
from launcher.lease import patiently
from launcher.model import KitError
from launcher.orders import Order, OrderReader
from launcher.payload import Payload, complain, node_of, say, why
from launcher.plan import Ended, Plan
from launcher.relay import Relay
from launcher.restarts import SILENT, TIME_IS_UP, UNFIT, Decision, Ending, Next, decide
from launcher.scheduler import Scheduler
from launcher.standby import Standby, Warm

#: Seconds between two looks at the lease and at the guardian's orders, and the same of a spare.
LOOK_EVERY, STAND_BY_EVERY = 1.0, 0.2
#: Seconds without a word of the lighthouse, which answers ten heartbeats a second, after which
#: the connections to it are made anew: less than any other copy of the group needs to take its
#: place (it counts as lost after 1.5 s).
SILENCE = 3.0
#: Exit code of a task that asks to be started elsewhere (``EX_TEMPFAIL`` of ``<sysexits.h>``).
ELSEWHERE_CODE = 75
#: Seconds to wait for Slurm to end a task that it was asked to requeue.
REQUEUE_SECONDS = 60.0
#: Seconds of training after which an attempt that logs no commits of ours counts as trained.
TRAINED_SECONDS = 300.0
#: Replica id of a spare that is no group yet.
NO_GROUP = -1
#: Why a spare's ranks are ended when there is nothing left to take over.
FINISHED = "the run has finished"


class Keeper:
    """Runs one replica group until it is done, or better off elsewhere."""

    def __init__(self, plan: Plan, task: Task, slurm: Scheduler) -> None:
        self._plan = plan
        self._task = task
        self._slurm = slurm
        self._deputy = Deputy(plan, lambda: self._lease)
        self._orders = OrderReader(plan.run.orders)
        list(self._orders.every())  # what was ordered before our time is not for us
        self._lease: lease.Lease | None = None
        self._stood_by = 0
        """Sets of ranks that have waited so far, for a group or for the next start of this one."""
        self._warm = Warm(plan)
        self._must_end = ""
        self._departure = leaving.Departure(plan.site.notice)
        self._payload: Payload | None = None
        self._port = 0
        self._reaches_lighthouse: Callable[[], bool] = lambda: True
        self._started = 0.0
        self._events_from = 0
        """Size of the group's structured events when this attempt began."""

    def run(self) -> int:
        """Keep the group going.

        Returns:
            The task's exit code.

        Raises:
            KitError: the group cannot be started at all.
        """
        run, manifest = self._plan.run, self._plan.manifest
        self._departure.listen()
        with Relay(self._deputy.place, silence=SILENCE) as relay, contextlib.ExitStack() as stack:
            stack.enter_context(self._deputy.beside(relay))
            self._port, self._reaches_lighthouse = relay.port, relay.reaches
            stack.callback(self._warm.end)
            while True:
                if run.finished.exists():
                    return self._end_with_the_run()
                role = patiently(lambda: spares.role(run, manifest, self._task.index))
                ended = self._stand_by() if role is None else self._train(role)
                if not ended.stopped and self._fenced() and self._another_tasks():
                    continue  # a spare has its place: now this one is the spare
                if not ended.reason:
                    return ended.code
                if run.finished.exists():
                    return self._end_with_the_run()
                decision = self._decide(ended)
                if self._departure.time_is_up:
                    decision = Decision(next=Next.ELSEWHERE, why=TIME_IS_UP)
                self._note("exit", code=ended.code, reason=ended.reason, trained=ended.trained,
                           next=decision.next.value, why=decision.why, node=ended.node)  # fmt: skip
                complain(f"{self._name} is {decision.next.value} ({decision.why})")
                time.sleep(decision.pause)
                if decision.next is not Next.HERE:
                    return self._leave(decision, ended.code)
                if self._fenced() and not self._another_tasks():
                    complain(f"{self._name} is not started again: a newer copy runs elsewhere")
                    return ELSEWHERE_CODE

    def _end_with_the_run(self) -> int:
        """Alone, a group would train again from the beginning: nobody is left to heal from."""
        say(f"{self._name} ends: {FINISHED}")
        if self._lease is not None and not self._fenced():
            self._note("exit", code=0, reason=FINISHED)
        return 0

    @property
    def _name(self) -> str:
        task = self._task
        if task.replica == NO_GROUP:
            return f"spare {task.index} on {task.where}"
        return f"replica {task.replica} (attempt {task.attempt}) on {task.where}"

    # -- attempts ----------------------------------------------------------------------

    def _train(self, replica: int) -> Ended:
        """One attempt of a replica group."""
        task, env = self._begin(replica)
        if problem := self._unfit():
            return Ended(code=ELSEWHERE_CODE, reason=problem)
        folder, flags = self._plan.run.ranks(task.replica, task.attempt), self._plan.flags(task)
        leaving.prepare(self._plan.run, task)
        warm = self._warm.take(flags, env)
        if warm is None:
            return self._run(self._plan.argv(folder, flags), env, self._watch)
        say(f"{self._name} takes the ranks that have waited here, their imports done")
        with contextlib.ExitStack() as stack:
            stack.callback(warm.end)
            return self._run(warm.argv, warm.env, self._watch, warm.process)

    def _stand_by(self) -> Ended:
        """Start ranks that wait, and be whatever group they are told to be."""
        run = self._plan.run
        self._warm.end()
        self._task, self._lease, self._must_end = replace(self._task, replica=NO_GROUP), None, ""
        self._stood_by += 1
        say(f"{self._name} starts, to stand ready")
        if problem := self._unfit():
            return Ended(code=ELSEWHERE_CODE, reason=problem)
        with contextlib.ExitStack() as stack:
            standby = Standby(self._plan, run.standby_ranks(self._task.index, self._stood_by))
            stack.callback(standby.end)
            stack.callback(spares.withdraw, run.groups, self._task.index)
            return self._run(
                standby.argv, standby.env, lambda done: self._await_orders(done, standby)
            )

    def _begin(self, replica: int) -> tuple[Task, dict[str, str]]:
        """Take the lease of a replica group; who it is now, and its environment."""
        plan, run, before = self._plan, self._plan.run, self._task
        path, index, host = run.lease(replica), before.index, before.node
        held = patiently(lambda: lease.take(path, replica=replica, task=index, host=host))
        task = replace(before, replica=replica, attempt=held.number)
        self._must_end, self._started, self._departure.told = "", time.monotonic(), False
        self._task, self._lease = task, held
        self._events_from = records.size(run.events(task.replica))
        say(f"launching {self._name}")
        self._note("launch", task=task.index, nodes=task.nodes)
        env = replica_environment(plan.env, plan.site, plan.manifest, run, task)
        if plan.site.relay:
            env["TORCHFT_LIGHTHOUSE"] = f"http://127.0.0.1:{self._port}"
        return task, env

    def _unfit(self) -> str:
        """Why this node cannot train; empty when it can."""
        plan = self._plan
        problem = nodecheck.problem(
            plan.site,
            plan.run.path,
            plan.manifest.ranks_per_node,
            manager_port=int(plan.env.get("TORCHFT_MANAGER_PORT") or "0"),
        )
        if problem:
            complain(f"{self._name} failed: {problem}")
        return problem

    def _run(
        self,
        argv: list[str],
        env: Mapping[str, str],
        watch: Callable[[threading.Event], None],
        process: subprocess.Popen[bytes] | None = None,
    ) -> Ended:
        payload = Payload(argv, env, self._whether_it_must_end, process, self._departure.note_time)
        self._payload = payload
        done = threading.Event()
        threading.Thread(
            target=self._guarded(watch), args=(done,), name="watch", daemon=True
        ).start()
        sampling = (
            GpuSampler(self._note) if self._plan.site.device == "cuda" else contextlib.nullcontext()
        )
        try:
            with sampling:
                code = payload.run()
        finally:
            done.set()
        return self._judge(payload, code, Path(env["TFT_FAILURES"]))

    def _whether_it_must_end(self) -> str:
        """Asked by the thread that all processes live in: so it starts those that are to wait."""
        self._warm.start()
        return self._must_end

    def _judge(self, payload: Payload, code: int, failures: Path) -> Ended:
        """Say how an attempt ended."""
        run, task = self._plan.run, self._task
        if payload.stopped_by is not None:
            reason = f"stopped by {payload.stopped_by.name}"
            complain(f"{self._name} was {reason} (node down, requeue, time limit or cancel)")
        elif payload.killed_for == FINISHED:
            say(f"{self._name} ends: {FINISHED}")
            return Ended(code=0)
        elif self._fenced():
            complain(f"{self._name} was fenced: a newer copy of this replica group runs elsewhere")
            # The group's state is the newer copy's: this is told, and changes nothing.
            self._note("fenced")
            return Ended(code=ELSEWHERE_CODE)
        elif payload.killed_for or code != 0 or task.replica == NO_GROUP:
            reason = payload.killed_for or why(failures, code)
            where = "" if payload.killed_for else f"; every rank's output: {failures.parent}"
            node = "" if payload.killed_for else node_of(failures)
            if node and reason.endswith(SILENT) and not self._reaches_lighthouse():
                node, other = task.node, node  # it is this one that is cut off
                reason = f"{UNFIT}{node} reaches neither {other} nor the lighthouse"
            complain(f"{self._name} failed: {reason}{where}")
            return Ended(code=code or 1, reason=reason, trained=self._has_trained(), node=node)
        elif self._departure.left(run.events(task.replica), self._events_from):
            if self._departure.time_is_up:
                return Ended(code=ELSEWHERE_CODE, reason=TIME_IS_UP, trained=True)
            reason = leaving.LEFT
            say(f"{self._name} {reason}")
        else:
            reason = "finished"
            text = json.dumps({"replica": task.replica, "t": time.time()}) + "\n"
            try:
                create_once(run.finished, text)
            except (KitError, OSError) as error:
                complain(f"that the run has finished is not written down: {error}")
            say(f"{self._name} finished")
        self._note("exit", code=code, reason=reason)
        return Ended(code=code, stopped=payload.stopped_by is not None)

    def _decide(self, ended: Ended) -> Decision:
        """Remember this ending beside those of earlier attempts, and decide on all of them."""
        run, task = self._plan.run, self._task
        path = run.endings(task.replica)
        if task.replica == NO_GROUP:
            path = run.groups / f"spare-{task.index}.endings.jsonl"
        host = ended.node if ended.reason.startswith(UNFIT) and ended.node else task.where
        ending = Ending(t=time.time(), host=host, reason=ended.reason, trained=ended.trained)
        return decide(records.remember(path, ending), self._plan.limits, ending.t)

    def _leave(self, decision: Decision, code: int) -> int:
        self._warm.end()
        if decision.next is Next.NEVER:
            return 1 if code == ELSEWHERE_CODE else code  # that one asks for another start
        if not self._plan.slurm_task:
            return ELSEWHERE_CODE
        try:
            self._slurm.requeue(self._plan.slurm_task)
        except KitError as error:
            complain(f"it cannot requeue itself ({error}): the guardian does, if there is one")
            return ELSEWHERE_CODE
        time.sleep(REQUEUE_SECONDS)  # Slurm's SIGTERM ends this
        return ELSEWHERE_CODE

    # -- beside the ranks, in threads of their own: shared files may hang, ranks must not ----

    def _watch(self, done: threading.Event) -> None:
        """Look for a newer copy and for orders, while a group trains. From its first committed
        step on, others wait beside it for its next start."""
        warm = self._plan.site.warm and self._plan.limits.here > 0
        while not done.wait(LOOK_EVERY):
            if self._fenced():
                return
            run, task = self._plan.run, self._task
            if warm and self._committed():
                warm = False
                self._stood_by += 1
                self._warm.prepare(run.standby_ranks(task.index, self._stood_by), done)
            order = self._orders.of_attempt(task.replica, task.attempt)
            if self._departure.overdue(task.replica):
                self._end_attempt(done, TIME_IS_UP)
                return
            leaves = order.why if order is not None and order.do == "leave" else ""
            if leaves or self._departure.turn(task.replica):
                self._departure.tell(run, task, self._events_from, leaves or TIME_IS_UP)
            elif order is not None:
                complain(f"{self._name} is to end: {order.why}; its stacks are collected first")
                stacks.of_attempt(run, task, self._events_from, self._payload)
                self._end_attempt(done, order.why)
                return

    def _end_attempt(self, done: threading.Event, reason: str) -> None:
        """Have the attempt killed that ``done`` belongs to: by now it may be another one's turn."""
        if not done.is_set():
            self._must_end = reason

    def _await_orders(self, done: threading.Event, standby: Standby) -> None:
        """Wait to be told which group to be; then watch over it."""
        run, task, shown = self._plan.run, self._task, 0.0
        while not done.wait(STAND_BY_EVERY):
            if run.finished.exists() or self._departure.time_is_up:
                self._must_end = TIME_IS_UP if self._departure.time_is_up else FINISHED
                return
            if not standby.ready:
                continue
            if not shown:
                say(f"{self._name} stands ready")
            if time.monotonic() - shown > spares.SIGN_EVERY:
                shown = time.monotonic()
                spares.show(
                    run.groups, spares.Spare(task=task.index, host=task.node, t=time.time())
                )
            order = self._orders.take_over(task.index)
            if order is not None and self._still_lost(order):
                spares.withdraw(run.groups, task.index)
                task, env = self._begin(order.replica)
                leaving.prepare(run, task)
                if not standby.become(self._plan.flags(task), env):
                    self._end_attempt(done, "its ranks cannot be told what to be")
                self._watch(done)
                return

    def _still_lost(self, order: Order) -> bool:
        """Whether the attempt that is to be replaced is still the group's newest: an order may
        be read late, when the group has come back by itself."""
        newest = lease.current(self._plan.run.lease(order.replica))
        return newest is not None and newest.number == order.attempt

    def _guarded(
        self, watch: Callable[[threading.Event], None]
    ) -> Callable[[threading.Event], None]:
        """A watch whose end is noticed: without one, nobody would be fenced or restarted."""

        def guarded(done: threading.Event) -> None:
            try:
                watch(done)
            except Exception as error:
                complain(f"{self._name}: its watch failed: {error!r}")
                self._end_attempt(done, f"its watch failed: {error}")

        return guarded

    def _fenced(self) -> bool:
        """Whether a newer copy of our group has started."""
        held = self._lease
        if held is None or not lease.lost(self._plan.run.lease(held.replica), held):
            return False
        self._must_end = self._must_end or "fenced"
        return True

    def _another_tasks(self) -> bool:
        """Whether the newer copy is another array task's, and not this one's, started anew."""
        mine = self._lease
        newest = lease.current(self._plan.run.lease(mine.replica)) if mine is not None else None
        return newest is not None and newest.task != self._task.index

    # -- the group's own records -----------------------------------------------------

    def _has_trained(self) -> bool:
        if self._lease is None:
            return False
        return time.monotonic() - self._started > TRAINED_SECONDS or self._committed()

    def _committed(self) -> bool:
        """Whether this attempt has committed a step."""
        return records.committed(self._plan.run.events(self._task.replica), self._events_from)

    def _note(self, kind: str, **fields: object) -> None:
        if self._task.replica == NO_GROUP:
            return  # it has no events of its own
        records.note(self._plan.run, self._task, kind, **fields)
