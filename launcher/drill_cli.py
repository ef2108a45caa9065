"""The command line of drills. No logic here."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.drills import KINDS, Kind, describe
from launcher.lighthouse_cli import OUTPUTS, OutputsOption, say

if TYPE_CHECKING:
    from launcher.drill_command import Setting

app = typer.Typer(
    no_args_is_help=True,
    help="Make one real failure in a run of ours, and see whether it recovers. Exit code 0: passed, "
    "3: failed, 2: refused, 4: could not see.",
)

RunOption = Annotated[str, typer.Option("--run", help="Run name or array job id; default: newest.")]
PatienceOption = Annotated[
    float, typer.Option("--patience", min=0.001, help="Stretches every deadline.")
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be run, exactly.")]
PartitionOption = Annotated[
    str, typer.Option("--partition", help="For preempt: one whose jobs preempt this run's.")
]
SecondsOption = Annotated[
    float,
    typer.Option("--seconds", min=1, help="How long slow, disk-full, node-drain and preempt last."),
]


def _command(kind: Kind) -> Callable[..., None]:
    def drill(
        replica: Annotated[
            int | None, typer.Option(min=0, help="Replica group to hit; default: the last.")
        ] = None,
        node: Annotated[str, typer.Option(help="The group on that node instead.")] = "",
        rank: Annotated[int, typer.Option(min=0, help="Which of its ranks, for one rank.")] = 0,
        run: RunOption = "",
        dry_run: DryOption = False,
        yes: YesOption = False,
        seconds: SecondsOption = 20.0,
        partition: PartitionOption = "",
        patience: PatienceOption = 1.0,
        outputs: OutputsOption = OUTPUTS,
    ) -> None:
        from launcher.drill_command import one_drill

        setting = _setting(outputs, run, dry_run, yes, seconds, partition, patience)
        one_drill(setting, kind, replica=replica, node=node, rank=rank)

    return drill


for _kind in KINDS.values():
    app.command(_kind.name, help=" ".join(describe(_kind)), short_help=_kind.does)(_command(_kind))


@app.command("list")
def drill_list() -> None:
    """Every kind of failure: what is done, what must follow, and whose rights it needs."""
    for kind in KINDS.values():
        say(kind.name)
        for text in describe(kind):
            say(f"  {text}")


@app.command("loop")
def drill_loop(
    kinds: Annotated[str, typer.Option(help="Kinds, comma-separated.")],
    count: Annotated[int, typer.Option(min=1, help="How many failures.")] = 10,
    mtbf: Annotated[
        str, typer.Option(help="Mean time between two failures, e.g. 60s or 5m.")
    ] = "60s",
    seed: Annotated[int, typer.Option(help="The same seed gives the same schedule.")] = 0,
    max_down: Annotated[int, typer.Option(min=1, help="Failures at once, at most.")] = 1,
    run: RunOption = "",
    dry_run: DryOption = False,
    yes: YesOption = False,
    seconds: SecondsOption = 20.0,
    partition: PartitionOption = "",
    patience: PatienceOption = 1.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report there as JSON, too.")
    ] = None,
    outputs: OutputsOption = OUTPUTS,
) -> None:
    """A soak: failure after failure by a reproducible schedule, and a report of what they cost."""
    from launcher.drill_command import soak

    soak(
        _setting(outputs, run, dry_run, yes, seconds, partition, patience),
        [name.strip() for name in kinds.split(",") if name.strip()],
        count=count,
        mtbf=mtbf,
        seed=seed,
        max_down=max_down,
        json_file=json_file,
    )


def _setting(
    outputs: Path,
    run: str,
    dry: bool,
    yes: bool,
    seconds: float,
    partition: str,
    patience: float,
) -> Setting:
    from launcher.drill_command import Setting

    return Setting(
        outputs=outputs.absolute(),
        name=run or None,
        env=os.environ,
        say=say,
        ask=None if yes else _ask,
        dry=dry,
        patience=patience,
        seconds=seconds,
        partition=partition,
    )


def _ask(question: str) -> bool | None:
    """The answer of whoever sits there; None when nobody does."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    return typer.confirm(question)
