"""Runs from Python: ``from launcher import submit`` gives a run, and submitit jobs of its groups.

The jobs are submitit's own kind, with what it leaves to accounting asked of squeue instead:
``state`` is never older than two seconds, ``done()`` is true after a cancel, and a Slurm that cannot
be asked is an error and not a state. A requeued group is the same job. What a job gives as its
result is how its replica group ended, read from the run's directory; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.core import InfoWatcher
from submitit.core.utils import JobPaths, UncompletedJobError

from launcher import layers, runs, spares, submission
from launcher.model import KitError, UsageError
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.scheduler import LOCAL, SLURM, Scheduler, scheduler_of
from launcher.slurm import FINAL_STATES

#: Seconds between two questions to Slurm.
ASK_EVERY = 2.0
#: Seconds for which a task that failed may be requeued by the guardian.
FAILED_SECONDS = 10.0
#: State of a task that nothing is known of yet.
UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a replica group ended."""

    replica: int
    code: int
    """Exit code of its last attempt: 0 when it trained to the last step, or left as told."""
    reason: str
    attempts: int
    step: int
    """Steps that it committed, counted over the whole run (the manager's step)."""


def outcome(events: Path, replica: int) -> Outcome | None:
    """What a replica group's structured events say of its end; None while it has not ended."""
    ended: dict[str, Any] | None = None
    attempts = step = 0
    with contextlib.suppress(OSError), events.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                kind = event["kind"]
                if kind == "launch":
                    attempts, ended = int(event["attempt"]), None
                elif kind == "commit" and event["committed"] and event.get("rank", 0) == 0:
                    step = max(step, int(event["step"]) + 1)
                elif kind == "exit" and int(event.get("attempt", attempts)) >= attempts:
                    ended = event
    if ended is None:
        return None
    return Outcome(
        replica=replica,
        code=int(ended.get("code", 1)),
        reason=str(ended.get("reason", "")),
        attempts=attempts,
        step=step,
    )


class GroupWatcher(InfoWatcher):
    """Slurm's word on all tasks of one run, asked for once for all its jobs."""

    def __init__(self, run: RunDir, slurm: Scheduler) -> None:
        super().__init__()
        self._run = run
        self._slurm = slurm

    def update(self) -> None:
        """Ask.

        Raises:
            BlindError: Slurm could not be asked.
        """
        self._num_calls += 1
        found = self._slurm.jobs(*self._run.arrays())
        self._last_status_check = time.time()
        for job in found:
            before = self._info_dict.get(job.name, {})
            since = before.get("Since") if before.get("State") == job.state else None
            info = {"JobID": job.name, "State": job.state, "NodeList": job.node}
            self._info_dict[job.name] = info | {"Since": since or str(time.time())}
        for name in self._registered - {job.name for job in found}:
            # Slurm forgets jobs some minutes after their end.
            if self._info_dict.get(name, {}).get("State") not in FINAL_STATES:
                gone = {
                    "JobID": name,
                    "State": "COMPLETED",
                    "NodeList": "",
                    "Since": str(time.time()),
                }
                self._info_dict[name] = gone

    def update_if_long_enough(self, mode: str) -> None:
        if mode == "force" or (
            mode == "standard" and time.time() - self._last_status_check > ASK_EVERY
        ):
            self.update()

    def get_state(self, job_id: str, mode: str = "standard") -> str:
        return self.get_info(job_id, mode).get("State", UNKNOWN)

    def is_done(self, job_id: str, mode: str = "standard") -> bool:
        info = self.get_info(job_id, mode)
        if info.get("State", UNKNOWN) not in FINAL_STATES:
            return False
        waited = time.time() - float(info["Since"])
        return info["State"] in ("COMPLETED", "CANCELLED") or waited > FAILED_SECONDS


class _GroupPaths(JobPaths):
    """Where a replica group's logs are."""

    def __init__(self, run: RunDir, job_id: str, replica: int) -> None:
        super().__init__(run.path, job_id)
        self._run, self._replica = run, replica

    @property
    def folder(self) -> Path:
        return self._run.path

    @property
    def stdout(self) -> Path:
        return self._run.log(self._replica, "out")

    @property
    def stderr(self) -> Path:
        return self._run.log(self._replica, "err")


class GroupJob(submitit.Job[Outcome]):
    """The array task of one replica group, for as long as the run has it."""

    def __init__(self, run: RunDir, slurm: Scheduler, watcher: GroupWatcher, name: str) -> None:
        self.watcher = watcher
        super().__init__(run.path, name)
        self._slurm, self._run = slurm, run
        self.task_index = int(name.rpartition("_")[2])
        self._paths = _GroupPaths(run, name, self.task_index)

    @property
    def replica(self) -> int | None:
        """The replica group that it runs, or ran last; None: a spare that stands ready."""
        return spares.role(self._run, self._run.manifest(), self.task_index)

    def cancel(self, check: bool = True) -> None:
        """End this task; the run goes on without it.

        Raises:
            KitError: Slurm refused, or could not be asked (only with ``check``).
        """
        try:
            self._slurm.cancel(self.job_id)
        except KitError:
            if check:
                raise

    def _interrupt(self, timeout: bool = False) -> None:
        """submitit's way to try a preemption: the group is ended and requeued, and heals.

        Raises:
            UsageError: that of a time limit is Slurm's alone; or this is a spare.
            KitError: Slurm refused, or could not be asked.
        """
        if timeout:
            raise UsageError(
                "a time limit is Slurm's to end: `launcher drill time-limit` tries one"
            )
        if self.replica is None:
            raise UsageError(f"task {self.job_id} is a spare, and runs no replica group")
        runs.requeue(self._run, self.replica, self._slurm)

    def submission(self) -> Any:
        """Not to be had: a replica group is no pickled function.

        Raises:
            UsageError: always; says where its configuration is.
        """
        raise UsageError(f"{self.job_id} is no pickled function: see {self._run.manifest_path}")

    def done(self, force_check: bool = False) -> bool:
        """Whether it has ended for good."""
        return self.watcher.is_done(self.job_id, "force" if force_check else "standard")

    def outcome(self) -> Outcome | None:
        """How its newest attempt ended; None while it has not."""
        replica = self.replica
        return None if replica is None else outcome(self._run.events(replica), replica)

    def _get_outcome_and_result(self) -> tuple[str, Any]:
        found = self.outcome()
        if found is None and self.replica is None:
            return "success", None  # a spare that was not needed
        if found is None:
            words = self._run.last_words(self.task_index)
            raise UncompletedJobError(
                f"task {self.task_index} ended ({self.state}) without a word of its own"
                + (f"; its error log says: {words}" if words else "")
            )
        if found.code != 0:
            return "error", f"{found.reason} (exit code {found.code})"
        return "success", found


class Run:
    """A run that was submitted."""

    def __init__(
        self, path: RunDir, slurm: Scheduler, env: Mapping[str, str] | None = None
    ) -> None:
        """``env``: environment of tasks that are added; None: this process's."""
        self.path = path.path
        self._env = env
        self._run, self._slurm = path, slurm
        self._watcher = GroupWatcher(path, slurm)

    @property
    def name(self) -> str:
        return self._run.name

    @property
    def manifest(self) -> Manifest:
        return self._run.manifest()

    @property
    def jobs(self) -> list[GroupJob]:
        """A submitit job for every replica group that the run has (and every spare).

        Raises:
            BlindError: Slurm cannot be asked.
        """
        tasks = sorted(self._slurm.jobs(*self._run.arrays()), key=lambda job: job.task or 0)
        names = [job.name for job in tasks]
        if not names:  # Slurm has forgotten them
            manifest = self._run.manifest()
            count = (manifest.replicas or manifest.group_size) + manifest.spares
            names = [f"{self._run.number}_{index}" for index in range(count)]
        return [GroupJob(self._run, self._slurm, self._watcher, name) for name in names]

    @property
    def finished(self) -> bool:
        """Whether it has trained to the last step."""
        return self._run.finished.exists()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all its tasks have ended; returns whether it finished.

        Args:
            timeout: seconds after which not to wait any longer.

        Raises:
            TimeoutError: they had not ended by then.
            BlindError: Slurm cannot be asked.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        jobs = self.jobs
        while not all(job.done() for job in jobs):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} still runs after {timeout:g} s")
            time.sleep(1.0)
        return self.finished

    def cancel(self) -> None:
        """End it, and the lighthouse that was started for it."""
        runs.cancel(self._run, self._slurm, lambda line: None)

    def scale(self, replicas: int) -> None:
        """Give it more replica groups, which join and heal, or fewer, which leave."""
        env = os.environ if self._env is None else self._env
        runs.scale(self._run, replicas, self._slurm, env, say=lambda line: None)

    def __repr__(self) -> str:
        return f"Run({self.name!r})"


def submit(
    config: str | Path | None = None,
    *,
    replicas: int | None = None,
    profile: str = "",
    flags: Sequence[str] = (),
    cluster: str = "slurm",
    env: Mapping[str, str] | None = None,
    **settings: Any,
) -> Run:
    """Submit a run, as ``python -m launcher submit`` does.

    Args:
        config: torchtitan config (``.toml``), or a run file (``.yaml``).
        replicas: replica groups.
        profile: cluster profile.
        flags: torchtitan's flags.
        cluster: ``"slurm"``, or ``"local"``: processes of this machine, without Slurm.
        env: environment of the tasks; None: this process's.
        settings: any other key of ``docs/settings.md``.

    Raises:
        UsageError: bad settings; nothing was submitted.
        KitError: a step failed; what was done before is undone.
    """
    if isinstance(flags, str):
        raise UsageError(f"flags is a list of words, not {flags!r}: split it")
    if cluster not in (SLURM, LOCAL):
        raise UsageError(f"cluster must be {SLURM!r} or {LOCAL!r}, not {cluster!r}")
    submission.require_root()
    env = dict(os.environ if env is None else env)
    said = {"replicas": replicas, "flags": list(flags), **settings}
    run_file = None
    if config is not None and Path(config).suffix in (".yaml", ".yml"):
        run_file = Path(config)
    elif config is not None:
        said["config"] = str(config)
    resolved = layers.resolve(said, env, run_file=run_file, profile=profile)
    plan = submission.plan(resolved, env, local=cluster == LOCAL)
    start = submission.submit_local if cluster == LOCAL else submission.submit
    run = start(plan, env, say=lambda line: None)
    return Run(run, scheduler_of(run), env)


def find(name: str | None = None, outputs: str | Path = "outputs") -> Run:
    """A run that was submitted before; None: the newest.

    Raises:
        UsageError: there is none.
    """
    run = Outputs(Path(outputs).absolute()).find(name)
    return Run(run, scheduler_of(run))
