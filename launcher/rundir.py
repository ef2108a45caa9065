"""One run, one directory: the only owner of paths below ``outputs/``.

::

    outputs/torchft/
      .slurm/                     where Slurm itself opens the logs (it makes no folders)
      lighthouses/<host>-<port>/  address.json, claim.json, lighthouse.log while unclaimed
      tft-<A>/                    one run: the array job <A>
        run.json                  manifest, written once by whoever comes first
        lighthouse.log            what the lighthouse said while it served this run
        tft-<A>_<a>.out / .err    logs of replica group <a>, all attempts, appended
        tft-<A>_<a>.events.jsonl  its structured events
        groups/<a>.*              who runs replica group <a>, and how its attempts ended
        ranks/<a>.<attempt>/      full output of every rank, by torchrun; stacks of hung ones
        orders.jsonl              what the guardian tells the launchers on the nodes
        events.jsonl              what the guardian saw and did
        report.html               what `launcher report` made of all that
      .doctor-<token>/            what `launcher doctor` and its job tell each other, while it runs
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from launcher.model import KitError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is fixed for the whole life of a run (``run.json``)."""

    run: str
    array_job_id: int
    group_size: int
    """Number of replica groups; the data is split by it."""
    ranks_per_group: int
    spares: int = 0
    """Further array tasks that stand ready to take a lost group's place."""
    config: str
    """Path of the torchtitan config file, as given."""
    extra_args: tuple[str, ...] = ()
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


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of one run."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def manifest_path(self) -> Path:
        return self.path / "run.json"

    @property
    def lighthouse_log(self) -> Path:
        return self.path / "lighthouse.log"

    @property
    def orders(self) -> Path:
        """What the guardian tells the launchers on the nodes."""
        return self.path / "orders.jsonl"

    @property
    def guardian_events(self) -> Path:
        """What the guardian saw of Slurm and did, as structured events."""
        return self.path / "events.jsonl"

    @property
    def groups(self) -> Path:
        """Small files about who runs what."""
        return self.path / "groups"

    def lease(self, replica: int) -> Path:
        """Who runs a replica group."""
        return self.groups / f"{replica}.lease.json"

    def endings(self, replica: int) -> Path:
        """How the attempts of a replica group ended badly, and what was decided then."""
        return self.groups / f"{replica}.endings.jsonl"

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

    def events(self, replica: int) -> Path:
        return self.path / f"{self.name}_{replica}.events.jsonl"

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
        """
        raw = read_json(self.manifest_path)
        if raw is None:
            said = self.last_words()
            why = f"; its error log says: {said}" if said else ""
            raise UsageError(f"run {self.name} has not started: no {self.manifest_path}{why}")
        known = {f.name for f in fields(Manifest)}
        try:
            values = {key: value for key, value in raw.items() if key in known}
            values["extra_args"] = tuple(values.get("extra_args", ()))
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
        """Runs by the time of their start, oldest first; those too that failed to start."""
        found = [RunDir(path) for path in self.torchft.glob("tft-*") if path.is_dir()]
        return sorted(found, key=_started)

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


def create_once(path: Path, content: str) -> bool:
    """Create ``path`` whole, or leave the one that is there; True when it was ours.

    Works on NFS, where exclusive creation and writing are two steps: a complete file
    is linked into place.
    """
    temporary = _write_temporary(path, content)
    try:
        os.link(temporary, path)
        return True
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)


def replace(path: Path, content: str) -> None:
    """Write ``path`` whole or not at all."""
    temporary = _write_temporary(path, content)
    try:
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def overwrite(path: Path, content: str) -> None:
    """Write ``path`` in place.

    Network file systems show a change of a file at its next open, and that another file has
    taken its name perhaps half a minute later. For what others poll; small enough for one write.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        data = content.encode()
        os.pwrite(handle, data, 0)
        os.ftruncate(handle, len(data))
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``; None when there is no such file.

    Raises:
        KitError: it is there and cannot be read or is not JSON.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise KitError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise KitError(f"{path} is not a JSON object")
    return value


def _write_temporary(path: Path, content: str) -> str:
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise KitError(f"cannot write {path}: {error.strerror}") from error
    return temporary
