"""The command line of the doctor. No logic here."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Annotated

import typer

from launcher.lighthouse_cli import say


def doctor(
    profile: Annotated[str, typer.Option(help="Cluster profile; default: the environment.")] = "",
    partition: Annotated[str, typer.Option(help="Where jobs go; default: Slurm's.")] = "",
    account: Annotated[str, typer.Option(help="Account that jobs charge; default: yours.")] = "",
    deep: Annotated[
        bool, typer.Option("--deep", help="Also run an all-reduce over nodes, with their GPUs.")
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="With --deep: over how many.")] = 2,
    no_job: Annotated[
        bool, typer.Option("--no-job", help="Submit nothing: look at this machine and Slurm only.")
    ] = False,
    wait: Annotated[
        float, typer.Option(min=1, help="Seconds for which a job may wait for nodes.")
    ] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """Check this machine, Slurm and a node before a run. Exit code 0: nothing failed, 1: something
    did, 4: something needed could not be looked at."""
    from launcher import checks, doctor, process
    from launcher.model import UsageError
    from launcher.slurm import Slurm
    from launcher.target import target_of

    if deep and no_job:
        raise UsageError("--deep needs a job: leave --no-job out")
    target, env = target_of(profile, os.environ, partition=partition, account=account)
    scope = doctor.Scope(job=not no_job, deep=deep, nodes=nodes, queue_seconds=wait)
    slurm = Slurm(partial(process.run, env=env))
    sections = doctor.examine(target, scope, slurm, env, _progress)
    if as_json:
        say(doctor.as_json(sections))
    elif sys.stdout.isatty():
        from rich.console import Console

        doctor.show(sections, Console(highlight=False, markup=False))
    else:
        for line in doctor.lines(sections):
            say(line)
    results = [result for section in sections for result in section.results]
    raise typer.Exit(checks.exit_code(results))


def _progress(line: str) -> None:
    """For whoever sits there."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr, flush=True)
