"""Submits a run: settings become one sbatch command and an environment, then a job.

`plan` says exactly what would be done, `submit` does it: a lighthouse for the run, the array, the
run's manifest. If a step fails, what was done before it is undone.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import secrets
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from launcher import local_run, preflight, process
from launcher.config import Site
from launcher.files import replace
from launcher.handover import environment, indices, sbatch_flags
from launcher.interrupts import signals_ignored, stop_on_signals
from launcher.lock import acquire
from launcher.methods import HSDP
from launcher.model import BlindError, KitError, UsageError
from launcher.opening import SCRIPT_JOB, TORCHTITAN_JOB, manifest_of
from launcher.run_lighthouse import Wanted, find_or_start
from launcher.rundir import Outputs, RunDir
from launcher.settings import DEFAULT_PORTS, Resolved, ports
from launcher.slurm import Slurm

#: Variables that sbatch takes for flags that are the job script's, and one of the lighthouse's.
_MISLEADING = frozenset(
    f"SBATCH_{name}"
    for name in ("ARRAY_INX", "EXPORT", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "JOB_NAME",
                 "NO_REQUEUE", "OPEN_MODE", "REQUEUE", "SIGNAL", "WAIT", "OUTPUT", "ERROR")
) | {"TFT_LIGHTHOUSE_NAME"}  # fmt: skip
#: Seconds that another submission of ours may take.
PATIENCE = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What would be done."""

    resolved: Resolved
    site: Site
    training: preflight.Training
    environment: Mapping[str, str]
    """Variables that hand the settings to the tasks."""
    flags: Sequence[str]
    """sbatch's."""
    job: Sequence[str]
    """Job script and its arguments."""
    lighthouse: Sequence[str]
    """Command that starts the run's own lighthouse, without its port."""
    replicas: int
    max_replicas: int
    spares: int
    nodes_per_replica: int

    @property
    def script(self) -> Sequence[str]:
        """The user's own training script and its arguments; empty: torchtitan trains."""
        return self.job[1:]

    def lines(self) -> list[str]:
        """The commands in words of a shell, and the script that is submitted."""
        said = ["# environment of the tasks"]
        said += [f"export {k}={shlex.quote(v)}" for k, v in sorted(self.environment.items())]
        if self.lighthouse:
            first, last = ports(self.resolved.get("lighthouse_ports", DEFAULT_PORTS))
            said += [
                "",
                f"# lighthouse: a free one, else one of its own, --port from {first} to {last}",
            ]
            said.append(shlex.join(self.lighthouse))
        said += [
            "",
            "# run (and --parsable, TORCHFT_LIGHTHOUSE with its address, and a --comment to find the job by)",
            " \\\n    ".join(["sbatch", *map(shlex.quote, self.flags), shlex.join(self.job)]),
        ]
        text = Path(self.job[0]).read_text(encoding="utf-8")
        return [*said, "", f"# {self.job[0]}", *text.splitlines()]


def cleaned(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without what belongs to a job that this may run in, and without what would
    change an array of ours behind our back."""
    return {
        name: value
        for name, value in env.items()
        if (not name.startswith("SLURM_") or name == "SLURM_CONF") and name not in _MISLEADING
    }


def require_root() -> None:
    """Check that this is the repository's root, from which everything is named.

    Raises:
        UsageError: it is not.
    """
    if not Path(TORCHTITAN_JOB).is_file():
        raise UsageError(f"{Path.cwd()} is not the root of the repository: submit from there")


def plan(resolved: Resolved, env: Mapping[str, str], *, local: bool = False) -> Submission:
    """Check everything that can be checked before something is started.

    Args:
        local: it is to run on this machine, which sees to its ranks itself.

    Raises:
        UsageError: what is wrong, where, and what to do: every problem.
    """
    require_root()
    replicas = resolved.get("replicas", 0)
    most, nodes = resolved.get("max_replicas", replicas), resolved.get("nodes_per_replica", 1)
    script = resolved.get("script")
    problems = list(_contradictions(resolved, env, most))
    env = cleaned(env)
    handed = environment(resolved, env, local=local)
    job = [TORCHTITAN_JOB]
    if script:
        job = [SCRIPT_JOB, script, *resolved.get("flags", ())]
        handed.pop("TFT_EXTRA_ARGS", None)
    site = training = None
    try:
        site = Site.from_environment({**env, **handed})
        if script:
            training = preflight.check_script(site, script)
        elif local:  # whoever starts it there checks it, with the ranks that there are
            training = preflight.Training(settings={}, steps=None)
        else:
            training = preflight.check(site, most, nodes, on_node=False)
    except UsageError as error:
        problems.append(str(error))
    if problems or site is None or training is None:
        raise UsageError("; ".join(problems))
    return Submission(
        resolved=resolved,
        site=site,
        training=training,
        environment=handed,
        flags=sbatch_flags(resolved, indices(replicas, most, site.spares), site),
        job=job,
        lighthouse=()
        if resolved.get("lighthouse")
        else _lighthouse_command(resolved, site, training.method.name),
        replicas=replicas,
        max_replicas=most,
        spares=site.spares,
        nodes_per_replica=nodes,
    )


def _contradictions(resolved: Resolved, env: Mapping[str, str], most: int) -> Iterator[str]:
    """What of the settings does not go together."""
    replicas = resolved.get("replicas")
    if replicas is None:
        yield "say how many replica groups: --replicas N, or `replicas: N` in a run file"
    elif most < replicas:
        yield f"--max-replicas {most} is less than --replicas {replicas}"
    if env.get("TFT_RUN"):
        yield f"TFT_RUN is {env['TFT_RUN']}, and a submission is a run of its own: unset it"
    named = resolved.get("config") and not resolved.sources["config"].startswith("$")
    if resolved.get("script") and named:
        yield "a run has a torchtitan config or a script of yours, not both"
    if resolved.get("nodes_per_replica", 1) > 1 and resolved.get("container"):
        yield (
            "a replica group of several nodes needs srun and scontrol, which a container has not: "
            "leave `container` or --nodes-per-replica out"
        )


def _lighthouse_command(resolved: Resolved, site: Site, method: str) -> list[str]:
    words = ["python", "-m", "launcher", "lighthouse", "up", "--with-run", "--detach"]
    words.append(f"--outputs={site.outputs}")
    for key, flag in (
        ("lighthouse_host", "--host"),
        ("lighthouse_bind", "--bind"),
        ("timeouts", "--timeouts"),
    ):
        if value := resolved.get(key):
            words.append(f"{flag}={value}")
    return words if method == HSDP.name else [*words, f"--method={method}"]


# -- doing it --------------------------------------------------------------------------


def submit(
    submission: Submission,
    env: Mapping[str, str],
    *,
    say: Callable[[str], None],
    slurm_with: Callable[[Mapping[str, str]], Slurm] = lambda env: Slurm(
        partial(process.run, env=env)
    ),
) -> RunDir:
    """Start (or find) the run's lighthouse, submit the array, write the manifest.

    Args:
        slurm_with: Slurm's commands, run in the given environment.

    Raises:
        KitError: a step failed; what was done before is undone.
    """
    outputs = Outputs(submission.site.outputs.absolute())
    env = cleaned(env)
    with stop_on_signals(), _one_at_a_time(outputs), contextlib.ExitStack() as undo:
        wanted = Wanted(
            url=(submission.resolved.get("lighthouse") or "").rstrip("/"),
            host=submission.resolved.get("lighthouse_host") or socket.gethostname(),
            ports=submission.resolved.get("lighthouse_ports", DEFAULT_PORTS),
            command=submission.lighthouse,
            method=submission.training.method,
            groups=submission.max_replicas,
            host_said=bool(submission.resolved.get("lighthouse_host")),
            timeouts=submission.resolved.get("timeouts") or "",
        )
        url, folder = find_or_start(wanted, outputs, env, slurm_with(env), undo, say)
        handed = {**submission.environment, "TORCHFT_LIGHTHOUSE": url}
        slurm = slurm_with({**env, **handed})
        token = f"tft-submit-{secrets.token_hex(6)}"
        flags = list(submission.flags)
        if any(flag.startswith("--comment=") for flag in flags):
            token = ""  # the comment is the user's
        else:
            flags.append(f"--comment={token}")
        try:
            array = slurm.submit(flags, submission.job[0], submission.script)
        except (BlindError, KeyboardInterrupt):
            _cancel_lost(slurm, token, say)
            raise
        undo.callback(_cancel, slurm, array, say)
        folder.claim(array, slurm)
        run = outputs.run_of_array(array)
        manifest = manifest_of(
            submission.site, submission.training, run, url, folder,
            replicas=submission.replicas, nodes=submission.nodes_per_replica,
            user=getpass.getuser(), script=submission.script,
        )  # fmt: skip
        run.create(manifest)
        keep_record(run, submission, handed)
        undo.pop_all()
    return run


def submit_local(
    submission: Submission, env: Mapping[str, str], *, say: Callable[[str], None]
) -> RunDir:
    """Run it as processes of this machine, without Slurm (`launcher/local_run.py`).

    Raises:
        UsageError: it asks for what only Slurm can give.
        KitError: it did not come up; nothing is left of it.
    """
    problems = []
    if submission.max_replicas != submission.replicas:
        problems.append("a run of one machine cannot grow: leave --max-replicas out")
    if submission.nodes_per_replica != 1:
        problems.append("a group of one machine has one node: leave --nodes-per-replica out")
    if problems:
        raise UsageError("; ".join(problems))
    return local_run.up(
        Outputs(submission.site.outputs.absolute()),
        submission.site.config,
        replicas=submission.replicas,
        spares=submission.spares,
        env={**env, **submission.environment},
        script=submission.script,
    )


def keep_record(run: RunDir, submission: Submission, handed: Mapping[str, str]) -> None:
    """Keep what a later `scale` needs; readable for its owner alone."""
    record = {
        "flags": list(submission.flags),
        "job": list(submission.job),
        "environment": dict(handed),
        "settings": {key: [value, source] for key, value, source in submission.resolved.explain()},
        "submitted": time.time(),
    }
    replace(run.submission, json.dumps(record, indent=2) + "\n", mode=0o600)


@contextlib.contextmanager
def _one_at_a_time(outputs: Outputs) -> Iterator[None]:
    """Two submissions at once would choose the same lighthouse."""
    outputs.lighthouses.mkdir(parents=True, exist_ok=True)
    path, deadline = outputs.lighthouses / ".submit.lock", time.monotonic() + PATIENCE
    while (held := _locked(path)) is None:
        if time.monotonic() > deadline:
            raise KitError(f"another submission has held {path} for {PATIENCE:g} s")
        time.sleep(0.2)
    with held:
        yield


def _locked(path: Path) -> IO[str] | None:
    try:
        return acquire(path)
    except OSError as error:
        raise KitError(f"cannot write {path}: {error.strerror}") from error


def _cancel_lost(slurm: Slurm, token: str, say: Callable[[str], None]) -> None:
    """Cancel what Slurm may have taken, although it did not say so."""
    with signals_ignored():
        try:
            if not token:
                raise KitError("its comment is one of yours")
            for array in slurm.commented(token):
                _cancel(slurm, array, say)
        except KitError as error:
            say(f"whether Slurm has taken a job is not known: look at squeue --me ({error})")


def _cancel(slurm: Slurm, array: int, say: Callable[[str], None]) -> None:
    with signals_ignored():
        try:
            slurm.cancel(array)
            say(f"job {array} is cancelled again")
        except KitError as error:
            say(f"job {array} could NOT be cancelled: `scancel {array}` ({error})")


def next_steps(
    run: RunDir, submission: Submission, env: Mapping[str, str], *, grows: bool = True
) -> list[str]:
    """What a person does after a submission, in a shell with that environment."""
    of = f" of {submission.max_replicas}" if submission.max_replicas != submission.replicas else ""
    spares = f" and {submission.spares} spares" if submission.spares else ""
    where = shlex.quote(min(os.path.relpath(run.path), str(run.path), key=len))
    searched = Outputs(Path(env.get("TFT_OUTPUTS") or "outputs").absolute())
    name = run.name if run.path.parent.parent == searched.root else where
    return [
        f"run {run.name}: {submission.replicas}{of} replica groups{spares}",
        f"  python -m launcher monitor {name}      # what happens; Ctrl-C leaves the run alone",
        f"  tail -F {where}/{run.name}_0.out    # its log",
        *([f"  python -m launcher scale {name} --replicas N"] if grows else []),
        f"  python -m launcher cancel {name}",
    ]
