"""The command line. No logic here: each command calls one module and prints what it says."""

from __future__ import annotations

import io
import os
import resource
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher import doctor_cli, drill_cli, lighthouse_cli, submit_cli
from launcher.lighthouse_cli import OUTPUTS, OutputsOption, say
from launcher.model import KitError, ReportFormat

app = typer.Typer(
    name="launcher",
    help="Fault-tolerant pretraining on Slurm with torchft and torchtitan.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)
sandbox_app = typer.Typer(no_args_is_help=True, help="A real Slurm on this one machine, as root.")
app.command("submit", cls=submit_cli.WithFlags)(submit_cli.submit)
app.command("list")(submit_cli.list_runs)
app.command("status")(submit_cli.status)
app.command("cancel")(submit_cli.cancel)
app.command("scale")(submit_cli.scale)
app.command("requeue")(submit_cli.requeue)
app.add_typer(lighthouse_cli.app, name="lighthouse")
app.add_typer(drill_cli.app, name="drill")
app.add_typer(sandbox_app, name="sandbox")
app.command("doctor")(doctor_cli.doctor)

FolderOption = Annotated[Path, typer.Option("--dir", help="The sandbox's own folder.")]
NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="For example worker-1.")]
SANDBOX = Path("/run/tft-sandbox")


@app.command()
def assets(
    debug: Annotated[
        bool, typer.Option("--debug", help="Build the CPU debug corpus and tokenizer instead.")
    ] = False,
    dataset: Annotated[
        str,
        typer.Option(metavar="NAME", help="Fetch shards of a dataset instead: c4, c4_validation."),
    ] = "",
    shards: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many; default: complete what was begun."),
    ] = None,
    first: Annotated[
        int, typer.Option(metavar="K", min=0, help="Number of the first of them.")
    ] = 0,
    check: Annotated[
        bool, typer.Option("--check", help="Look at what was fetched: is it there, and whole?")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="With --check: read everything, compare hashes.")
    ] = False,
) -> None:
    """Download the tokenizer of Llama 3.1 8B (HF_TOKEN or `hf auth login`), or shards of a dataset."""
    from launcher import assets
    from launcher.interrupts import stop_on_signals
    from launcher.model import UsageError

    if sum((debug, bool(dataset), check)) > 1:
        raise UsageError("--debug, --dataset and --check are three different things: ask for one")
    if (shards is not None or first) and not (dataset and shards is not None):
        raise UsageError("--first and --shards go together, and with --dataset")
    if deep and not check:
        raise UsageError("--deep needs --check")
    if check:
        assets.report(OUTPUTS, deep, say)
    elif dataset:
        with stop_on_signals():
            assets.dataset(OUTPUTS, dataset, shards, first, say)
    elif debug:
        place, built = assets.debug(OUTPUTS)
        say(f"debug corpus and tokenizer {'built' if built else 'are there'}: {place}")
    else:
        say(f"tokenizer of {assets.REPOSITORY}: {assets.tokenizer(OUTPUTS)}")


@app.command()
def monitor(
    run: Annotated[str, typer.Argument(help="Run name or array job id; default: newest.")] = "",
    outputs: OutputsOption = OUTPUTS,
    once: Annotated[bool, typer.Option("--once", help="Print what is known, then stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --once: the same as one JSON object.")
    ] = False,
    lighthouse_log: Annotated[
        Path | None, typer.Option(help="Watch bare logs: the lighthouse's log.")
    ] = None,
    replica_log: Annotated[
        list[Path] | None, typer.Option(help="Watch bare logs: a replica's; may be repeated.")
    ] = None,
    events_to: Annotated[
        Path | None, typer.Option(help="Append every notice and change to it, as JSON lines.")
    ] = None,
    prometheus: Annotated[
        str, typer.Option(metavar="[ADDR:]PORT", help="Serve metrics; default: this machine only.")
    ] = "",
    act: Annotated[
        bool,
        typer.Option(
            "--act",
            help="Also do what the run needs: cut Slurm's delays, requeue, restart hung groups. "
            "The lighthouse's supervisor does this anyway.",
        ),
    ] = False,
    with_parent: Annotated[bool, typer.Option("--with-parent", hidden=True)] = False,
    webhook: Annotated[
        str,
        typer.Option(
            envvar="TFT_WEBHOOK",
            show_default=False,
            help="Address that takes losses, recoveries, alarms and an early end. A secret: prefer the variable.",
        ),
    ] = "",
) -> None:
    """Follow a run: quorum changes, losses, recoveries, and the end."""
    from launcher import monitor
    from launcher.model import UsageError
    from launcher.outlets import Outlets
    from launcher.rundir import Outputs
    from launcher.scheduler import scheduler_of
    from launcher.slurm import Slurm
    from launcher.watcher import Watcher

    bare = [*([lighthouse_log] if lighthouse_log else []), *(replica_log or [])]
    # Three files of every replica group are followed.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if with_parent:
        from launcher.parentage import die_with_parent

        die_with_parent(signal.SIGTERM)
    if as_json and not once:
        raise UsageError("--json needs --once")
    if bare and not once:
        raise UsageError("bare logs are read in one pass: add --once")
    if once and act:
        raise UsageError("--act is for following: leave --once out")
    if once and (events_to or prometheus):
        raise UsageError("--events-to and --prometheus are for following: leave --once out")
    if bare:
        name, watcher = "", Watcher.of_files(lighthouse_log, replica_log or [])
    else:
        chosen = monitor.choose(Outputs(outputs.absolute()), run or None, Slurm())
        slurm = scheduler_of(chosen)
        if not once:
            outlets = Outlets(
                events_to=events_to, prometheus=prometheus, webhook=webhook, env=os.environ
            )
            if act:
                from launcher.guardian import Guardian

                with Guardian.of(chosen, slurm) as guardian:
                    monitor.follow(chosen, say=say, slurm=slurm, outlets=outlets, act=guardian.tend)
            elif sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
                from launcher.live import follow_live

                follow_live(chosen, slurm, outlets)
            else:
                monitor.follow(chosen, say=say, slurm=slurm, outlets=outlets)
            return
        name, watcher = chosen.name, Watcher.of_run(chosen, slurm)
    with watcher:
        raise typer.Exit(monitor.once(watcher, say=say, as_json=as_json, name=name))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Run name or array job id; default: newest.")] = "",
    outputs: OutputsOption = OUTPUTS,
    shape: Annotated[
        ReportFormat, typer.Option("--format", help="A page to look at, text tables, or data.")
    ] = ReportFormat.HTML,
    output: Annotated[
        Path | None, typer.Option(help="File to write; default: report.* in the run's directory.")
    ] = None,
) -> None:
    """Write what happened in a run: timeline, loss, incidents with evidence, findings."""
    from launcher.publish import publish
    from launcher.rundir import Outputs

    say(str(publish(Outputs(outputs.absolute()).find(run or None), shape, output)))


@app.command()
def dashboard(
    run: Annotated[str, typer.Argument(help="Run name; default: every run, grouped.")] = "",
    entity: Annotated[str, typer.Option(help="W&B user or team; default: WANDB_ENTITY.")] = "",
    project: Annotated[str, typer.Option(help="W&B project; default: WANDB_PROJECT.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the workspace as JSON; needs no network.")
    ] = False,
) -> None:
    """Make a Weights & Biases workspace: training, quorum, incidents, replica groups."""
    from launcher.dashboard import run_dashboard

    run_dashboard(run, entity=entity, project=project, dry_run=dry_run, env=os.environ, say=say)


@sandbox_app.command("up")
def sandbox_up(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="How many nodes.")] = 3,
    network: Annotated[
        bool,
        typer.Option("--network", help="Give every node a network of its own, that can be cut."),
    ] = False,
    folder: FolderOption = SANDBOX,
) -> None:
    """Start Slurm with nodes worker-0…, 8 (pretended) GPUs and 128 CPUs each."""
    from launcher.sandbox import Sandbox

    sandbox = Sandbox(folder)
    started = sandbox.up(nodes, network=network)
    is_up = "up" if started else "is already up"
    say(f"sandbox {is_up}: {nodes} nodes in {folder}. To use it in a shell:")
    say(_exports(sandbox.environment()))


@sandbox_app.command("down")
def sandbox_down(folder: FolderOption = SANDBOX) -> None:
    """End every process of the sandbox and remove its folder."""
    from launcher.sandbox import Sandbox

    say("sandbox down" if Sandbox(folder).down() else f"no sandbox in {folder}")


@sandbox_app.command("status")
def sandbox_status(folder: FolderOption = SANDBOX) -> None:
    """Say whether the sandbox runs, and how its nodes are; exit 1 when it does not."""
    from launcher.sandbox import Sandbox

    sandbox = Sandbox(folder)
    if not sandbox.running():
        say(f"no sandbox is up in {folder}")
        raise typer.Exit(1)
    for node in sandbox.slurm().nodes():
        say(f"{node.name}  {node.state}  {'' if node.reason == 'none' else node.reason}".rstrip())
    say(_exports(sandbox.environment()))


@sandbox_app.command("cut")
def sandbox_cut(node: NodeArgument, folder: FolderOption = SANDBOX) -> None:
    """Cut a node off the network, as if its cable were pulled (of `up --network`)."""
    from launcher.sandbox import Sandbox

    Sandbox(folder).cut(node)
    say(f"{node} is cut off the network; `sandbox heal {node}` connects it again")


@sandbox_app.command("heal")
def sandbox_heal(node: NodeArgument, folder: FolderOption = SANDBOX) -> None:
    """Connect a node that was cut off again."""
    from launcher.sandbox import Sandbox

    Sandbox(folder).heal(node)
    say(f"{node} is connected to the network")


@sandbox_app.command("crash")
def sandbox_crash(node: NodeArgument, folder: FolderOption = SANDBOX) -> None:
    """Kill every process of a node at once, its slurmd too, as if its power were cut."""
    from launcher.sandbox import Sandbox

    Sandbox(folder).crash(node)
    say(f"every process of {node} is killed; `sandbox restart {node}` starts its slurmd again")


@sandbox_app.command("restart")
def sandbox_restart(node: NodeArgument, folder: FolderOption = SANDBOX) -> None:
    """Start slurmd of a node that has crashed again."""
    from launcher.sandbox import Sandbox

    Sandbox(folder).restart(node)
    say(f"{node} runs")


@sandbox_app.command("install")
def sandbox_install() -> None:
    """Install Slurm and munge from the distribution's packages when they are missing."""
    from launcher.packages import install

    install()


@app.command()
def demo(
    outputs: OutputsOption = OUTPUTS,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Sandbox folder; default: one of its own in /run.")
    ] = None,
    steps: Annotated[int, typer.Option(min=60, help="Steps to train.")] = 100,
    cluster: Annotated[
        str,
        typer.Option(help="slurm, or local: without it; default: slurm, where it can be had."),
    ] = "",
) -> None:
    """Lose a node and train on: the README's steps on a sandbox, with a verdict."""
    from launcher.demo import run_demo

    raise typer.Exit(run_demo(outputs, folder, steps, cluster=cluster, say=say))


def _exports(environment: dict[str, str]) -> str:
    return "export " + " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())


def main() -> None:
    """Run the command line; errors of the kit are one line and an exit code, no traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # texts from logs, in any locale
    try:
        app()
    except KitError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr, flush=True)
        sys.exit(1)
