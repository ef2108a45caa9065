"""One torchrun over several nodes, as one process: ``python -m launcher.task leader``.

::

    launcher ── leader ── srun ┄┄ on each node: node ── torchrun ── ranks
                  └───────── TCP ──────────┘

A launcher treats it as it treats the torchrun of a single node: it ends when the ranks end, and
they end with it. srun alone is no such process: killed, it leaves the ranks behind. So the nodes
hold a connection to the leader, and end their ranks when that ends.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from launcher import stacks, wire
from launcher.command import TRAINER
from launcher.files import replace
from launcher.model import KitError
from launcher.node import KEY, LEADER
from launcher.parentage import die_with_parent
from launcher.payload import ENDING, FORWARDED, GONE_SECONDS
from launcher.restarts import SILENT
from launcher.slurm import over_nodes

#: Seconds for srun to start every node's part: Slurm may hold a step back for a moment.
START_SECONDS = 60.0
#: Seconds between two looks when nothing is heard.
LOOK_EVERY = 0.05
#: Seconds in which a signal that Slurm has sent to a node also reaches the launcher.
FOLLOWS_SECONDS = 3.0
#: Seconds for nodes to end their ranks, and for srun to end after them.
END_SECONDS, SRUN_SECONDS = GONE_SECONDS + 3.0, 10.0
#: Where the ranks of a group meet is chosen here: below the ports that Linux gives out itself.
PORTS = range(20_000, 29_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What runs on which nodes."""

    nodes: tuple[str, ...]
    """By their rank; the first one is this."""
    ranks_per_node: int
    address: str
    """Under which the others reach this node."""
    log_dir: Path
    entry: str = TRAINER
    """Module that every rank runs."""
    flags: tuple[str, ...] = ()
    """The trainer's."""

    def argv(self) -> list[str]:
        """The command of its leader."""
        return [
            *(sys.executable, "-m", "launcher.task", "leader"),
            f"--nodes={','.join(self.nodes)}",
            f"--ranks-per-node={self.ranks_per_node}",
            f"--address={self.address}",
            f"--log-dir={self.log_dir}",
            f"--entry={self.entry}",
            "--",
            *self.flags,
        ]

    @classmethod
    def of_argv(cls, words: Sequence[str]) -> Spread:
        """Read what ``argv`` has written, after the word ``leader``."""
        parser = argparse.ArgumentParser(prog="launcher.task leader")
        parser.add_argument("--nodes", required=True)
        parser.add_argument("--ranks-per-node", type=int, required=True)
        parser.add_argument("--address", required=True)
        parser.add_argument("--log-dir", type=Path, required=True)
        parser.add_argument("--entry", required=True)
        cut = list(words).index("--")
        options = parser.parse_args(words[:cut])
        return cls(
            nodes=tuple(options.nodes.split(",")),
            ranks_per_node=options.ranks_per_node,
            address=options.address,
            log_dir=options.log_dir,
            entry=options.entry,
            flags=tuple(words[cut + 1 :]),
        )


@dataclass(slots=True)
class _Member:
    """One node's part."""

    name: str
    channel: wire.Channel | None = None
    ready: bool = False
    ended: bool = False
    code: int = 0
    records: list[dict[str, Any]] = field(default_factory=list)
    """How it ended badly, as torchrun's failures."""

    def say(self, do: str, **fields: object) -> None:
        if self.channel is not None and not self.ended:
            self.channel.send(do, **fields)


class Leader:
    """Leads one attempt."""

    def __init__(self, spread: Spread, env: Mapping[str, str]) -> None:
        self._spread = spread
        self._env = {name: value for name, value in env.items() if name != "TFT_LAUNCHER"}
        self._failures = Path(env["TFT_FAILURES"])
        waits = env.get("TFT_STANDBY")
        self._assignment = Path(waits) if waits else None
        self._members = {name: _Member(name) for name in spread.nodes}
        self._heard: queue.Queue[tuple[_Member, dict[str, Any] | None]] = queue.Queue()
        self._signals: list[signal.Signals] = []
        self._stopped: signal.Signals | None = None
        self._code = 0
        """Of the first node whose part ended badly."""
        self._end_by: float | None = None
        """When nodes that were told to end must have done so, monotonic seconds."""
        self._key = ""
        self._master = ""

    def run(self) -> int:
        """Lead it to its end.

        Returns:
            0, or the exit code of the first node's part that ended badly; 128 + n when signal n
            ended it.
        """
        for number in (*FORWARDED, stacks.SIGNAL):
            signal.signal(number, self._note_signal)
        self._key = os.urandom(32).hex()
        self._master = f"{self._spread.address}:{_free_port()}"
        began = time.monotonic()
        with wire.listen() as listener:
            threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
            srun = self._srun(listener.getsockname()[1])
            try:
                while not self._is_over(srun):
                    self._hear()
                    self._pass_signals_on()
                    self._hand_over()
                    if time.monotonic() - began > START_SECONDS and self._end_by is None:
                        self._miss(f"has not started its part within {START_SECONDS:.0f} s")
            finally:
                self._say_goodbye(srun)
        self._write_down(srun.returncode)
        if self._stopped is not None:
            return 128 + int(self._stopped)
        return self._code

    def _srun(self, port: int) -> subprocess.Popen[bytes]:
        env = self._env | {LEADER: f"{self._spread.address}:{port}", KEY: self._key}
        argv = [sys.executable, "-m", "launcher.task", "node"]
        return subprocess.Popen(
            over_nodes(
                len(self._members),
                argv,
                cpus=env.get("SLURM_CPUS_PER_TASK", ""),
                gpus=env.get("SLURM_GPUS_ON_NODE", ""),
            ),
            env=env,
            stdin=subprocess.DEVNULL,
        )

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._signals.append(signal.Signals(number))

    # -- the nodes, each heard in a thread of its own ---------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed: it is over
            while True:
                sock, _ = listener.accept()
                threading.Thread(target=self._listen, args=(sock,), daemon=True).start()

    def _listen(self, sock: socket.socket) -> None:
        channel = wire.accept(sock, self._key)
        hello = channel.receive(wire.HANDSHAKE_SECONDS) if channel is not None else None
        if channel is None or hello is None:
            return
        member = self._members.get(str(hello.get("name")))
        if member is None or member.channel is not None:
            channel.close()
            return
        member.channel = channel
        message: dict[str, Any] | None = hello
        while message is not None:
            self._heard.put((member, message))
            message = channel.receive()
        self._heard.put((member, None))

    def _hear(self) -> None:
        with contextlib.suppress(queue.Empty):
            member, message = self._heard.get(timeout=LOOK_EVERY)
            if message is None:
                self._gone(member)
            elif message["do"] == "hello":
                self._start(member)
            elif message["do"] == "ready":
                member.ready = True
                self._tell_whether_ready()
            elif message["do"] == "ended":
                self._ended(member, message)

    def _start(self, member: _Member) -> None:
        if self._end_by is not None or self._stopped is not None:
            member.say("end")
            return
        spread = self._spread
        member.say(
            "start",
            rank=spread.nodes.index(member.name),
            nodes=len(spread.nodes),
            ranks_per_node=spread.ranks_per_node,
            master=self._master,
            log_dir=str(spread.log_dir),
            entry=spread.entry,
            flags=spread.flags,
        )

    def _ended(self, member: _Member, said: Mapping[str, Any]) -> None:
        """A node's part has ended, and says how."""
        member.ended, member.code = True, int(said["code"])
        if said["told"] or (member.code == 0 and not said["problem"]):
            return
        for record in said["failures"]:
            member.records.append({**record, "node": member.name})
        if said["problem"]:
            kind = "unfit" if said["unfit"] else "problem"
            member.records = [{kind: said["problem"], "node": member.name}]
        elif not member.records:
            what = f"was stopped by {said['stopped']}" if said["stopped"] else "itself failed"
            text = f"torchrun on {member.name} {what}"
            member.records = [{"problem": text, "node": member.name}]
        self._code = self._code or member.code or 1
        if said["stopped"]:
            # By Slurm, as a rule, which then tells the others, and the launcher, too.
            self._end_by = self._end_by or time.monotonic() + END_SECONDS
            for other in self._members.values():
                other.say("signal", number=int(signal.Signals[said["stopped"]]))
        else:
            self._end_all()

    def _gone(self, member: _Member) -> None:
        """The connection to a node has ended."""
        if member.ended:
            return
        member.ended, self._code = True, self._code or 1
        silent = member.channel is not None and member.channel.silent
        what = SILENT if silent else "has ended its part without a word"
        kind = "unfit" if silent else "problem"
        member.records = [{kind: f"{member.name} {what}", "node": member.name}]
        self._end_all()

    def _miss(self, what: str) -> None:
        """Give up nodes that have not said hello. When none has, it is no node's fault."""
        missing = [m for m in self._members.values() if m.channel is None and not m.ended]
        kind = "problem" if len(missing) == len(self._members) else "unfit"
        for member in missing:
            member.ended, self._code = True, self._code or 1
            member.records = [{kind: f"{member.name} {what}", "node": member.name}]
        if missing:
            self._end_all()

    def _end_all(self) -> None:
        """Have the ranks killed on every node."""
        self._end_by = self._end_by or time.monotonic() + END_SECONDS
        for member in self._members.values():
            member.say("end")

    # -- between the launcher and the nodes --------------------------------------------------

    def _pass_signals_on(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == stacks.SIGNAL:
                for member in self._members.values():
                    member.say("stacks")
                continue
            if number in ENDING and self._stopped is None:
                self._stopped = number
                self._end_by = None  # in their own time: the launcher kills us when it is over
            for member in self._members.values():
                member.say("signal", number=int(number))

    def _hand_over(self) -> None:
        """Tell ranks that wait which replica group to be, once the launcher has."""
        if self._assignment is None:
            return
        with contextlib.suppress(OSError):
            text = self._assignment.read_text(encoding="utf-8")
            if text.endswith("}"):
                self._assignment = None
                told = json.loads(text)
                for member in self._members.values():
                    member.say("become", flags=told["flags"], env=told["env"])

    def _tell_whether_ready(self) -> None:
        if self._assignment is not None and all(m.ready for m in self._members.values()):
            for rank in range(len(self._members) * self._spread.ranks_per_node):
                with contextlib.suppress(OSError):
                    (self._assignment.parent / f"ready.{rank}").touch()

    # -- the end ---------------------------------------------------------------------------------

    def _is_over(self, srun: subprocess.Popen[bytes]) -> bool:
        now = time.monotonic()
        if all(member.ended for member in self._members.values()):
            return True
        if self._end_by is not None:
            return now > self._end_by
        if srun.poll() is not None and self._stopped is None:
            if srun.returncode > 0:
                self._miss("could not be given its part by Slurm")
            # Nodes that still run are told to end; those that never began never will.
            self._code = self._code or 1
            for member in self._members.values():
                member.ended = member.ended or member.channel is None
            self._end_all()
        return self._stopped is not None and srun.poll() is not None

    def _say_goodbye(self, srun: subprocess.Popen[bytes]) -> None:
        """Let go of the nodes, which end then, and srun with them."""
        if self._code and self._stopped is None and self._was_signalled():
            deadline = time.monotonic() + FOLLOWS_SECONDS
            while not self._signals and time.monotonic() < deadline:
                time.sleep(LOOK_EVERY)
            self._stopped = next((n for n in self._signals if n in ENDING), None)
        for member in self._members.values():
            if member.channel is not None:
                member.channel.close()
        try:
            srun.wait(SRUN_SECONDS)
        except subprocess.TimeoutExpired:
            srun.kill()
            srun.wait()

    def _was_signalled(self) -> bool:
        return any("was stopped by" in str(r.get("problem")) for r in self._records())

    def _records(self) -> list[dict[str, Any]]:
        return [record for member in self._members.values() for record in member.records]

    def _write_down(self, srun_code: int) -> None:
        """What the launcher reads as torchrun's failures."""
        records = self._records()
        silent = [m for m in self._members.values() if not m.ended]
        if self._code and self._stopped is None:
            for member in silent:
                text = f"{member.name} {SILENT}"
                records.append({"unfit": text, "node": member.name})
            if not records:
                records.append({"problem": f"srun ended with code {srun_code}"})
            with contextlib.suppress(KitError, OSError):
                replace(self._failures, json.dumps(records))


def _free_port() -> int:
    """A port that nobody listens on here."""
    while True:
        port = random.choice(PORTS)  # noqa: S311
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port


def run_leader(words: Sequence[str], env: Mapping[str, str]) -> int:
    """Lead what ``words`` say; returns its exit code."""
    die_with_parent(parent=int(env.get("TFT_LAUNCHER") or 0))
    return Leader(Spread.of_argv(words), env).run()
