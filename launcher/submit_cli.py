"""The command line of runs: submit, list, status, cancel, scale. No logic here."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from launcher.lighthouse_cli import OUTPUTS, OutputsOption, say
from launcher.model import BlindError, UsageError

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Run name or array job id.")]


class WithFlags(typer.core.TyperCommand):
    """A command that leaves alone what follows ` -- `: it is another program's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        super().parse_args(ctx, args[:end])
        ctx.args = list(args[end + 1 :])
        return list(ctx.args)


def submit(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Argument(help="torchtitan config (.toml), or a run file (.yaml) that names one."),
    ] = None,
    script: Annotated[
        str, typer.Option(help="Training script of your own, in place of a torchtitan config.")
    ] = "",
    replicas: Annotated[int | None, typer.Option(help="Replica groups.")] = None,
    max_replicas: Annotated[
        int | None, typer.Option(help="Replica groups that the run may grow to.")
    ] = None,
    nodes_per_replica: Annotated[int | None, typer.Option(help="Nodes of each group.")] = None,
    spares: Annotated[int | None, typer.Option(help="Tasks that stand ready.")] = None,
    method: Annotated[
        str, typer.Option(help="hsdp, ddp, local-sgd or diloco: docs/methods.md.")
    ] = "",
    profile: Annotated[
        str, typer.Option(help="Cluster profile: a name in configs/clusters, or a file.")
    ] = "",
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each node.")] = None,
    cpus_per_node: Annotated[int | None, typer.Option(help="CPUs of each node.")] = None,
    partition: Annotated[str, typer.Option(help="Slurm's partition.")] = "",
    account: Annotated[str, typer.Option(help="Account that is charged.")] = "",
    qos: Annotated[str, typer.Option(help="Quality of service.")] = "",
    time_limit: Annotated[str, typer.Option(help="Of each start of a task: 1-00:00:00.")] = "",
    name: Annotated[str, typer.Option(help="The job's name.")] = "",
    comment: Annotated[str, typer.Option(help="The job's comment.")] = "",
    dependency: Annotated[str, typer.Option(help="What it waits for, as sbatch takes it.")] = "",
    sbatch: Annotated[
        list[str] | None, typer.Option("--sbatch", help="A further flag of sbatch; repeatable.")
    ] = None,
    cluster: Annotated[
        str, typer.Option(help="slurm, or local: processes of this machine, without Slurm.")
    ] = "slurm",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print every setting, and where it was said.")
    ] = False,
) -> None:
    """Start a run: its lighthouse, an array of replica groups, and what looks after them.

    What follows ` -- ` are flags of torchtitan, or of your script: `submit --replicas 4 -- --training.steps 500`.
    Settings come from the command line, the environment, the run file, the cluster profile, in
    this order; docs/settings.md has them all.
    """
    from launcher import submission
    from launcher.layers import resolve

    if cluster not in ("slurm", "local"):
        raise UsageError(f"--cluster must be slurm or local, not {cluster!r}")

    submission.require_root()
    run_file = None
    said: dict[str, Any] = {
        "script": script,
        "replicas": replicas,
        "max_replicas": max_replicas,
        "nodes_per_replica": nodes_per_replica,
        "spares": spares,
        "method": method,
        "gpus_per_node": gpus_per_node,
        "cpus_per_node": cpus_per_node,
        "partition": partition,
        "account": account,
        "qos": qos,
        "time_limit": time_limit,
        "name": name,
        "comment": comment,
        "dependency": dependency,
        "sbatch_flags": sbatch or [],
        "flags": list(context.args),
    }
    if config is not None and config.suffix in (".yaml", ".yml"):
        run_file = config
    elif config is not None:
        said["config"] = str(config)
    resolved = resolve(said, os.environ, run_file=run_file, profile=profile)
    if explain:
        for line in explained(resolved.explain()):
            say(line)
        return
    planned = submission.plan(resolved, os.environ, local=cluster == "local")
    if dry_run and cluster == "local":
        raise UsageError("--dry-run shows what Slurm would get: leave --cluster local out")
    if dry_run:
        for line in planned.lines():
            say(line)
        return
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "sbatch is not on this machine's PATH: submit on a login node, or with --cluster local"
        )
    start = submission.submit_local if cluster == "local" else submission.submit
    run = start(planned, os.environ, say=say)
    for line in submission.next_steps(run, planned, os.environ, grows=cluster == "slurm"):
        say(line)


def explained(rows: list[tuple[str, str, str]]) -> list[str]:
    """Settings as a table."""
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    widths[1] = min(widths[1], 60)
    return [f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}" for key, value, source in rows]


def list_runs(
    outputs: OutputsOption = OUTPUTS,
    every: Annotated[bool, typer.Option("--all", help="Also those that have ended.")] = False,
) -> None:
    """List the runs that live, newest first."""
    import time

    from launcher.rundir import Outputs
    from launcher.runs import UNSEEN, listed
    from launcher.slurm import Slurm

    rows = [("RUN", "STARTED", "STATE", "TRAINING", "STEP")]
    for each in listed(Outputs(outputs.absolute()), Slurm(), every=every):
        started = time.strftime("%F %T", time.localtime(each.started)) if each.started else "-"
        rows.append((each.run, started, each.state, each.groups, each.step))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        say("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip())
    if any(row[2] == UNSEEN for row in rows):
        raise BlindError("Slurm cannot be asked: whether those runs live is not known")


def status(run: RunArgument = "", outputs: OutputsOption = OUTPUTS) -> None:
    """Say how a run stands: the monitor's view, once. Exit codes 0, 3 (critical) and 4 (blind)."""
    from launcher import monitor
    from launcher.rundir import Outputs
    from launcher.scheduler import scheduler_of
    from launcher.slurm import Slurm
    from launcher.watcher import Watcher

    slurm = Slurm()
    chosen = monitor.choose(Outputs(outputs.absolute()), run or None, slurm)
    with Watcher.of_run(chosen, scheduler_of(chosen, slurm)) as watcher:
        raise typer.Exit(
            monitor.once(watcher, say=say, as_json=False, name=chosen.name, story=False)
        )


def cancel(run: RunArgument, outputs: OutputsOption = OUTPUTS) -> None:
    """End a run: all its tasks, and the lighthouse that `submit` started for it."""
    from launcher import runs
    from launcher.slurm import Slurm

    runs.cancel(_named(run, outputs), Slurm(), say)


def scale(
    run: RunArgument,
    replicas: Annotated[int, typer.Option(min=1, help="How many replica groups it is to have.")],
    outputs: OutputsOption = OUTPUTS,
) -> None:
    """Give a live run more replica groups, which join and heal, or fewer, which leave."""
    from launcher import runs
    from launcher.slurm import Slurm

    runs.scale(_named(run, outputs), replicas, Slurm(), os.environ, say=say)


def requeue(
    run: RunArgument,
    replica: Annotated[int, typer.Argument(min=0, help="Which replica group.")],
    outputs: OutputsOption = OUTPUTS,
) -> None:
    """End a replica group's task, and start it again; it heals from its peers."""
    from launcher import runs
    from launcher.scheduler import scheduler_of
    from launcher.slurm import Slurm

    chosen = _named(run, outputs)
    runs.requeue(chosen, replica, scheduler_of(chosen, Slurm()))
    say(f"replica {replica} of {chosen.name} is requeued")


def _named(name: str, outputs: Path) -> Any:
    from launcher.rundir import Outputs

    if not name:
        raise UsageError("name the run: `python -m launcher list` shows them")
    return Outputs(outputs.absolute()).find(name)
