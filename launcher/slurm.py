"""The only place that runs Slurm commands. It parses what they say, or raises.

"Could not ask" is a ``BlindError`` and never an empty answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launcher import cluster
from launcher.model import BlindError, KitError
from launcher.process import Completed, Run, run

#: States after which a job will not run again by itself.
FINAL_STATES = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "TIMEOUT",
    ]
)


class SlurmError(KitError):
    """Slurm answered, and refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One array task (or plain job), as squeue shows it."""

    job_id: int
    array_job_id: int
    task: int | None
    """Index in its array; None for a job that is no array task."""
    state: str
    node: str
    reason: str
    start: str = ""
    """When it started, or is expected to, as squeue prints it; empty when it says N/A."""

    @property
    def live(self) -> bool:
        return self.state not in FINAL_STATES

    @property
    def name(self) -> str:
        """``<array job>_<index>``, as Slurm's commands take it."""
        return f"{self.array_job_id}_{self.task}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node, as sinfo shows it."""

    name: str
    state: str
    reason: str

    @property
    def up(self) -> bool:
        return cluster.is_up(self.state)

    @property
    def responds(self) -> bool:
        """Whether its slurmd answers the controller; sinfo marks one that does not by a star."""
        return not self.state.endswith("*")


class Slurm:
    """Slurm's commands, with an injected way to run them."""

    name = "Slurm"

    def __init__(self, run: Run = run) -> None:
        self._run = run

    def jobs(self, *job_ids: int) -> list[Job]:
        """Array tasks of these jobs, finished ones too while Slurm remembers them.

        Returns:
            One entry a task; empty when the controller answered that it knows no such job.
            Of several jobs with a task of the same index, the one that lives, else the newest.

        Raises:
            BlindError: the controller could not be asked.
        """
        jobs = ",".join(map(str, job_ids))
        argv = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={jobs}"]
        done = self._run([*argv, "--format=%A|%F|%K|%T|%N|%S|%r"])
        if done.code != 0:
            if "Invalid job id" in done.err:
                return []
            raise _blind(done)
        found = [_job(line) for line in done.out.splitlines() if line.strip()]
        if len(job_ids) < 2:
            return found
        found.sort(key=lambda job: (job.live, job.array_job_id))
        return list({job.task: job for job in found}.values())

    def in_queue(self) -> frozenset[int]:
        """Jobs (of an array: its id) of anybody's that wait, run or end.

        Raises:
            BlindError: the controller could not be asked.
        """
        done = self._run(["squeue", "--noheader", "--format=%F"])
        if done.code != 0:
            raise _blind(done)
        return frozenset(int(word) for word in done.out.split() if word.isdigit())

    def own_arrays(self, folder: str, script: str) -> list[int]:
        """Array job ids of this user's queued or running jobs that were submitted from
        ``folder`` with a script of that name, oldest first.

        Raises:
            BlindError: the controller could not be asked.
        """
        done = self._run(["squeue", "--me", "--noheader", "--array", "--format=%F|%Z|%o"])
        if done.code != 0:
            raise _blind(done)
        found = set()
        for line in done.out.splitlines():
            array, _, rest = line.partition("|")
            where, _, command = rest.partition("|")
            if array.isdigit() and where == folder and command.rsplit("/", 1)[-1] == script:
                found.add(int(array))
        return sorted(found)

    def nodes(self) -> list[Node]:
        """Every node of the cluster once.

        Raises:
            BlindError: the controller could not be asked.
        """
        done = self._run(["sinfo", "--noheader", "--Node", "--format=%N|%t|%E"])
        if done.code != 0:
            raise _blind(done)
        found: dict[str, Node] = {}
        for line in done.out.splitlines():
            name, _, rest = line.partition("|")
            state, _, reason = rest.partition("|")
            if name.strip():
                found[name.strip()] = Node(
                    name=name.strip(), state=state.strip(), reason=reason.strip()
                )
        return list(found.values())

    def arrays_on(self, node: str) -> list[int]:
        """Jobs (of an array: its id) of anybody's that run or end on ``node``.

        Raises:
            BlindError: the controller could not be asked.
        """
        done = self._run(["squeue", "--noheader", f"--nodelist={node}", "--format=%F"])
        if done.code != 0:
            raise _blind(done)
        return sorted({int(word) for word in done.out.split() if word.isdigit()})

    def time_limit(self, task: str) -> str:
        """Time limit of an array task, as Slurm writes it."""
        done = self._ok(["scontrol", "--oneliner", "show", "job", _task_name(task)])
        match = re.search(r"\bTimeLimit=(\S+)", done.out)
        if match is None:
            raise BlindError(f"scontrol shows no time limit for {task}: {done.out.strip()[:200]}")
        return match[1]

    def node_address(self, name: str) -> str:
        """Address under which the cluster reaches node ``name`` (``NodeAddr``)."""
        done = self._ok(["scontrol", "--oneliner", "show", "node", name])
        match = re.search(r"\bNodeAddr=(\S+)", done.out)
        if match is None:
            raise BlindError(f"scontrol shows no address for node {name}: {done.out.strip()[:200]}")
        return match[1]

    def hostnames(self, nodelist: str) -> list[str]:
        """Names in a compressed node list such as ``worker-[0-3]``."""
        return self._ok(["scontrol", "show", "hostnames", nodelist]).out.split()

    def config(self) -> dict[str, str]:
        """The controller's configuration, by Slurm's own names.

        Raises:
            BlindError: the controller could not be asked, or its answer is not understood.
        """
        return cluster.configuration(self._ok(["scontrol", "show", "config"]).out)

    def partitions(self) -> list[cluster.Partition]:
        """Every partition that this user can see; raises as ``config`` does."""
        return cluster.partitions(self._ok(["scontrol", "--oneliner", "show", "partition"]).out)

    def resources(self, partition: str) -> list[cluster.Resources]:
        """What the nodes of ``partition`` have; raises as ``config`` does."""
        argv = ["sinfo", "--noheader", "--Node", f"--partition={partition}"]
        return cluster.resources(self._ok([*argv, f"--format={cluster.SINFO}"]).out)

    def associations(self, user: str) -> list[cluster.Association]:
        """Accounts that ``user`` may charge.

        Raises:
            BlindError: sacctmgr is not there, or the accounting could not be asked.
        """
        argv = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}"]
        done = self._run([*argv, f"format={cluster.SACCTMGR}"])
        if done.code != 0:
            raise _blind(done)
        return cluster.associations(done.out)

    def would_start(self, flags: Sequence[str], script: str) -> str:
        """What Slurm says of a submission that is only tried (``sbatch --test-only``).

        Raises:
            SlurmError: it would refuse the job.
            BlindError: the controller could not be asked.
        """
        done = self._ok(["sbatch", "--test-only", *flags, script])
        return (done.err or done.out).strip().removeprefix("sbatch: ")

    def submit(self, flags: Sequence[str], script: str, arguments: Sequence[str] = ()) -> int:
        """Submit ``script``; returns the job's (or array's) id."""
        done = self._ok(["sbatch", "--parsable", *flags, script, *arguments])
        match = re.match(r"(\d+)", done.out.strip())
        if match is None:
            raise SlurmError(f"sbatch did not answer with a job id: {done.out.strip()!r}")
        return int(match[1])

    def requeue(self, task: str) -> None:
        """Put an array task (``<array job>_<index>``) back into the queue. Its owner may.

        Always by that name: the job id of an array's last task is the array's own, and
        requeues all of it.
        """
        self._ok(["scontrol", "requeue", _task_name(task)])

    def release(self, task: str) -> None:
        """Let a task run that Slurm holds."""
        self._ok(["scontrol", "release", _task_name(task)])

    def start_now(self, task: str, exclude: Sequence[str] | None = None) -> None:
        """Cut short the time that a requeued task waits (reason BeginTime). Its owner may.

        Args:
            exclude: nodes on which it must not start; None leaves that as it is.
        """
        argv = ["scontrol", "update", f"JobId={_task_name(task)}", "StartTime=now"]
        self._ok(argv if exclude is None else [*argv, f"ExcNodeList={','.join(exclude)}"])

    def excluded_nodes(self, task: str) -> list[str]:
        """Nodes on which a task must not start, one by one."""
        done = self._ok(["scontrol", "--oneliner", "show", "job", _task_name(task)])
        match = re.search(r"\bExcNodeList=(\S+)", done.out)
        if match is None or match[1] == "(null)":
            return []
        return self.hostnames(match[1])

    def set_node_state(self, name: str, state: str, reason: str = "") -> None:
        """``scontrol update NodeName=… State=…``; needs an operator's rights."""
        argv = ["scontrol", "update", f"NodeName={name}", f"State={state}"]
        self._ok([*argv, f"Reason={reason}"] if reason else argv)

    def cancel(self, job: int | str) -> None:
        """End every task of a job, or one task (``<array job>_<index>``)."""
        self._ok(["scancel", str(job) if isinstance(job, int) else _task_name(job)])

    def commented(self, comment: str) -> list[int]:
        """Array job ids of this user's live jobs with that comment.

        Raises:
            BlindError: the controller could not be asked.
        """
        done = self._run(["squeue", "--me", "--noheader", "--format=%F|%k"])
        if done.code != 0:
            raise _blind(done)
        rows = (line.partition("|") for line in done.out.splitlines())
        return sorted({int(array) for array, _, said in rows if said.strip() == comment})

    def queued(self, name: str) -> list[int]:
        """This user's jobs of that name that have not ended.

        Raises:
            BlindError: the controller could not be asked.
        """
        done = self._run(["squeue", "--me", "--noheader", f"--name={name}", "--format=%A"])
        if done.code != 0:
            raise _blind(done)
        return [int(word) for word in done.out.split() if word.isdigit()]

    def cancel_named(self, name: str) -> None:
        """Cancel this user's jobs of that name; nothing when there is none."""
        self._ok(["scancel", "--me", f"--name={name}"])

    def _ok(self, argv: Sequence[str]) -> Completed:
        done = self._run(argv)
        if done.code != 0:
            if _unreachable(done.err):
                raise _blind(done)
            said = (done.err or done.out).strip()
            raise SlurmError(f"{' '.join(argv)}: {said or f'exit code {done.code}'}")
        return done


def over_nodes(nodes: int, argv: Sequence[str], *, cpus: str = "", gpus: str = "") -> list[str]:
    """The command that runs ``argv`` once on each of the ``nodes`` nodes of the job that it is
    started in, beside whatever runs there already, and however it ends on the others.

    Args:
        cpus: of each node, as ``SLURM_CPUS_PER_TASK`` says: srun does not take them from the job.
        gpus: of each node, as ``SLURM_GPUS_ON_NODE`` says: an exclusive job has all of the node's,
            and a step those that were asked for.
    """
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes}",
        "--ntasks-per-node=1",
        *([f"--cpus-per-task={cpus}"] if cpus else []),
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        "--overlap",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--export=ALL",
        "--input=none",
        "--mpi=none",
        "--unbuffered",
        "--quiet",
        *argv,
    ]


def _task_name(task: str) -> str:
    if not re.fullmatch(r"\d+_\d+", task):
        raise ValueError(f"not an array task's name: {task!r}")
    return task


def _job(line: str) -> Job:
    parts = [part.strip() for part in line.split("|", 6)]
    if len(parts) != 7 or not re.fullmatch(r"[0-9]{1,18}", parts[0]):
        raise BlindError(f"squeue printed a line that is not understood: {line[:200]!r}")
    job_id, array, task, state, node, start, reason = parts
    return Job(
        job_id=int(job_id),
        array_job_id=int(array) if array.isdecimal() else int(job_id),
        task=int(task) if task.isdecimal() else None,
        state=state,
        node=node,
        reason=reason,
        start="" if start == "N/A" else start,
    )


def _unreachable(stderr: str) -> bool:
    signs = ("Unable to contact slurm controller", "Socket timed out", "Connection refused")
    return any(sign in stderr for sign in signs)


def _blind(done: Completed) -> BlindError:
    said = (done.err or done.out).strip().splitlines()
    return BlindError(
        f"{done.argv[0]} could not be asked (exit code {done.code}): "
        f"{said[-1] if said else 'it printed nothing'}"
    )
