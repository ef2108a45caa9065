"""Aims a drill at a run, carries its commands out, and puts back what they changed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from launcher import hands, stacks
from launcher.drills import OWNER, SANDBOX, Follows, Kind, Step, Target
from launcher.lighthouse import LighthouseDir, alive
from launcher.model import BlindError, KitError, UsageError
from launcher.process import Run, run
from launcher.rundir import Manifest, RunDir
from launcher.scheduler import LOCAL, Scheduler
from launcher.state import RunState

#: File that marks a sandbox's folder.
MARK = ".tft-sandbox"
#: Partition of a sandbox whose jobs preempt.
SANDBOX_PARTITION = "urgent"
#: Name of replica groups in the quorum, which torchtitan gives them, or in a script this kit
#: (``launcher/train/manager.py``).
MEMBER, SCRIPT_MEMBER = "torchtitan_ft_{replica}:{uuid}", "replica_{replica}:{uuid}"
#: Seconds that a command in the background gets to undo what it did.
END_SECONDS = 10.0
#: Seconds that a task gets to end (`KillWait` and an epilog).
COMPLETING_SECONDS = 90.0


class Background(Protocol):
    """A command that goes on."""

    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def wait(self, timeout: float | None = None) -> int: ...


def start(argv: Sequence[str]) -> Background:
    """Start a command whose output nobody needs."""
    return subprocess.Popen(
        list(argv),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us: it is ended in its turn
    )


class Injector:
    """Carries out commands; how they are run is injected, for tests."""

    def __init__(
        self,
        slurm: Scheduler,
        say: Callable[[str], None],
        *,
        run: Run = run,
        start: Callable[[Sequence[str]], Background] = start,
    ) -> None:
        self._slurm, self._say = slurm, say
        self._run, self._start = run, start
        self._going: list[Background] = []

    def inject(self, kind: Kind, target: Target) -> None:
        """Make the failure.

        Raises:
            KitError: a command failed; what was changed before is put back.
        """
        try:
            for step in kind.steps(target):
                self._do(step, target)
        except BaseException:
            self.restore(kind, target)
            raise

    def restore(self, kind: Kind, target: Target) -> list[str]:
        """Put back what the failure changed; every command is tried. Returns what did not work."""
        problems = []
        for going in self._going:
            try:
                if going.poll() is None:
                    going.terminate()
                going.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                problems.append("a command in the background does not end")
        self._going.clear()
        for step in kind.restore(target):
            try:
                self._do(step, target)
            except KitError as error:
                if not self._is_up(kind, target):
                    problems.append(str(error))
        return problems

    def _do(self, step: Step, target: Target) -> None:
        if step.if_ended and self._is_live(target):
            return
        self._say("$ " + shown(step))
        if step.background:
            self._going.append(self._start(step.argv))
            return
        done = self._run(step.argv)
        # One that kills its own task is killed with it.
        of_itself = step.argv[0] == "srun" and "--whole-task" in step.argv
        if done.code != 0 and not of_itself:
            said = (done.err or done.out).strip().splitlines()
            why = said[-1] if said else f"exit code {done.code}"
            raise KitError(f"{shown(step)}: {why.removeprefix('error: ')}")

    def _is_live(self, target: Target) -> bool:
        """Whether the task may go on; one that is just ending is waited for."""
        deadline = time.monotonic() + COMPLETING_SECONDS
        while True:
            states = [
                j
                for j in self._slurm.jobs(*RunDir(Path(target.run)).arrays())
                if j.task == target.task
            ]
            ending = any(job.state == "COMPLETING" for job in states)
            if not ending or time.monotonic() > deadline:
                return any(job.live for job in states)
            time.sleep(0.5)

    def _is_up(self, kind: Kind, target: Target) -> bool:
        """Whether Slurm has taken a node back by itself, and refuses to resume it."""
        if not kind.whole_node:
            return False
        try:
            return any(node.up for node in self._slurm.nodes() if node.name == target.node)
        except BlindError:
            return False


def shown(step: Step) -> str:
    """A command as one would type it."""
    import shlex

    return shlex.join(step.argv) + (" &" if step.background else "")


def aim(
    kind: Kind,
    run_dir: RunDir,
    manifest: Manifest,
    state: RunState,
    slurm: Scheduler,
    env: Mapping[str, str],
    *,
    replica: int | None = None,
    node: str = "",
    rank: int = 0,
    seconds: float = 20.0,
    partition: str = "",
) -> Target:
    """What a drill of that kind hits: one replica group of this run, and nothing else.

    Raises:
        UsageError: there is no such group, or the drill cannot be done here; says why.
        BlindError: Slurm cannot be asked.
    """
    local = manifest.cluster == LOCAL
    if local and (kind.whole_node or kind.rights != OWNER):
        raise UsageError(
            f"{kind.name} is done to Slurm's nodes, and {manifest.run} runs on this machine without "
            "Slurm: kill-replica, for example, needs none (`python -m launcher drill list`)"
        )
    folder = str(Path(env.get("SLURM_CONF", "/")).parent)
    sandbox = folder if (Path(folder) / MARK).is_file() else ""
    if kind.rights == SANDBOX and not sandbox:
        raise UsageError(
            f"{kind.name} is for a sandbox (`python -m launcher sandbox up`): on a cluster an "
            "operator does it by hand, and `python -m launcher monitor` shows what follows"
        )
    chosen = _replica(manifest, state, replica, node)
    group = state.groups[chosen]
    if kind.follows is Follows.LOSS and manifest.group_size < 2:
        raise UsageError("a run of one replica group has no peer to heal from: nothing to drill")
    place = node or group.host
    if len(group.nodes) > 1 and not node:
        place = group.nodes[min(rank // manifest.ranks_per_node, len(group.nodes) - 1)]
    elif len(group.nodes) > 1 and rank == 0:
        rank = group.nodes.index(node) * manifest.ranks_per_node
    if kind.whole_node:
        others = [job for job in slurm.arrays_on(place) if job not in run_dir.arrays()]
        if others:
            raise UsageError(f"job {others[0]} of another run is on {place}, too: not touched")
    partition = partition or (SANDBOX_PARTITION if sandbox else "")
    if kind.name == "preempt" and not partition:
        raise UsageError("preempt needs --partition: one whose jobs preempt those of this run")
    pids: dict[int, int] = {}
    for number in range(manifest.nodes_per_group):
        pids |= stacks.rank_pids(run_dir.events(chosen, number), group.attempt)
    at_node = () if local else _way_to(place, pids, run_dir, group.task_index, slurm)
    if not 0 <= rank < max(1, len(pids)):
        raise UsageError(f"replica {chosen} has ranks 0 to {len(pids) - 1}, and no {rank}")
    array = _array_of(run_dir, group.task_index, slurm)
    return Target(
        run=str(run_dir.path),
        array=array,
        task=group.task_index,
        node=place,
        replica=chosen,
        pids=tuple(pids[number] for number in sorted(pids)),
        member=(SCRIPT_MEMBER if manifest.script else MEMBER).format(
            replica=chosen, uuid=state.members.get(chosen, "")
        ),
        at_node=at_node,
        python=sys.executable,
        lighthouse=_lighthouse_url(run_dir, manifest),
        supervisor=_supervisor(run_dir, manifest) if kind.follows is Follows.OUTAGE else (0, 0.0),
        sandbox=sandbox,
        partition=partition,
        time_limit=slurm.time_limit(f"{array}_{group.task_index}")
        if kind.name == "time-limit"
        else "",
        seconds=seconds,
        rank=rank,
        local=local,
    )


def _replica(manifest: Manifest, state: RunState, replica: int | None, node: str) -> int:
    if node:
        there = [
            g.replica for g in state.groups.values() if node in (g.host, *g.nodes) and not g.ended
        ]
        if not there:
            raise UsageError(f"no replica group of {manifest.run} runs on {node!r}")
        if replica not in (None, there[0]):
            raise UsageError(f"replica {there[0]} runs on {node}, and not {replica}")
        return there[0]
    # A run may have fewer groups just now than it may grow to.
    here = [each.replica for each in state.groups.values() if each.host and not each.ended]
    chosen = max(here, default=0) if replica is None else replica
    if chosen not in range(manifest.group_size):
        raise UsageError(f"{manifest.run} has replica groups 0 to {manifest.group_size - 1}")
    if chosen not in here:
        raise UsageError(
            f"replica {chosen} of {manifest.run} does not run: `launcher status` tells who"
        )
    return chosen


def _array_of(run_dir: RunDir, task: int, slurm: Scheduler) -> int:
    """The array job that runs a task of this run: its own, or one that joined it."""
    arrays = run_dir.arrays()
    if len(arrays) == 1:
        return arrays[0]
    found = (job.array_job_id for job in slurm.jobs(*arrays) if job.task == task)
    return next(found, arrays[0])


def _way_to(
    node: str,
    pids: Mapping[int, int],
    run_dir: RunDir,
    task: int,
    slurm: Scheduler,
) -> tuple[str, ...]:
    """What runs a command where those processes are: nothing, when that is here."""
    if any(hands.of_run(pid, str(run_dir.path)) for pid in pids.values()):
        return ()
    jobs = [job for job in slurm.jobs(*run_dir.arrays()) if job.task == task]
    if not jobs or jobs[0].state != "RUNNING":
        return ()
    flags = (f"--jobid={jobs[0].job_id}", "--overlap", f"--nodelist={node}")
    return ("srun", *flags, "--nodes=1", "--ntasks=1", "--quiet", "--unbuffered")


def _lighthouse_url(run_dir: RunDir, manifest: Manifest) -> str:
    address = LighthouseDir.of_run(run_dir, manifest).address()
    return address.url if address is not None else manifest.lighthouse


def _supervisor(run_dir: RunDir, manifest: Manifest) -> tuple[int, float]:
    """Where the lighthouse's supervisor is, and since when.

    Raises:
        UsageError: it is not there, or on another machine.
    """
    folder = LighthouseDir.of_run(run_dir, manifest)
    address = folder.address()
    if address is None:
        raise UsageError(f"no lighthouse is published in {folder.path}")
    try:
        if not alive(address):
            raise UsageError(f"the supervisor of {address.url} (pid {address.pid}) is gone")
    except BlindError as error:
        raise UsageError(f"{error}; run the drill there") from error
    return address.pid, address.process_started
