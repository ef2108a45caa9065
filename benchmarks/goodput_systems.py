"""The systems that ``goodput.py`` compares: how each is started, and hit, and what it has committed."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil

from benchmarks.arena import REPOSITORY, Arena, Training, until
from benchmarks.goodput_account import Commit, useful
from benchmarks.recovery import KIT, PLAIN, plain_lighthouse, restart_plain
from launcher.model import KitError

#: Seconds between two looks of the relaunch loop, as torchft's own Slurm example has it.
POLL_SECONDS = 10.0
#: Seconds for which a lost node stays away, and the lighthouse.
NODE_AWAY, LIGHTHOUSE_AWAY = 20.0, 10.0
CLASSIC = "llama3.1-8b-pretraining.sh"


class Contest:
    """One training that goes on."""

    def __init__(self, arena: Arena, folder: Path, job: int, variable: str) -> None:
        """``variable`` of a rank's environment says which victim it is."""
        self.arena, self.folder, self.job = arena, folder, job
        self._variable = variable
        self._timers: list[threading.Timer] = []
        self.outage: Callable[[], None] | None = None
        """Takes the lighthouse away for `LIGHTHOUSE_AWAY` seconds; None without one."""

    def commits(self) -> list[Commit]:
        """All group steps that counted, also those that were lost again."""
        found = []
        for path in self.folder.glob("*.events.jsonl"):
            for line in path.read_text().splitlines():
                if '"kind":"commit"' in line and '"committed":true' in line:
                    event = json.loads(line)
                    found.append(Commit(event["t"], event["step"], event["replica"]))
        return found

    def done(self, begin: float, end: float) -> int:
        """Group steps of a window that count. Without checkpoints all that was committed does,
        also where every group was lost at once and the training began anew: as if it had just
        been saved, at no cost. (The report says how often that was.)"""
        return sum(begin < c.t <= end for c in self.commits())

    def kill(self, victim: int) -> bool:
        """Kill the rank of one group, if there is one just now."""
        with contextlib.suppress(psutil.Error):
            for process in self._ranks(victim):
                process.kill()
                return True
        return False

    def _ranks(self, victim: int) -> Iterator[psutil.Process]:
        """The rank that trains (others may wait beside it)."""
        pids = [
            event["pid"]
            for path in self.folder.glob(f"*_{victim}.events.jsonl")
            for event in map(json.loads, path.read_text().splitlines())
            if event["kind"] == "start"
        ]
        for process in self._processes(victim):
            if pids and process.pid == pids[-1]:
                yield process

    def lose_node(self, victim: int) -> bool:
        """Take the node of one group down, for a while."""
        for process in self._processes(victim):
            with contextlib.suppress(psutil.Error, KitError):
                node = process.environ().get("SLURMD_NODENAME", "")
                slurm = self.arena.sandbox.slurm()
                slurm.set_node_state(node, "DOWN", "benchmark")
                timer = threading.Timer(NODE_AWAY, self._give_back, (node,))
                timer.start()
                self._timers.append(timer)
                return True
        return False

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for node in self.arena.sandbox.slurm().nodes():
            if not node.up:
                self._give_back(node.name)

    def _give_back(self, node: str) -> None:
        with contextlib.suppress(KitError):
            self.arena.sandbox.slurm().set_node_state(node, "RESUME")

    def _processes(self, victim: int) -> Iterator[psutil.Process]:
        conf = str(self.arena.sandbox.conf)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                env = process.environ()
                if env.get("SLURM_CONF") == conf and env.get(self._variable) == str(victim):
                    yield process


class ClassicContest(Contest):
    """A classic job: every step of it is a step of all its nodes."""

    nodes = 0

    def _ranks(self, victim: int) -> Iterator[psutil.Process]:
        for process in self._processes(victim):
            with contextlib.suppress(psutil.Error):
                if "launcher.train" in process.cmdline():
                    yield process

    def done(self, begin: float, end: float) -> int:
        commits = self.commits()
        return useful(commits, end) - useful(commits, begin)

    def commits(self) -> list[Commit]:
        found = []
        for path in self.folder.glob("node-0.events.jsonl"):
            for line in path.read_text().splitlines():
                if '"kind":"metrics"' in line:
                    event = json.loads(line)
                    found += [
                        Commit(event["t"], event["titan_step"], node) for node in range(self.nodes)
                    ]
        return found


System = Callable[[Arena, int, Mapping[str, str], str], contextlib.AbstractContextManager[Contest]]


@contextlib.contextmanager
def _of(training: Training, arena: Arena, groups: int) -> Iterator[Contest]:
    contest = Contest(arena, training.dir.path, training.dir.manifest().array_job_id,
                      "SLURM_ARRAY_TASK_ID")  # fmt: skip
    try:
        training.full(groups)
        yield contest
    finally:
        contest.close()


@contextlib.contextmanager
def kit(arena: Arena, groups: int, settings: Mapping[str, str], flags: str) -> Iterator[Contest]:
    """(a) This kit, as it is."""
    env = {**KIT, **settings, "TFT_EXTRA_ARGS": flags}
    with (
        arena.lighthouse(),
        arena.run(groups, env) as training,
        _of(training, arena, groups) as contest,
    ):
        contest.outage = lambda: training.hold_lighthouse(LIGHTHOUSE_AWAY)
        yield contest


@contextlib.contextmanager
def plain(arena: Arena, groups: int, settings: Mapping[str, str], flags: str) -> Iterator[Contest]:
    """(b) An array with ``--requeue``, torchft's own defaults, nobody who looks after it."""
    env = {**PLAIN, **settings, "TFT_EXTRA_ARGS": flags}
    with (
        plain_lighthouse(arena) as running,
        arena.run(groups, env) as training,
        _of(training, arena, groups) as contest,
    ):
        contest.outage = lambda: restart_plain(arena, running, LIGHTHOUSE_AWAY)
        yield contest


@contextlib.contextmanager
def relaunch(
    arena: Arena, groups: int, settings: Mapping[str, str], flags: str
) -> Iterator[Contest]:
    """(e) The same, and a loop that starts again what is not running."""
    with plain(arena, groups, settings, flags) as contest:
        done = threading.Event()
        loop = threading.Thread(target=_relaunch_loop, args=(contest, done), daemon=True)
        loop.start()
        try:
            yield contest
        finally:
            done.set()
            loop.join(30)


def _relaunch_loop(contest: Contest, done: threading.Event) -> None:
    slurm = contest.arena.sandbox.slurm()
    while not done.wait(POLL_SECONDS):
        with contextlib.suppress(KitError):
            for job in slurm.jobs(contest.job):
                task = f"{contest.job}_{job.task}"
                with contextlib.suppress(KitError):
                    if not job.live:
                        slurm.requeue(task)
                    if job.state != "RUNNING":
                        # A job submitted anew would not wait for Slurm's delay of requeues.
                        slurm.start_now(task)


@contextlib.contextmanager
def classic(
    arena: Arena, groups: int, settings: Mapping[str, str], flags: str
) -> Iterator[Contest]:
    """(c) One job over all nodes, with checkpoints; what fails is started again at once, in the
    same allocation, and a lost node is Slurm's to requeue."""
    command = f"until bash {CLASSIC}; do sleep 1; done"
    sbatch = ["sbatch", "--parsable", f"--nodes={groups}", "--ntasks-per-node=1", "--exclusive"]
    sbatch += ["--gpus-per-node=8", "--cpus-per-task=128", "--requeue", "--open-mode=append"]
    sbatch += [
        f"--{kind}=outputs/torchft/.slurm/classic-%j.{kind[:3]}" for kind in ("output", "error")
    ]
    job = int(arena.sh(*sbatch, f"--wrap={command}", env={**settings, "TFT_EXTRA_ARGS": flags}))
    folder = REPOSITORY / "outputs" / "classic" / str(job)
    contest = ClassicContest(arena, folder, job, "SLURM_NODEID")
    contest.nodes = groups
    slurm = arena.sandbox.slurm()
    try:
        until(lambda: len({c.step for c in contest.commits()}) > 8, "the classic job trains")
        yield contest
    finally:
        slurm.cancel(job)
        until(lambda: not any(j.live for j in slurm.jobs(job)), "the classic job ends")
        contest.close()
        time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)
