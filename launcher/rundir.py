"""One run, one directory: the only owner of paths below ``outputs/``.

::

    outputs/torchft/
      .slurm/                     where Slurm itself opens the logs (it makes no folders)
      lighthouses/<host>-<port>/  address.json, claim.json, lighthouse.log while unclaimed
      tft-<A>/                    one run: the array job <A>
        run.json                  manifest, written once by whoever comes first
        submission.json           how `launcher submit` submitted it; its owner's
        lighthouse.log            what the lighthouse said while it served this run; .1: what is
                                  worth keeping of full ones, .full: one that is just set aside
        tft-<A>_<a>.out / .err    logs of replica group <a>, all attempts, appended
        tft-<A>_<a>.events.jsonl  its structured events; .node-<n> of a further node of it
        groups/<a>.*              who runs replica group <a>, and how its attempts ended
        groups/array-<B>          the array job <B> has joined this run
        ranks/<a>.<attempt>/      full output of every rank, by torchrun; stacks of hung ones
        terms/                    who stood in for the lighthouse (launcher/terms.py)
        orders.jsonl              what the guardian tells the launchers on the nodes
        events.jsonl              what the guardian did
        observed.jsonl            what Slurm said of it: requeued, waiting, a silent node
        report.html               what `launcher report` made of all that
        local/                    of a run of one machine: its daemon's (launcher/local.py)
      .doctor-<token>/            what `launcher doctor` and its job tell each other, while it runs
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from launcher.files import create_once, read_json
from launcher.model import BlindError, KitError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is fixed for the whole life of a run (``run.json``)."""

    run: str
    array_job_id: int
    group_size: int
    """Number of replica groups that it may have; the data is split by it."""
    replicas: int = 0
    """Number of replica groups that it started with; 0: all."""
    ranks_per_group: int
    nodes_per_group: int = 1
    spares: int = 0
    """Further array tasks that stand ready to take a lost group's place."""
    config: str
    """Path of the torchtitan config file, as given; empty for a script."""
    extra_args: tuple[str, ...] = ()
    script: str = ""
    """Path of the user's own training script, as given; empty: torchtitan trains."""
    script_args: tuple[str, ...] = ()
    method: str = "hsdp"
    """How its replica groups learn together, of ``methods.METHODS``."""
    sync_every: int = 1
    """Steps of a group between two syncs with the others."""
    lighthouse: str = ""
    """URL of its lighthouse when it started; it may have moved since."""
    lighthouse_name: str = ""
    """Folder of that lighthouse, which says where it is now."""
    steps: int | None = None
    """Last step, when the configuration says it."""
    submitted_by: str = ""
    created: float = 0.0
    """Unix seconds."""
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The configuration as parsed, for reports."""
    cluster: str = "slurm"
    """Who runs its tasks: ``slurm``, or ``local`` for the daemon of a run of one machine."""

    @property
    def ranks_per_node(self) -> int:
        return self.ranks_per_group // self.nodes_per_group


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def number(self) -> int:
        """Array job id of the job that began it."""
        digits = self.name.removeprefix("tft-")
        return (
            int(digits) if digits.isascii() and digits.isdigit() else self.manifest().array_job_id
        )

    @property
    def manifest_path(self) -> Path:
        return self.path / "run.json"

    @property
    def submission(self) -> Path:
        """How `launcher submit` submitted it."""
        return self.path / "submission.json"

    @property
    def lighthouse_log(self) -> Path:
        return self.path / "lighthouse.log"

    @property
    def terms(self) -> Path:
        """Which lighthouse serves it, where another one than the login node's has stood in."""
        return self.path / "terms"

    @property
    def orders(self) -> Path:
        """What the guardian tells the launchers on the nodes."""
        return self.path / "orders.jsonl"

    @property
    def guardian_events(self) -> Path:
        """What the guardian did, as structured events."""
        return self.path / "events.jsonl"

    @property
    def observed(self) -> Path:
        """What Slurm said of it that belongs to its story, as structured events."""
        return self.path / "observed.jsonl"

    @property
    def observed_lock(self) -> Path:
        """Held by the one monitor that records that."""
        return self.path / ".observed.lock"

    @property
    def groups(self) -> Path:
        """Small files about who runs what."""
        return self.path / "groups"

    def join(self, array_job_id: int) -> None:
        """Note that an array job brings tasks to this run.

        Raises:
            OSError: it cannot be written.
        """
        self.groups.mkdir(parents=True, exist_ok=True)
        (self.groups / f"array-{array_job_id}").touch()

    def arrays(self) -> list[int]:
        """Array jobs whose tasks belong to this run: its own, and those that joined it."""
        joined = (path.name.removeprefix("array-") for path in self.groups.glob("array-*"))
        return sorted({self.number, *(int(each) for each in joined if each.isdigit())})

    def lease(self, replica: int) -> Path:
        """Who runs a replica group."""
        return self.groups / f"{replica}.lease.json"

    def endings(self, replica: int) -> Path:
        """How the attempts of a replica group ended badly, and what was decided then."""
        return self.groups / f"{replica}.endings.jsonl"

    @property
    def local(self) -> Path:
        """Of the daemon that runs the tasks of a run of one machine."""
        return self.path / "local"

    @property
    def guardian_lock(self) -> Path:
        """Held by the one guardian of this run."""
        return self.path / ".guardian.lock"

    @property
    def controller_lock(self) -> Path:
        """Held by the one monitor that logs to W&B."""
        return self.path / ".controller.lock"

    def log(self, replica: int, stream: str) -> Path:
        """Text log of a replica group; ``stream`` is ``"out"`` or ``"err"``."""
        return self.path / f"{self.name}_{replica}.{stream}"

    def events(self, replica: int, node: int = 0) -> Path:
        """Structured events of a replica group, as its node of that number writes them."""
        return node_events(self.path / f"{self.name}_{replica}.events.jsonl", node)

    @property
    def finished(self) -> Path:
        """Exists once a replica group has trained to the last step: the model is complete."""
        return self.path / "finished.json"

    def last_words(self, replica: int | None = None) -> str:
        """Last line of the error logs, of one replica group or of whichever has one."""
        pattern = f"{self.name}_{'*' if replica is None else replica}.err"
        for path in sorted(self.path.glob(pattern)):
            with contextlib.suppress(OSError):
                lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
                if words := [line for line in lines if line.strip()]:
                    return words[-1].strip()
        return ""

    def standby_ranks(self, task: int, number: int) -> Path:
        """Like ``ranks``, of ranks that wait before they are any replica group."""
        return self.path / "ranks" / f"standby-{task}.{number}"

    def ranks(self, replica: int, attempt: int) -> Path:
        return self.path / "ranks" / f"{replica}.{attempt}"

    def leave(self, replica: int, attempt: int) -> Path:
        """The step at which this attempt's ranks are to leave the run."""
        return self.ranks(replica, attempt) / "leave"

    def failures(self, replica: int, attempt: int) -> Path:
        return self.ranks(replica, attempt) / "failures.json"

    def report(self, suffix: str) -> Path:
        """The report that is written by default; ``suffix`` is ``".html"``, for example."""
        return self.path / f"report{suffix}"

    def create(self, manifest: Manifest) -> Manifest:
        """Write the manifest unless there is one; return the one that stands.

        Several replica groups may do this at the same moment: one wins, whole.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        create_once(self.manifest_path, json.dumps(asdict(manifest), indent=2, default=str) + "\n")
        return self.manifest()

    def manifest(self) -> Manifest:
        """Read the manifest.

        Raises:
            UsageError: there is none, or it is not one of ours.
            BlindError: it cannot be read.
        """
        raw = read_json(self.manifest_path)
        if raw is None:
            said = self.last_words()
            why = f"; its error log says: {said}" if said else ""
            raise UsageError(f"run {self.name} has not started: no {self.manifest_path}{why}")
        known = {f.name for f in fields(Manifest)}
        try:
            values = {key: value for key, value in raw.items() if key in known}
            for name in ("extra_args", "script_args"):
                values[name] = tuple(values.get(name, ()))
            values["created"] = float(values.get("created", 0.0))
            return Manifest(**values)
        except (TypeError, ValueError, AttributeError) as error:
            raise UsageError(f"{self.manifest_path} is not a run's manifest: {error}") from error


@dataclass(frozen=True, slots=True)
class Visit:
    """Files of one visit of the doctor to the nodes. (``slurm/doctor.sbatch`` knows ``refused``.)"""

    path: Path

    @property
    def asked(self) -> Path:
        """What the login node asks, written in place; its ``ping`` comes later."""
        return self.path / "asked.json"

    @property
    def arrived(self) -> Path:
        """The node's first word."""
        return self.path / "arrived.json"

    @property
    def pong(self) -> Path:
        """The node's answer to the ``ping``."""
        return self.path / "pong.json"

    @property
    def findings(self) -> Path:
        """What the node has found."""
        return self.path / "findings.json"

    @property
    def refused(self) -> Path:
        """Why the job script could not start Python, as text: the node, then the reason."""
        return self.path / "refused"

    @property
    def log(self) -> Path:
        """Output of the job."""
        return self.path / "job.log"

    @property
    def allreduce(self) -> Path:
        """Result of the all-reduce between nodes."""
        return self.path / "allreduce.json"

    def part(self, node_rank: int) -> Path:
        """What one node of several has found."""
        return self.path / f"part.{node_rank}.json"

    def ranks(self, node_rank: int) -> Path:
        """Output of the ranks of one node of several."""
        return self.path / f"ranks.{node_rank}"


@dataclass(frozen=True, slots=True)
class Outputs:
    """Everything below ``outputs/`` that this kit writes for torchft runs."""

    root: Path

    @property
    def torchft(self) -> Path:
        return self.root / "torchft"

    @property
    def cache(self) -> Path:
        """Of libraries, for who has no home directory."""
        return self.root / "cache"

    @property
    def lighthouses(self) -> Path:
        return self.torchft / "lighthouses"

    def visit(self, token: str) -> Visit:
        return Visit(self.torchft / f".doctor-{token}")

    def visits(self) -> list[Visit]:
        """Those under way, and what others have left behind."""
        return [Visit(path) for path in sorted(self.torchft.glob(".doctor-*")) if path.is_dir()]

    def run_of_array(self, array_job_id: int) -> RunDir:
        return RunDir(self.torchft / f"tft-{array_job_id}")

    def runs(self) -> list[RunDir]:
        """Runs by the time of their start, oldest first; those too that failed to start.

        Raises:
            BlindError: the folder of the runs cannot be read.
        """
        try:
            names = os.listdir(self.torchft)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise BlindError(f"{self.torchft} cannot be read: {error.strerror}") from error
        paths = (self.torchft / name for name in names if re.fullmatch(r"tft-[0-9]+", name))
        return sorted((RunDir(path) for path in paths if path.is_dir()), key=_started)

    def find(self, name: str | None) -> RunDir:
        """A run by name (``tft-12``), array job id (``12``) or path; None: the newest.

        Raises:
            UsageError: there is no such run; the message lists those there are.
        """
        runs = self.runs()
        if name is None:
            if runs:
                return runs[-1]
            raise UsageError(f"no runs under {self.torchft}: submit one first")
        for run in runs:
            if name in (run.name, run.name.removeprefix("tft-"), str(run.path)):
                return run
        direct = RunDir(Path(name))
        if direct.manifest_path.is_file():
            return direct
        known = ", ".join(run.name for run in runs[-5:]) or "none yet"
        raise UsageError(f"no run {name!r} under {self.torchft}; the newest are: {known}")


def _started(run: RunDir) -> tuple[float, str]:
    """When a run started: as its manifest says, else (it has none yet) by its folder's age."""
    try:
        return run.manifest().created, run.name
    except KitError:
        return run.path.stat().st_mtime, run.name


def node_events(first: Path, node: int) -> Path:
    """Structured events of another node of the replica group whose first node writes ``first``."""
    if node == 0:
        return first
    return first.with_name(f"{first.name.removesuffix('.events.jsonl')}.node-{node}.events.jsonl")
