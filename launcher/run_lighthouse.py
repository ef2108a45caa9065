"""The lighthouse of a submission: the one that was named, a free one, or one of the run's own."""

from __future__ import annotations

import contextlib
import getpass
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launcher.interrupts import signals_ignored
from launcher.lighthouse import Address, LighthouseDir, alive
from launcher.lighthouse_child import PORTS
from launcher.methods import Method, lighthouse_problem
from launcher.model import BlindError, KitError, UsageError
from launcher.process import port_holder
from launcher.reach import require_answer, responds, split
from launcher.rundir import Outputs
from launcher.settings import ports
from launcher.slurm import Slurm
from launcher.supervisor import start_detached, stop
from launcher.timeouts import PROFILES


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a run needs."""

    url: str
    """The one that was named; empty: any that fits."""
    host: str
    """Address of this machine for the nodes."""
    ports: str
    """Range of ports for new ones."""
    command: Sequence[str]
    """What starts a new one, without its host and port."""
    method: Method
    groups: int
    host_said: bool = False
    """Whether ``host`` was asked for."""
    timeouts: str = ""
    """Of ``timeouts.PROFILES``; empty: any."""

    def misfit(self, address: Address) -> str:
        """Why that lighthouse cannot serve the run; empty when it can."""
        return lighthouse_problem(self.method, self.groups, address.join_timeout_ms)

    def as_said(self, address: Address) -> bool:
        """Whether that lighthouse is what a new one would be, as far as that was asked for."""
        patience = PROFILES[self.timeouts].heartbeat_timeout_ms if self.timeouts else None
        return (not self.host_said or split(address.url)[0] == self.host) and (
            patience in (None, address.heartbeat_timeout_ms)
        )


def find_or_start(
    wanted: Wanted,
    outputs: Outputs,
    env: Mapping[str, str],
    slurm: Slurm,
    undo: contextlib.ExitStack,
    say: Callable[[str], None],
) -> tuple[str, LighthouseDir]:
    """URL and folder of a lighthouse that serves nobody.

    Args:
        undo: gets what ends one that was started here.

    Raises:
        UsageError: the one that was named does not fit.
        KitError: none could be started.
    """
    folders = [
        LighthouseDir(path.parent) for path in sorted(outputs.lighthouses.glob("*/address.json"))
    ]
    published = [
        (folder, address) for folder in folders if (address := _address(folder)) is not None
    ]
    if wanted.url:
        require_answer(wanted.url)
        for folder, address in published:
            if address.url == wanted.url:
                if problem := wanted.misfit(address):
                    raise UsageError(problem)
                return wanted.url, folder
        return wanted.url, LighthouseDir.of(outputs, wanted.url)
    for folder, address in published:
        # (One that was started for a run ends with that.)
        fits = not address.with_run and wanted.as_said(address) and not wanted.misfit(address)
        if fits and _is_free(folder, address, slurm):
            say(f"lighthouse {address.url} is up, and serves no run")
            return address.url, folder
    return _start(wanted, outputs, env, slurm, undo, say)


def _address(folder: LighthouseDir) -> Address | None:
    with contextlib.suppress(KitError):
        return folder.address()
    return None


def _is_free(folder: LighthouseDir, address: Address, slurm: Slurm) -> bool:
    """Whether a lighthouse of this user's answers and serves no run."""
    if address.user != getpass.getuser():
        return False
    try:
        if not alive(address):
            return False
    except BlindError:
        pass  # of another machine, as a job perhaps: whether it answers is all that can be seen
    folder.release_if_ended(slurm)
    return folder.claimed_by() is None and responds(address.url) is None


def _start(
    wanted: Wanted,
    outputs: Outputs,
    env: Mapping[str, str],
    slurm: Slurm,
    undo: contextlib.ExitStack,
    say: Callable[[str], None],
) -> tuple[str, LighthouseDir]:
    first, last = ports(wanted.ports)
    problem = "every port is taken"
    for port in range(first, last - PORTS + 1, PORTS + 1):
        if port_holder(port):
            continue
        folder = LighthouseDir.of(outputs, f"http://{wanted.host}:{port}")
        if not _let_go(folder, slurm):
            continue
        words = [word for word in wanted.command if word != "--detach"]
        argv = [sys.executable, *words[1:], f"--host={wanted.host}", f"--port={port}"]
        try:
            address = start_detached(argv, folder, env)
        except UsageError as error:
            problem = str(error)  # somebody was faster
            continue
        undo.callback(_stop, folder, say)
        say(f"lighthouse up at {address.url} (pid {address.pid}); it ends with the run")
        return address.url, folder
    raise KitError(f"no lighthouse could be started on ports {wanted.ports}: {problem}")


def _let_go(folder: LighthouseDir, slurm: Slurm) -> bool:
    """Forget the run that a lighthouse of that place served before; False while it lives."""
    folder.release_if_ended(slurm)
    try:
        return folder.claimed_by() is None
    except KitError:
        return False


def _stop(folder: LighthouseDir, say: Callable[[str], None]) -> None:
    with signals_ignored():
        try:
            stop(folder)
            say("its lighthouse is ended again")
        except KitError as error:
            say(f"its lighthouse could NOT be ended: {error}")
