"""One node of a replica group of several: ``python -m launcher.task node``, started by srun.

It is told by the group's leader what to run, and says how that ended. Its ranks live no longer
than the leader: whoever ends the leader, by whatever signal, has ended the ranks on every node.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from launcher import nodecheck, records, stacks, wire
from launcher.command import Torchrun
from launcher.config import Site
from launcher.environment import Task
from launcher.files import overwrite
from launcher.gpus import GpuSampler
from launcher.model import KitError, UsageError
from launcher.payload import GONE_SECONDS, Payload
from launcher.rundir import node_events
from launcher.standby import local_folder

#: What srun passes on: where the leader listens, and the key that both know.
LEADER, KEY = "TFT_LEADER", "TFT_LEADER_KEY"
#: Seconds for the leader to say what to run.
ANSWER_SECONDS = 30.0
#: Why ranks are killed: their leader has gone, or has said so.
ALONE, TOLD = "its leader is gone", "told to"


def run_node(env: Mapping[str, str]) -> int:
    """Run this node's part of one attempt.

    Returns:
        torchrun's exit code.

    Raises:
        UsageError: it was not started by a leader.
        KitError: the leader is not there.
    """
    if LEADER not in env or KEY not in env:
        raise UsageError("a node's part of a replica group is started by its launcher only")
    host, _, port = env[LEADER].rpartition(":")
    name = env.get("SLURMD_NODENAME") or os.uname().nodename
    channel = wire.connect(host, int(port), env[KEY])
    if channel is None or not channel.send("hello", name=name):
        raise KitError(f"{name} cannot reach the launcher of its replica group at {env[LEADER]}")
    start = channel.receive(ANSWER_SECONDS)
    if start is None or start["do"] != "start":
        return 1  # the attempt is over already
    ours = {key: value for key, value in env.items() if key not in (LEADER, KEY)}
    with local_folder() as folder:
        return _Node(name, channel, start, ours, Path(folder)).run()


class _Node:
    """One attempt's part on this node."""

    def __init__(
        self,
        name: str,
        channel: wire.Channel,
        start: Mapping[str, Any],
        env: Mapping[str, str],
        local: Path,
    ) -> None:
        self._name, self._channel = name, channel
        self._site = Site.from_environment(env)
        self._rank, self._ranks = int(start["rank"]), int(start["ranks_per_node"])
        logs = Path(start["log_dir"])
        self._failures = logs / f"failures.{self._rank}.json"
        self._waits = "TFT_STANDBY" in env
        self._assignment = local / "assignment.json"
        self._env = self._own(env)
        self._torchrun = Torchrun(
            ranks_per_node=self._ranks,
            log_dir=logs / f"node-{self._rank}",
            node_address=self._site.node_address,
            nodes=int(start["nodes"]),
            node_rank=self._rank,
            master=str(start["master"]),
            entry=str(start["entry"]),
        )
        self._flags = [str(flag) for flag in start["flags"]]
        self._must_end = self._problem = ""
        self._unfit = self._told_ready = False
        self._alone: socket.socket | None = None

    def run(self) -> int:
        """Run it to its end, and say how it ended."""
        code, payload = 1, None
        if self._waits:
            self._assignment.touch()
        else:
            self._check()
        threading.Thread(target=self._listen, daemon=True).start()
        if not self._problem:
            if not self._waits:
                self._await_others()
                self._sample_gpus()
            self._torchrun.log_dir.mkdir(parents=True, exist_ok=True)
            payload = Payload(self._torchrun.argv(self._flags), self._env, self._look)
            code = payload.run()
        stopped = ""
        if payload is not None and payload.stopped_by is not None:
            stopped = payload.stopped_by.name
        self._channel.send(
            "ended",
            code=code,
            problem=self._problem,
            unfit=self._unfit,
            stopped=stopped,
            told=payload is not None and bool(payload.killed_for) and not self._problem,
            failures=self._told_by_torchrun(),
        )
        return code

    def _own(self, env: Mapping[str, str]) -> dict[str, str]:
        """``env`` of a whole replica group, as it is on this node."""
        own = {**env, "TFT_FAILURES": str(self._failures)}
        if "TFT_EVENTS" in env:
            # A network file system does not keep apart what two nodes append to one file.
            own["TFT_EVENTS"] = str(node_events(Path(env["TFT_EVENTS"]), self._rank))
        if self._waits:
            own["TFT_STANDBY"] = str(self._assignment)
        return own

    def _check(self) -> None:
        """See whether this node can train; the launcher has checked the first one itself."""
        if self._rank == 0:
            return
        try:
            nodecheck.check(self._site, self._failures.parent, self._ranks)
        except KitError as error:
            self._problem = f"{self._name}: {error}"
            self._unfit = isinstance(error, nodecheck.UnfitNodeError)

    def _await_others(self) -> None:
        """Wait until no other attempt of this task has ranks here: they may be just ending, and
        hold memory that these need."""
        self._alone = socket.socket(socket.AF_UNIX)
        name = f"\0tft-node-{self._env.get('SLURM_JOB_ID')}-{self._name}"
        deadline = time.monotonic() + GONE_SECONDS
        while time.monotonic() < deadline:
            # The kernel gives such a name back with the process that has it.
            with contextlib.suppress(OSError):
                self._alone.bind(name)
                return
            time.sleep(0.02)

    def _look(self) -> str:
        """Asked by the payload, all the time: why it must be killed."""
        if self._waits and not self._told_ready and self._ready():
            self._told_ready = self._channel.send("ready")
        return self._must_end

    def _ready(self) -> bool:
        """Whether all ranks here wait."""
        return len(list(self._assignment.parent.glob("ready.*"))) >= self._ranks

    def _listen(self) -> None:
        """Do what the leader says, until it says no more."""
        while (message := self._channel.receive()) is not None:
            do = message["do"]
            if do == "end":
                self._must_end = TOLD
            elif do == "signal":
                os.kill(os.getpid(), signal.Signals(int(message["number"])))
            elif do == "stacks":
                self._collect_stacks()
            elif do == "become":
                # Beside us: checks take time, in which the leader may end.
                threading.Thread(target=self._become, args=(message,), daemon=True).start()
        self._must_end = self._must_end or ALONE

    def _become(self, message: Mapping[str, Any]) -> None:
        """Ranks that wait are told which replica group to be."""
        self._check()
        if self._problem:
            self._must_end = self._problem
            return
        self._await_others()
        env = self._own({str(key): str(value) for key, value in message["env"].items()})
        del env["TFT_STANDBY"]
        self._env |= env
        try:
            text = json.dumps({"flags": list(message["flags"]), "env": env})
            overwrite(self._assignment, text)
            self._sample_gpus()
        except OSError as error:
            self._problem = f"{self._name}: ranks that wait cannot be told what to be: {error}"
            self._must_end = self._problem

    def _sample_gpus(self) -> None:
        """From now on, to the end; the launcher does it on the first node."""
        if self._rank == 0 or self._site.device != "cuda":
            return
        replica, attempt = (int(self._env[name]) for name in ("REPLICA_GROUP_ID", "TFT_ATTEMPT"))
        task = Task(replica=replica, attempt=attempt, node=self._name)
        GpuSampler(partial(records.append, Path(self._env["TFT_EVENTS"]), task)).__enter__()

    def _collect_stacks(self) -> None:
        with contextlib.suppress(KeyError, ValueError, OSError):
            stacks.collect(
                Path(self._env["TFT_STACKS"]),
                Path(self._env["TFT_EVENTS"]),
                attempt=int(self._env["TFT_ATTEMPT"]),
                start=0,
            )

    def _told_by_torchrun(self) -> list[dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return [dict(one) for one in json.loads(self._failures.read_text(encoding="utf-8"))]
        return []
