"""The command line of runs of one machine. No logic here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.lighthouse_cli import OUTPUTS, OutputsOption, say

app = typer.Typer(
    no_args_is_help=True,
    help="Runs of this one machine: no Slurm, no root. Monitor, drills and report work on them.",
)

RunArgument = Annotated[
    str, typer.Argument(help="Run name or number; default: the one that goes on.")
]


@app.command("up")
def local_up(
    config: Annotated[Path, typer.Argument(help="torchtitan config file.")],
    replicas: Annotated[int, typer.Option(min=1, help="Replica groups.")],
    flags: Annotated[
        list[str] | None, typer.Argument(help="After --: more flags for torchtitan.")
    ] = None,
    spares: Annotated[
        int, typer.Option(min=0, envvar="TFT_SPARES", help="Tasks that stand ready.")
    ] = 0,
    outputs: OutputsOption = OUTPUTS,
) -> None:
    """Start a run in the background, with a lighthouse of its own; `down` ends it."""
    from launcher import local_run
    from launcher.rundir import Outputs

    place = Outputs(outputs.absolute())
    run = local_run.up(place, config, replicas=replicas, spares=spares, flags=flags or ())
    for line in local_run.next_steps(run):
        say(line)


@app.command("down")
def local_down(run: RunArgument = "", outputs: OutputsOption = OUTPUTS) -> None:
    """End a run with everything that belongs to it."""
    from launcher import local_run
    from launcher.rundir import Outputs

    local_run.down(local_run.find(Outputs(outputs.absolute()), run or None), say)


@app.command("status")
def local_status(run: RunArgument = "", outputs: OutputsOption = OUTPUTS) -> None:
    """Show a run's tasks."""
    from launcher import local_run
    from launcher.rundir import Outputs

    for line in local_run.status(local_run.find(Outputs(outputs.absolute()), run or None)):
        say(line)


@app.command("requeue")
def local_requeue(
    run: Annotated[str, typer.Argument(help="Run name or number.")],
    task: Annotated[int, typer.Argument(min=0, help="Which of its tasks.")],
    outputs: OutputsOption = OUTPUTS,
) -> None:
    """End a task of a run, and start it again, as `scontrol requeue` does."""
    from launcher import local_run
    from launcher.local import Local
    from launcher.rundir import Outputs

    found = local_run.find(Outputs(outputs.absolute()), run)
    Local(found).requeue(f"{found.name.removeprefix('tft-')}_{task}")
    say(f"task {task} of {found.name} is requeued")
