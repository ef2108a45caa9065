"""The command line of the lighthouse. No logic here."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.model import UsageError

if TYPE_CHECKING:
    from launcher.lighthouse import LighthouseDir

app = typer.Typer(no_args_is_help=True, help="The lighthouse on the login node.")

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
NameOption = Annotated[
    str, typer.Option("--name", envvar="TFT_LIGHTHOUSE_NAME", help="Its name, where it has one.")
]
OUTPUTS = Path("outputs")


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


@app.command("up")
def lighthouse_up(
    outputs: OutputsOption = OUTPUTS,
    host: HostOption = "",
    port: PortOption = 29510,
    bind: Annotated[
        str,
        typer.Option(
            envvar="TFT_LIGHTHOUSE_BIND",
            help="Address to listen on; default: --host's where that is a private one of this "
            "machine, else every interface.",
        ),
    ] = "",
    min_replicas: Annotated[
        int, typer.Option(min=1, help="Replica groups below which nobody trains.")
    ] = 1,
    heartbeat_timeout_ms: Annotated[
        int | None,
        typer.Option(min=200, help="Silence after which a replica group counts as lost."),
    ] = None,
    join_timeout_ms: Annotated[
        int | None,
        typer.Option(min=100, help="How long a quorum waits for a group that is coming up."),
    ] = None,
    quorum_tick_ms: Annotated[
        int | None, typer.Option(min=10, help="How often it decides.")
    ] = None,
    timeouts: Annotated[
        str,
        typer.Option(
            envvar="TFT_TIMEOUTS", help="default, or fast: what the three above are if not given."
        ),
    ] = "default",
    name: Annotated[
        str,
        typer.Option(
            envvar="TFT_LIGHTHOUSE_NAME",
            help="Name under which runs find it, also after it has moved to another host; "
            "default: <host>-<port>.",
        ),
    ] = "",
    method: Annotated[
        str,
        typer.Option(
            envvar="TFT_METHOD",
            help="Of the run that it is to serve: groups that train by themselves between two syncs "
            "are waited for longer.",
        ),
    ] = "",
    act: Annotated[
        bool,
        typer.Option(
            help="Look after the run that it serves: cut Slurm's delays, restart hung groups."
        ),
    ] = True,
    with_run: Annotated[
        bool, typer.Option("--with-run", help="End when the run that it serves is over.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Run in the background.")] = False,
) -> None:
    """Start the lighthouse and publish its address; Ctrl-C or `down` ends it."""
    import socket

    from launcher.lighthouse_child import LighthouseSettings, listen_address
    from launcher.methods import METHODS
    from launcher.rundir import Outputs
    from launcher.slurm import Slurm
    from launcher.supervisor import Supervisor, start_detached
    from launcher.timeouts import PROFILES

    if timeouts not in PROFILES:
        raise UsageError(f"--timeouts must be one of {', '.join(PROFILES)}, not {timeouts!r}")
    if method and method not in METHODS:
        raise UsageError(f"--method must be one of {', '.join(METHODS)}, not {method!r}")
    chosen = PROFILES[timeouts]
    patient = METHODS[method].join_timeout_ms if method and METHODS[method].semi_sync else 0
    if with_run and not act:
        raise UsageError("--with-run needs the guardian, which knows when a run is over")
    host_name = host or socket.gethostname()
    settings = LighthouseSettings(
        host=host_name,
        port=port,
        bind=bind or listen_address(host_name),
        min_replicas=min_replicas,
        heartbeat_timeout_ms=heartbeat_timeout_ms or chosen.heartbeat_timeout_ms,
        join_timeout_ms=join_timeout_ms or patient or chosen.join_timeout_ms,
        quorum_tick_ms=quorum_tick_ms or chosen.quorum_tick_ms,
    )
    place = Outputs(outputs.absolute())
    folder = _lighthouse_folder(outputs, host, port, name)
    if not detach:
        # On the side: Slurm may take its time, and a lighthouse is waited for.
        threading.Thread(target=folder.release_if_ended, args=(Slurm(),), daemon=True).start()
        monitor = [sys.executable, "-m", "launcher", "monitor", f"--outputs={place.root}"]
        guardian = [*monitor, "--act", "--with-parent"]
        Supervisor(
            settings, folder, place, guardian=guardian if act else (), with_run=with_run, say=say
        ).run()
        return
    argv = [sys.executable, "-m", "launcher", *(a for a in sys.argv[1:] if a != "--detach")]
    address = start_detached(argv, folder)
    say(f"lighthouse up at {address.url} (pid {address.pid})")


@app.command("down")
def lighthouse_down(
    outputs: OutputsOption = OUTPUTS,
    host: HostOption = "",
    port: PortOption = 29510,
    name: NameOption = "",
) -> None:
    """End the lighthouse that `up` started on this machine."""
    from launcher.supervisor import stop

    folder = _lighthouse_folder(outputs, host, port, name)
    say("lighthouse down" if stop(folder) else f"no lighthouse is up at {folder.label}")


@app.command("status")
def lighthouse_status(
    outputs: OutputsOption = OUTPUTS,
    host: HostOption = "",
    port: PortOption = 29510,
    name: NameOption = "",
) -> None:
    """Say whether the lighthouse is up, answers, and which run it serves; exit 1 when not."""
    from launcher.reach import responds
    from launcher.rundir import Outputs
    from launcher.terms import Terms

    folder = _lighthouse_folder(outputs, host, port, name)
    address = folder.address()
    if address is None:
        say(f"no lighthouse is up at {folder.label}")
        raise typer.Exit(1)
    problem = responds(address.url)
    run = folder.claimed_by()
    say(
        f"lighthouse {address.url} (pid {address.pid} on {address.host}, {address.user}): "
        + ("answers" if problem is None else f"does not answer: {problem}")
        + (f"; claimed by run tft-{run}" if run is not None else "; serves no run yet")
    )
    if run is not None:
        term = Terms(Outputs(outputs.absolute()).run_of_array(run).terms).newest()
        if term.serving:
            say(f"{term.by} stands in for it at {term.serving}")
    if problem is not None:
        raise typer.Exit(1)


def _lighthouse_folder(outputs: Path, host: str, port: int, name: str = "") -> LighthouseDir:
    import socket

    from launcher.lighthouse import LighthouseDir
    from launcher.rundir import Outputs

    place = Outputs(outputs.absolute())
    if name:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise UsageError(f"--name {name!r}: a name is letters, digits, '.', '_' and '-'")
        return LighthouseDir(place.lighthouses / name)
    return LighthouseDir.of(place, f"http://{host or socket.gethostname()}:{port}")
