"""What a finding is, what the rules may look at, and the commands that they tell. Pure."""

from __future__ import annotations

import enum
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from launcher.groups import Group
from launcher.lighthouse_log import Waiting
from launcher.state import RunState


class Severity(enum.Enum):
    """How bad it is."""

    INFO = "info"
    WARNING = "warning"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, and what to do about it."""

    kind: str
    severity: Severity
    message: str
    replica: int | None = None
    what: str = ""
    """Which file, node or GPU, where there may be several; never printed by itself."""

    @property
    def key(self) -> str:
        """Equal for the same thing at a later look."""
        key = f"{self.kind}:{'' if self.replica is None else self.replica}"
        return f"{key}:{self.what}" if self.what else key


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that the rules may look at, and the commands for this run.

    Names of nodes and files come from logs: in a command they are quoted for a shell.
    """

    state: RunState
    now: float
    waiting: Waiting = field(default_factory=Waiting)
    """What the lighthouse's next quorum waits for."""
    blind: Mapping[str, str] = field(default_factory=dict)
    """Sources that cannot be read, with why."""
    lines: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Lines read and events found, by log."""
    job: str = "<job>"
    """Array job id, for remedies."""
    tasks: Mapping[int, str] = field(default_factory=dict)
    """What Slurm calls the run's array tasks, by index: those added later are of another array."""
    over: bool = False
    """Whether Slurm has no task of the run left."""

    @property
    def local(self) -> bool:
        """Whether Slurm has nothing to do with this run."""
        return self.state.scheduler != "Slurm"

    def requeue(self, replica: int) -> str:
        """The command that ends a replica group and starts it again."""
        return f"`python -m launcher requeue tft-{self.job} {replica}`"

    @property
    def cancel(self) -> str:
        """The command that ends the run."""
        return f"`python -m launcher cancel tft-{self.job}`"

    @property
    def report(self) -> str:
        """The command that tells the causes of all that was lost."""
        return f"`python -m launcher report tft-{self.job}`"

    def task(self, group: Group) -> str:
        """What Slurm calls the array task that runs a replica group."""
        return self.tasks.get(group.task_index) or f"{self.job}_{group.task_index}"

    def log(self, replica: int) -> str:
        """The error log of the task that runs a replica group, in the run's folder."""
        return f"`tft-{self.job}_{self.state.group(replica).task_index}.err`"

    def drain(self, host: str) -> str:
        """What leaves a node out."""
        if self.local:
            return "leave it out of CUDA_VISIBLE_DEVICES of the next run"
        return f"`scontrol update NodeName={shlex.quote(host) if host else '<node>'} State=DRAIN`"

    def look_at(self, source: str) -> str:
        """How to see why a source of ours (a file, or who runs the tasks) cannot be read."""
        if source != self.state.scheduler:
            file = shlex.quote(source)
            return f"`ls -l {file}`: does it exist, may you read it, does its file system answer?"
        if self.local:
            return "`python -m launcher list` on the machine that runs it: does the daemon live?"
        return "`squeue` and `scontrol ping` on this machine: does the controller answer?"
