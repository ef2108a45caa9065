"""Every kind of failure that a drill makes: what is done, what must follow, and by when. Pure.

A drill is a list of commands, the same whether a rank is on this machine or on another (there
``srun --overlap`` runs them): what `--dry-run` prints is what is run. Deadlines are seconds
after the failure, for a cluster; ``--patience`` stretches them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from launcher.incidents import Cause


class Follows(enum.Enum):
    """What a failure leads to."""

    LOSS = "the replica group is lost, the others train on, and it comes back and heals"
    OUTAGE = "the lighthouse is started again, and nobody is lost"
    NOTHING = "nobody is lost, and everybody trains on"


class Stage(enum.Enum):
    """What happens after a failure, in its order."""

    DETECTED = "detected"
    SURVIVORS = "survivors committing again"
    AGAIN = "requeued or restarted"
    QUORUM = "back in quorum"
    HEALED = "healed"
    COMMITS = "committing again"
    HELD = "trained through it"
    WEIGHTS = "weights equal"


#: Stages of each of them.
STAGES = {
    Follows.LOSS: (
        Stage.DETECTED,
        Stage.SURVIVORS,
        Stage.AGAIN,
        Stage.QUORUM,
        Stage.HEALED,
        Stage.COMMITS,
        Stage.WEIGHTS,
    ),
    Follows.OUTAGE: (Stage.DETECTED, Stage.AGAIN, Stage.COMMITS, Stage.WEIGHTS),
    Follows.NOTHING: (Stage.HELD, Stage.WEIGHTS),
}

OWNER, OPERATOR, SANDBOX = "the run's owner", "a Slurm operator", "root, in a sandbox"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One command."""

    argv: tuple[str, ...]
    background: bool = False
    """It lasts as long as the failure does, and undoes what it did when it is ended."""
    if_ended: bool = False
    """Only when Slurm says that the task has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is hit. Every name in it is of one run."""

    run: str
    """Path of the run's directory."""
    array: int
    task: int
    node: str
    replica: int
    pids: tuple[int, ...] = ()
    """Processes of its ranks on that node, by rank."""
    member: str = ""
    """Its id in the quorum, as the lighthouse knows it."""
    at_node: tuple[str, ...] = ()
    """What runs a command on that node; empty: it is this machine."""
    python: str = "python"
    lighthouse: str = ""
    supervisor: tuple[int, float] = (0, 0.0)
    """Process id of the lighthouse's supervisor here, and when that started."""
    sandbox: str = ""
    """Folder of the sandbox that Slurm runs in; empty: it is a cluster."""
    partition: str = ""
    """Partition whose jobs preempt this run's."""
    time_limit: str = ""
    """The task's time limit as it is."""
    seconds: float = 20.0
    """How long a failure lasts that ends by itself."""
    rank: int = 0
    local: bool = False
    """Whether the run is one of this machine, without Slurm."""

    @property
    def name(self) -> str:
        """The array task, as Slurm's commands take it."""
        return f"{self.array}_{self.task}"

    def hands(self, *words: str, pids: Sequence[int] = ()) -> tuple[str, ...]:
        """The command that does something to the ranks with ``pids``, where they are."""
        which = [f"--pid={pid}" for pid in pids]
        place = [*self.at_node, self.python, "-m", "launcher.hands"]
        return (*place, *words, f"--run={self.run}", *which)

    def of_rank(self, *words: str) -> list[Step]:
        return [Step(argv=self.hands(*words, pids=self.pids[self.rank : self.rank + 1]))]

    def of_ranks(self, *words: str) -> list[Step]:
        return [Step(argv=self.hands(*words, pids=self.pids))]

    def of_lighthouse(self, number: str, whom: str = "lighthouse") -> list[Step]:
        """A signal to the lighthouse, or to its ``supervisor``."""
        pid, started = self.supervisor
        here = [self.python, "-m", "launcher.hands", whom, number]
        return [Step(argv=(*here, f"--pid={pid}", f"--started={started:.2f}"))]

    def of_node(self, *changes: str) -> list[Step]:
        return [Step(argv=("scontrol", "update", f"NodeName={self.node}", *changes))]

    def of_task(self, *changes: str) -> Step:
        return Step(argv=("scontrol", "update", f"JobId={self.name}", *changes))

    def of_sandbox(self, word: str) -> list[Step]:
        argv = (self.python, "-m", "launcher", "sandbox", word, self.node, f"--dir={self.sandbox}")
        return [Step(argv=argv)]


Steps = Callable[[Target], list[Step]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of failure."""

    name: str
    does: str
    follows: Follows
    steps: Steps
    restore: Steps = field(default=lambda target: [])
    """Puts back what the failure has changed; doing it twice is the same as once."""
    restore_after: Stage | None = None
    """When that is due; None: at the end."""
    restore_delay: float = 0.0
    """Seconds to wait then."""
    causes: frozenset[Cause] = frozenset()
    """What the incident may name as its cause; empty: anything."""
    rights: str = OWNER
    whole_node: bool = False
    needs: str = ""
    """What must be so, in words, beside the rights."""
    by: tuple[tuple[Stage, float], ...] = ()
    """Deadlines that differ from the usual ones."""
    failed_commits: int = 1
    """Steps that each of the others may fail to commit."""
    help: bool = False
    """Whether somebody must put something back before the group can come back."""

    def deadline(self, stage: Stage) -> float:
        """Seconds after the failure by which that stage must be reached."""
        return dict(self.by).get(stage, _USUAL[stage])


_USUAL = {
    Stage.DETECTED: 20.0,
    Stage.SURVIVORS: 90.0,
    Stage.AGAIN: 120.0,
    Stage.QUORUM: 420.0,
    Stage.HEALED: 450.0,
    Stage.COMMITS: 480.0,
    Stage.HELD: 120.0,
    Stage.WEIGHTS: 600.0,
}
_KILLED = frozenset({Cause.CRASH})
_GONE = frozenset({Cause.NODE_DOWN, Cause.NODE_UNREACHABLE, Cause.UNKNOWN, Cause.CRASH})
#: Where Slurm notices by its own clock: `SlurmdTimeout` is five minutes on many clusters.
_SLOWLY = ((Stage.AGAIN, 480.0), (Stage.QUORUM, 780.0), (Stage.HEALED, 810.0),
           (Stage.COMMITS, 840.0), (Stage.WEIGHTS, 960.0))  # fmt: skip
_DRILLS = "the run was submitted with TFT_DRILLS=1"


def _time_limit(target: Target) -> list[Step]:
    # An ended task takes no new limit, and a waiting one does.
    requeue = Step(argv=("scontrol", "requeue", target.name), if_ended=True)
    return [requeue, target.of_task(f"TimeLimit={target.time_limit}")]


def _requeue(target: Target) -> list[Step]:
    if target.local:
        return [
            Step(argv=(target.python, "-m", "launcher", "requeue", target.run, str(target.replica)))
        ]
    return [Step(argv=("scontrol", "requeue", target.name))]


def _preempt(target: Target) -> list[Step]:
    where = (f"--partition={target.partition}", f"--nodelist={target.node}", "--exclusive")
    flags = ("--job-name=tft-drill", "--nodes=1", "--ntasks=1", "--time=5", *where)
    return [Step(argv=("srun", *flags, "sleep", f"{target.seconds:g}"), background=True)]


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="node-down",
            does="Slurm is told that the node is DOWN, and RESUMEd once the task is requeued",
            follows=Follows.LOSS,
            steps=lambda t: t.of_node("State=DOWN", "Reason=drill"),
            restore=lambda t: t.of_node("State=RESUME"),
            restore_after=Stage.AGAIN,
            restore_delay=8.0,  # a node that still ends the task's old copy refuses a new one
            causes=frozenset({Cause.NODE_DOWN}),
            rights=OPERATOR,
            whole_node=True,
        ),
        Kind(
            name="node-drain",
            does="the node is DRAINed: what runs there goes on, and the node is RESUMEd",
            follows=Follows.NOTHING,
            steps=lambda t: t.of_node("State=DRAIN", "Reason=drill"),
            restore=lambda t: t.of_node("State=RESUME"),
            rights=OPERATOR,
            whole_node=True,
        ),
        Kind(
            name="node-crash",
            does="every process of the node is killed, slurmd too; it is started again later",
            follows=Follows.LOSS,
            steps=lambda t: t.of_sandbox("crash"),
            restore=lambda t: t.of_sandbox("restart"),
            restore_after=Stage.AGAIN,
            causes=_GONE,
            rights=SANDBOX,
            whole_node=True,
            by=_SLOWLY,
        ),
        Kind(
            name="network-cut",
            does="the node's network is cut while everything on it goes on, and healed later",
            follows=Follows.LOSS,
            steps=lambda t: t.of_sandbox("cut"),
            restore=lambda t: t.of_sandbox("heal"),
            restore_after=Stage.AGAIN,
            causes=frozenset({Cause.NODE_UNREACHABLE, Cause.NODE_DOWN}),
            rights=SANDBOX,
            whole_node=True,
            needs="a sandbox that is up with --network",
            by=_SLOWLY,
        ),
        Kind(
            name="requeue",
            does="the task is requeued (`scontrol requeue`)",
            follows=Follows.LOSS,
            steps=_requeue,
            causes=frozenset({Cause.REQUEUED}),
        ),
        Kind(
            name="preempt",
            does="a job of a partition that preempts this run's takes the node for some seconds",
            follows=Follows.LOSS,
            steps=_preempt,
            causes=frozenset({Cause.PREEMPTED}),
            whole_node=True,
            needs="--partition with a higher priority tier, and PreemptMode=REQUEUE",
            by=((Stage.DETECTED, 90.0), (Stage.SURVIVORS, 150.0), (Stage.AGAIN, 240.0)),
        ),
        Kind(
            name="time-limit",
            does="the task's time limit is set to one minute; once it has ended, the limit is put "
            "back and the task requeued, which Slurm and the guardian leave to a person",
            follows=Follows.LOSS,
            steps=lambda t: [t.of_task("TimeLimit=1")],
            restore=_time_limit,
            restore_after=Stage.SURVIVORS,
            causes=frozenset({Cause.TIME_LIMIT}),
            rights=f"{OPERATOR} (an owner may lower a limit, and not raise it again)",
            help=True,
            by=((Stage.DETECTED, 240.0), (Stage.SURVIVORS, 300.0), *_SLOWLY),
        ),
        Kind(
            name="kill-rank",
            does="one rank is killed (SIGKILL)",
            follows=Follows.LOSS,
            steps=lambda t: t.of_rank("signal", "KILL"),
            causes=_KILLED,
        ),
        Kind(
            name="kill-replica",
            does="every process of the task is killed (SIGKILL), its launcher too",
            follows=Follows.LOSS,
            steps=lambda t: t.of_rank("signal", "KILL", "--whole-task"),
            causes=_KILLED,
        ),
        Kind(
            name="kill-rpc",
            does="the lighthouse's kill route is called for the replica group",
            follows=Follows.LOSS,
            steps=lambda t: [
                Step(argv=(t.python, "-m", "launcher.hands", "rpc", t.lighthouse, t.member))
            ],
            causes=frozenset({Cause.KILL_REQUEST, Cause.CRASH}),
        ),
        Kind(
            name="segfault",
            does="one rank gets SIGSEGV",
            follows=Follows.LOSS,
            steps=lambda t: t.of_rank("signal", "SEGV"),
            causes=_KILLED,
        ),
        Kind(
            name="oom",
            does="one rank may not grow any more (RLIMIT_AS), and then asks for memory",
            follows=Follows.LOSS,
            steps=lambda t: [*t.of_rank("limit", "AS"), *t.of_rank("signal", "USR2")],
            restore=lambda t: t.of_rank("limit", "AS", "--free"),
            causes=frozenset({Cause.OUT_OF_MEMORY}),
            # Raised in one of torchft's collectives, it is a failed step at first; then the rank ends.
            failed_commits=2,
            needs=_DRILLS,
            by=((Stage.DETECTED, 60.0),),
        ),
        Kind(
            name="hang",
            does="one rank hangs in Python, and its heartbeats go on",
            follows=Follows.LOSS,
            steps=lambda t: t.of_rank("signal", "USR1"),
            causes=frozenset({Cause.HANG}),
            needs=_DRILLS,
            by=((Stage.DETECTED, 120.0), (Stage.SURVIVORS, 150.0), (Stage.AGAIN, 180.0)),
        ),
        Kind(
            name="stop",
            does="the ranks of the group are stopped (SIGSTOP), until they are killed or it is over",
            follows=Follows.LOSS,
            steps=lambda t: t.of_ranks("signal", "STOP"),
            restore=lambda t: t.of_ranks("signal", "CONT"),
            causes=frozenset({Cause.HANG}),
        ),
        Kind(
            name="slow",
            does="the ranks of the group are stopped half of the time, for some seconds",
            follows=Follows.NOTHING,
            steps=lambda t: [
                Step(argv=s.argv, background=True) for s in t.of_ranks("slow", f"{t.seconds:g}")
            ],
            restore=lambda t: t.of_ranks("signal", "CONT"),
        ),
        Kind(
            name="disk-full",
            does="no process of the task can write to a file (RLIMIT_FSIZE 0), for some seconds",
            follows=Follows.NOTHING,
            steps=lambda t: t.of_rank("limit", "FSIZE", "--whole-task"),
            restore=lambda t: t.of_rank("limit", "FSIZE", "--whole-task", "--free"),
        ),
        Kind(
            name="lighthouse-kill",
            does="the lighthouse is killed (SIGKILL)",
            follows=Follows.OUTAGE,
            steps=lambda t: t.of_lighthouse("KILL"),
            needs="the lighthouse's supervisor is on this machine",
        ),
        Kind(
            name="lighthouse-freeze",
            does="the lighthouse is stopped (SIGSTOP): it is there, and does not answer",
            follows=Follows.OUTAGE,
            steps=lambda t: t.of_lighthouse("STOP"),
            restore=lambda t: t.of_lighthouse("CONT"),
            needs="the lighthouse's supervisor is on this machine",
            by=((Stage.DETECTED, 60.0),),
        ),
        Kind(
            name="lighthouse-host",
            does="the lighthouse is killed and its supervisor stopped, as if their host were gone: a "
            "replica group stands in until they are back",
            follows=Follows.OUTAGE,
            steps=lambda t: [*t.of_lighthouse("STOP", "supervisor"), *t.of_lighthouse("KILL")],
            restore=lambda t: t.of_lighthouse("CONT", "supervisor"),
            restore_after=Stage.COMMITS,
            needs="the lighthouse's supervisor is on this machine, and TFT_STAND_IN is not 0",
            by=((Stage.DETECTED, 60.0),),
        ),
    )
}


def describe(kind: Kind) -> list[str]:
    """A kind in words: what is done, what must follow, and who may."""
    lines = [f"{kind.does}.", f"Must follow: {kind.follows.value}."]
    lines.append(f"Needs the rights of {kind.rights}.")
    if kind.needs:
        lines.append(f"Needs: {kind.needs}.")
    return lines
