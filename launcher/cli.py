"""The command line. No logic here: each command calls one module and prints what it says."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.model import KitError, ReportFormat

if TYPE_CHECKING:
    from launcher.lighthouse import LighthouseDir
    from launcher.slurm import Slurm

app = typer.Typer(
    name="launcher",
    help="Fault-tolerant pretraining on Slurm with torchft and torchtitan.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)
lighthouse_app = typer.Typer(no_args_is_help=True, help="The lighthouse on the login node.")
sandbox_app = typer.Typer(no_args_is_help=True, help="A real Slurm on this one machine, as root.")
app.add_typer(lighthouse_app, name="lighthouse")
app.add_typer(sandbox_app, name="sandbox")

OutputsOption = Annotated[
    Path, typer.Option("--outputs", envvar="TFT_OUTPUTS", help="Where runs write.")
]
PortOption = Annotated[
    int, typer.Option("--port", envvar="TFT_LIGHTHOUSE_PORT", min=1, max=65535, help="Its port.")
]
HostOption = Annotated[
    str,
    typer.Option(
        "--host",
        envvar="TFT_LIGHTHOUSE_HOST",
        help="Address published to the nodes; default: this machine's host name.",
    ),
]
FolderOption = Annotated[Path, typer.Option("--dir", help="The sandbox's own folder.")]
OUTPUTS = Path("outputs")
SANDBOX = Path("/run/tft-sandbox")


@lighthouse_app.command("up")
def lighthouse_up(
    outputs: OutputsOption = OUTPUTS,
    host: HostOption = "",
    port: PortOption = 29510,
    bind: Annotated[str, typer.Option(help="Address to listen on; default: every interface.")] = "",
    min_replicas: Annotated[
        int, typer.Option(min=1, help="Replica groups below which nobody trains.")
    ] = 1,
    heartbeat_timeout_ms: Annotated[
        int, typer.Option(min=200, help="Silence after which a replica group counts as lost.")
    ] = 2000,
    join_timeout_ms: Annotated[
        int, typer.Option(min=100, help="How long a quorum waits for a group that is coming up.")
    ] = 10_000,
    quorum_tick_ms: Annotated[int, typer.Option(min=10, help="How often it decides.")] = 100,
    detach: Annotated[bool, typer.Option("--detach", help="Run in the background.")] = False,
) -> None:
    """Start the lighthouse and publish its address; Ctrl-C or `down` ends it."""
    import socket

    from launcher.lighthouse import LighthouseDir
    from launcher.rundir import Outputs
    from launcher.slurm import Slurm
    from launcher.supervisor import LighthouseSettings, Supervisor, start_detached

    if not bind and host in ("127.0.0.1", "localhost", "::1"):
        bind = host  # nobody but this machine is meant to reach it
    settings = LighthouseSettings(
        host=host or socket.gethostname(),
        port=port,
        bind=bind,
        min_replicas=min_replicas,
        heartbeat_timeout_ms=heartbeat_timeout_ms,
        join_timeout_ms=join_timeout_ms,
        quorum_tick_ms=quorum_tick_ms,
    )
    place = Outputs(outputs.absolute())
    LighthouseDir.of(place, settings.url).release_if_ended(Slurm())
    if not detach:
        Supervisor(settings, place, say=_say).run()
        return
    argv = [sys.executable, "-m", "launcher", *(a for a in sys.argv[1:] if a != "--detach")]
    address = start_detached(argv, LighthouseDir.of(place, settings.url))
    _say(f"lighthouse up at {address.url} (pid {address.pid})")


@lighthouse_app.command("down")
def lighthouse_down(
    outputs: OutputsOption = OUTPUTS, host: HostOption = "", port: PortOption = 29510
) -> None:
    """End the lighthouse that `up` started on this machine."""
    from launcher.supervisor import stop

    folder = _lighthouse_folder(outputs, host, port)
    _say("lighthouse down" if stop(folder) else f"no lighthouse is up at {folder.label}")


@lighthouse_app.command("status")
def lighthouse_status(
    outputs: OutputsOption = OUTPUTS, host: HostOption = "", port: PortOption = 29510
) -> None:
    """Say whether the lighthouse is up, answers, and which run it serves; exit 1 when not."""
    from launcher.lighthouse import answers

    folder = _lighthouse_folder(outputs, host, port)
    address = folder.address()
    if address is None:
        _say(f"no lighthouse is up at {folder.label}")
        raise typer.Exit(1)
    problem = answers(address.url)
    run = folder.claimed_by()
    _say(
        f"lighthouse {address.url} (pid {address.pid} on {address.host}, {address.user}): "
        + ("answers" if problem is None else f"does not answer: {problem}")
        + (f"; claimed by run tft-{run}" if run is not None else "; serves no run yet")
    )
    if problem is not None:
        raise typer.Exit(1)


def _lighthouse_folder(outputs: Path, host: str, port: int) -> LighthouseDir:
    import socket

    from launcher.lighthouse import LighthouseDir
    from launcher.rundir import Outputs

    url = f"http://{host or socket.gethostname()}:{port}"
    return LighthouseDir.of(Outputs(outputs.absolute()), url)


@app.command(hidden=True)
def replica() -> None:
    """Run this array task's replica group (called by the job script)."""
    from launcher.replica import run_replica

    _task(run_replica)


@app.command(hidden=True)
def classic() -> None:
    """Run this node's part of the classic job (called by the job script)."""
    from launcher.classic import run_classic

    _task(run_classic)


def _task(run: Callable[[Mapping[str, str], Slurm], int]) -> None:
    """Run a task's node side; what is missing is a stamped line in its error log."""
    from launcher.payload import complain
    from launcher.slurm import Slurm

    try:
        code = run(os.environ, Slurm())
    except KitError as error:
        complain(f"error: {error}")
        code = error.exit_code
    raise typer.Exit(code)


@app.command()
def assets(
    debug: Annotated[
        bool, typer.Option("--debug", help="Build the CPU debug corpus and tokenizer instead.")
    ] = False,
) -> None:
    """Download the tokenizer of Llama 3.1 8B (HF_TOKEN or `hf auth login`)."""
    from launcher import assets

    if debug:
        place, built = assets.debug(OUTPUTS)
        _say(f"debug corpus and tokenizer {'built' if built else 'are there'}: {place}")
    else:
        _say(f"tokenizer of {assets.REPOSITORY}: {assets.tokenizer(OUTPUTS)}")


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
    webhook: Annotated[
        str,
        typer.Option(
            envvar="TFT_WEBHOOK",
            show_default=False,
            help="Address that takes losses, recoveries and alarms. A secret: prefer the variable.",
        ),
    ] = "",
) -> None:
    """Follow a run: quorum changes, losses, recoveries, and the end."""
    from launcher import monitor
    from launcher.model import UsageError
    from launcher.outlets import Outlets
    from launcher.rundir import Outputs
    from launcher.slurm import Slurm
    from launcher.watcher import Watcher

    bare = [*([lighthouse_log] if lighthouse_log else []), *(replica_log or [])]
    for path in bare:
        if not path.is_file():
            raise UsageError(f"{path} is not a file")
    if as_json and not once:
        raise UsageError("--json needs --once")
    if bare and not once:
        raise UsageError("bare logs are read in one pass: add --once")
    if once and (events_to or prometheus):
        raise UsageError("--events-to and --prometheus are for following: leave --once out")
    slurm = Slurm()
    if bare:
        watcher = Watcher.of_files(lighthouse_log, replica_log or [])
    else:
        chosen = monitor.choose(Outputs(outputs.absolute()), run or None, slurm)
        if not once:
            outlets = Outlets(
                events_to=events_to, prometheus=prometheus, webhook=webhook, env=os.environ
            )
            if sys.stdout.isatty():
                from launcher.live import follow_live

                follow_live(chosen, slurm, outlets)
            else:
                monitor.follow(chosen, say=_say, slurm=slurm, outlets=outlets)
            return
        watcher = Watcher.of_run(chosen, slurm)
    with watcher:
        raise typer.Exit(monitor.once(watcher, say=_say, as_json=as_json))


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

    _say(str(publish(Outputs(outputs.absolute()).find(run or None), shape, output)))


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

    run_dashboard(run, entity=entity, project=project, dry_run=dry_run, env=os.environ, say=_say)


@sandbox_app.command("up")
def sandbox_up(
    nodes: Annotated[int, typer.Option(min=1, max=64, help="How many nodes.")] = 3,
    folder: FolderOption = SANDBOX,
) -> None:
    """Start Slurm with nodes worker-0…, 8 (pretended) GPUs and 128 CPUs each."""
    from launcher.sandbox import Sandbox

    sandbox = Sandbox(folder)
    started = sandbox.up(nodes)
    is_up = "up" if started else "is already up"
    _say(f"sandbox {is_up}: {nodes} nodes in {folder}. To use it in a shell:")
    _say(_exports(sandbox.environment()))


@sandbox_app.command("down")
def sandbox_down(folder: FolderOption = SANDBOX) -> None:
    """End every process of the sandbox and remove its folder."""
    from launcher.sandbox import Sandbox

    _say("sandbox down" if Sandbox(folder).down() else f"no sandbox in {folder}")


@sandbox_app.command("status")
def sandbox_status(folder: FolderOption = SANDBOX) -> None:
    """Say whether the sandbox runs, and how its nodes are; exit 1 when it does not."""
    from launcher.sandbox import Sandbox

    sandbox = Sandbox(folder)
    if not sandbox.running():
        _say(f"no sandbox is up in {folder}")
        raise typer.Exit(1)
    for node in sandbox.slurm().nodes():
        _say(f"{node.name}  {node.state}  {'' if node.reason == 'none' else node.reason}".rstrip())
    _say(_exports(sandbox.environment()))


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
) -> None:
    """Lose a node and train on: the README's steps on a sandbox, with a verdict."""
    from launcher.demo import run_demo

    raise typer.Exit(run_demo(outputs, folder, steps, say=_say))


def _exports(environment: dict[str, str]) -> str:
    return "export " + " ".join(f"{key}={shlex.quote(value)}" for key, value in environment.items())


def _say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    """Run the command line; errors of the kit are one line and an exit code, no traceback."""
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
