"""A real Slurm on one machine: munged, slurmctld and several slurmd, in one folder.

Every part runs from that folder, with its own sockets, keys and free ports, so that a
Slurm or munge already on the machine is never touched. For demos, drills and tests; a
real job script with eight GPUs and 128 CPUs schedules on it as on a cluster.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from launcher import namespaces, slurm_conf
from launcher.lighthouse import wait_until
from launcher.model import KitError, UsageError
from launcher.namespaces import INTERFACE, Network
from launcher.packages import NETWORK_PROGRAMS, PACKAGES, PROGRAMS
from launcher.process import run, start_time, still_runs
from launcher.slurm import Slurm
from launcher.slurm_conf import GPUS, REQUEUE_DELAY

#: Unix socket paths are limited to 108 bytes: the folder's own path must be short.
DEFAULT_FOLDER = Path("/run/tft-sandbox")
#: Seconds for each daemon to come up, and to go down.
START_SECONDS, STOP_SECONDS = 15.0, 8.0
#: File that marks a folder as a sandbox's own.
MARK = ".tft-sandbox"
#: Names of the sandbox's own processes.
PARTS = frozenset({"munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd"})
#: Seconds that jobs get to end by themselves when the sandbox goes down.
JOB_SECONDS = 2.0

#: What a shell sets to use this kit in the sandbox: a CPU model in place of the GPUs'.
JOB_SETTINGS = {
    "TFT_CONFIG": "configs/debug-cpu.toml",
    "TFT_DEVICE": "cpu",
    "TFT_RANKS_PER_NODE": "2",
    "TFT_INTERFACE": "lo",
    "TFT_NODE_ADDRESS": "127.0.0.1",
    "TFT_LIGHTHOUSE_HOST": "127.0.0.1",
    "TFT_WEIGHT_HASH_EVERY": "1",
}
#: What of it is different where every node has a network and a host name of its own.
NETWORK_SETTINGS = {"TFT_INTERFACE": INTERFACE, "TFT_NODE_ADDRESS": ""}


@dataclass(frozen=True, slots=True)
class Daemon:
    """One program of the sandbox, by pid and start time (ids are reused)."""

    name: str
    pid: int
    started: float

    def alive(self) -> bool:
        return still_runs(self.pid, self.started)


class Sandbox:
    """The sandbox in ``folder``."""

    def __init__(self, folder: Path = DEFAULT_FOLDER) -> None:
        self.folder = folder.absolute()
        self._children: list[subprocess.Popen[bytes]] = []
        """Daemons that this very process started, to be waited for when they end."""

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def environment(self) -> dict[str, str]:
        """What to set in a shell so that Slurm's commands and the kit use this sandbox."""
        network = self._network()
        if network is None:
            return {"SLURM_CONF": str(self.conf), **JOB_SETTINGS}
        login = dict.fromkeys(("TFT_LIGHTHOUSE_HOST", "TFT_LIGHTHOUSE_BIND"), network.login)
        return {"SLURM_CONF": str(self.conf), **JOB_SETTINGS, **NETWORK_SETTINGS, **login}

    def slurm(self) -> Slurm:
        """Slurm's commands, aimed at this sandbox whatever the environment says."""
        setting = f"SLURM_CONF={self.conf}"
        return Slurm(lambda argv: run(["env", setting, *argv]))

    def up(
        self, nodes: int = 3, *, network: bool = False, requeue_delay: int = REQUEUE_DELAY
    ) -> bool:
        """Bring the sandbox up; False when it was up already, with as many nodes.

        With ``network`` every node has a network and a host name of its own, and can be `cut`.

        Raises:
            UsageError: not root, a program is missing, or it is up and of another kind.
            KitError: a daemon does not come up; the message ends with its log's last words.
        """
        self._require(nodes, network)
        if self.folder.exists():
            is_network = self._network() is not None
            if self.running() and (self._size(), is_network) == (nodes, network):
                return False
            if self.running():
                raise UsageError(
                    f"the sandbox in {self.folder} is up with {self._size()} nodes "
                    f"{'with' if is_network else 'without'} networks of their own, which is not "
                    "what you ask for: run `python -m launcher sandbox down` first"
                )
            self.down()
        try:
            self._start(nodes, network, requeue_delay)
        except BaseException:
            self.down()
            raise
        return True

    def cut(self, node: str) -> None:
        """Cut ``node`` off the network, as if its cable were pulled; everything on it goes on.

        Raises:
            UsageError: there is no such node, or nodes have no network of their own.
        """
        self._network_of(node).cut(node)

    def heal(self, node: str) -> None:
        """Connect ``node`` again; the reverse of `cut`, and raises the same."""
        self._network_of(node).heal(node)

    def crash(self, node: str) -> None:
        """Kill every process of ``node`` at once, its slurmd too, as if its power were cut."""
        self._require_node(node)
        for daemon in self._daemons():
            if daemon.name == node and daemon.alive():
                os.kill(daemon.pid, signal.SIGKILL)
        doomed: dict[int, psutil.Process] = {}
        for process in self._job_processes():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("SLURMD_NODENAME") == node:
                    steps = [p for p in process.parents() if p.name() == "slurmstepd"]
                    doomed |= {one.pid: one for one in (*steps, process)}
        for process in doomed.values():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def restart(self, node: str) -> None:
        """Start slurmd of a node that has crashed; nothing when it runs."""
        self._require_node(node)
        if not any(daemon.name == node and daemon.alive() for daemon in self._daemons()):
            self._launch_node(node, self._network())

    def running(self) -> bool:
        daemons = self._daemons()
        return self._size() > 0 and bool(daemons) and all(d.alive() for d in daemons)

    def down(self) -> bool:
        """End every process of the sandbox and remove its folder; False when there was none.

        Jobs first, as a controller that is asked nicely ends them cleanly; then the
        daemons; then whatever a job left behind.
        """
        if not self.folder.exists():
            return False
        self._require_ours()
        if self.running():
            with contextlib.suppress(KitError):
                run(["env", f"SLURM_CONF={self.conf}", "scancel", "--user", getpass.getuser()], 5.0)
            # slurmd waits for its jobs before it ends; they get a moment, then no choice.
            wait_until(lambda: not any(self._job_processes()), JOB_SECONDS)
        self._kill_job_processes()
        # The nodes first: they report their jobs' end, and wait when nobody takes the report.
        for name in ("worker", "slurmctld", "munged"):
            for daemon in self._daemons():
                if daemon.name.startswith(name):
                    _end(daemon)
        self._kill_job_processes(PARTS)
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(STOP_SECONDS)
        self._children.clear()
        namespaces.remove(self._net)
        shutil.rmtree(self.folder, ignore_errors=True)
        return True

    # -- starting ---------------------------------------------------------------

    def _require(self, nodes: int, network: bool) -> None:
        if os.geteuid() != 0:
            raise UsageError("the sandbox starts Slurm's daemons, which needs root: use sudo")
        programs = [*PROGRAMS, *(NETWORK_PROGRAMS if network else ())]
        missing = [program for program in programs if shutil.which(program) is None]
        if missing:
            raise UsageError(
                f"not installed: {', '.join(missing)}; `python -m launcher sandbox install` "
                f"installs {' '.join(PACKAGES)}"
            )
        if not 1 <= nodes <= 64:
            raise UsageError(f"a sandbox has 1 to 64 nodes, not {nodes}")
        if not re.fullmatch(r"[\w./-]+", str(self.folder)):
            raise UsageError(
                f"{self.folder}: Slurm's configuration takes plain paths only; choose a folder of "
                "letters, digits, '.', '_' and '-'"
            )
        if self.folder.exists():
            self._require_ours()
        if len(str(self.folder)) > 60:
            raise UsageError(
                f"{self.folder} is too long a path for the sandbox's sockets: choose a shorter one"
            )
        if network:
            namespaces.require()

    def _require_ours(self) -> None:
        """Only a folder that ``up`` made is ever used or removed."""
        empty = self.folder.is_dir() and not any(self.folder.iterdir())
        if not empty and not (self.folder / MARK).is_file():
            raise UsageError(
                f"{self.folder} is there and is no sandbox's: choose a folder that does not exist"
            )

    def _start(self, nodes: int, wants_network: bool, requeue_delay: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / MARK).write_text("made by `python -m launcher sandbox up`\n")
        os.chmod(self.folder, 0o755)  # noqa: S103 - munge checks that others cannot write
        (self.folder / "daemons.json").write_text("[]")
        for name in ("munge", "ctld", "log", "gpus"):
            (self.folder / name).mkdir(exist_ok=True)
        names = _names(nodes)
        network = namespaces.create(self._net, names) if wants_network else None
        self._make_gpus()
        self._start_munge()
        slurm_conf.write(self.folder, names, network, self._munge_socket, requeue_delay)
        controller = ["slurmctld", "-D", "-i"]
        self._launch("slurmctld", network.at_login(controller) if network else controller)
        for name in names:
            (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
            self._launch_node(name, network)
        self._wait_until_idle(nodes)
        # Written last: a sandbox without it was cut short while it came up.
        kind = {"nodes": nodes, "network": network.subnet if network else None}
        (self.folder / "nodes.json").write_text(json.dumps(kind))

    def _make_gpus(self) -> None:
        for index in range(GPUS):
            device = self.folder / "gpus" / f"gpu{index}"
            if not device.exists():
                # gres.conf wants character devices; these are further /dev/nulls.
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        os.chmod(folder, 0o755)  # noqa: S103
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        paths = [f"--{kind}={folder / kind}" for kind in ("pid-file", "seed-file")]
        argv = ["munged", "--foreground", f"--key-file={key}", f"--socket={self._munge_socket}"]
        self._launch("munged", [*argv, *paths, "--num-threads=2", "--force"])
        if not wait_until(self._munge_socket.exists, START_SECONDS):
            raise self._did_not_start("munged")

    @property
    def _munge_socket(self) -> Path:
        return self.folder / "munge" / "socket"

    def _launch(self, name: str, argv: list[str]) -> None:
        with (self.folder / "log" / f"{name}.start").open("wb") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_daemon_environment(self.conf),
                cwd="/",
                start_new_session=True,
            )
        self._children.append(process)
        daemon = Daemon(name, process.pid, start_time(process.pid))
        records = [*(one for one in self._daemons() if one.name != name), daemon]
        text = json.dumps([[d.name, d.pid, d.started] for d in records])
        (self.folder / "daemons.json").write_text(text)
        if wait_until(lambda: process.poll() is not None, 0.05):
            raise self._did_not_start(name)

    def _launch_node(self, name: str, network: Network | None) -> None:
        slurmd = ["slurmd", "-D", "-N", name]
        self._launch(name, network.inside(name, slurmd) if network else slurmd)

    def _wait_until_idle(self, nodes: int) -> None:
        slurm = self.slurm()

        def idle() -> bool:
            with contextlib.suppress(KitError):
                return sum(node.state == "idle" for node in slurm.nodes()) == nodes
            return False

        if not wait_until(idle, START_SECONDS):
            raise self._did_not_start("slurmctld")

    def _did_not_start(self, name: str) -> KitError:
        words = []
        for path in (self.folder / "log").glob(f"{name}.*"):
            words += path.read_text(errors="replace").splitlines()[-5:]
        return KitError(
            f"{name} of the sandbox did not come up: " + " | ".join(words or ["no log"])
        )

    # -- looking ----------------------------------------------------------------

    def _daemons(self) -> list[Daemon]:
        try:
            records = json.loads((self.folder / "daemons.json").read_text())
            return [Daemon(name, pid, started) for name, pid, started in records]
        except (OSError, ValueError, TypeError):
            return []

    @property
    def _net(self) -> Path:
        return self.folder / "net"

    def _kind(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.folder / "nodes.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def _size(self) -> int:
        return int(self._kind().get("nodes", 0))

    def _network(self) -> Network | None:
        subnet = self._kind().get("network")
        return Network(self._net, subnet) if subnet else None

    def _network_of(self, node: str) -> Network:
        network = self._network()
        if self._size() and network is None:
            raise UsageError(
                f"the nodes of the sandbox in {self.folder} share this machine's network: only "
                "those of `python -m launcher sandbox up --network` can be cut off"
            )
        self._require_node(node)
        assert network is not None
        return network

    def _require_node(self, node: str) -> None:
        if not self._size():
            raise UsageError(f"no sandbox is up in {self.folder}")
        if node not in (names := _names(self._size())):
            raise UsageError(f"the sandbox has no node {node!r}: it has {', '.join(names)}")

    def _kill_job_processes(self, parts: frozenset[str] = frozenset({"slurmstepd"})) -> None:
        for process in self._job_processes(parts):
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _job_processes(self, parts: frozenset[str] = frozenset()) -> Iterator[psutil.Process]:
        """Processes of this sandbox's jobs, and its own of the names ``parts``: known by the
        environment that they were given."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid == os.getpid():
                    continue
                env = process.environ()
                ours = env.get("SLURM_CONF") == str(self.conf)
                if ours and ("SLURM_JOB_ID" in env or process.name() in parts):
                    yield process


def _names(nodes: int) -> list[str]:
    return [f"worker-{number}" for number in range(nodes)]


def _daemon_environment(conf: Path) -> dict[str, str]:
    """A clean environment: nothing of the caller's Slurm job or shell leaks into nodes."""
    kept = {key: os.environ[key] for key in ("PATH", "LANG", "HOME", "TZ") if key in os.environ}
    sbin = "/usr/local/sbin:/usr/sbin:/sbin"
    return {**kept, "PATH": f"{kept.get('PATH', '/usr/bin:/bin')}:{sbin}", "SLURM_CONF": str(conf)}


def _end(daemon: Daemon) -> None:
    """TERM, then KILL; only when the process is still the one we started."""
    if not daemon.alive():
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(daemon.pid, signal.SIGTERM)
    if not wait_until(lambda: not daemon.alive(), STOP_SECONDS):
        with contextlib.suppress(ProcessLookupError):
            os.kill(daemon.pid, signal.SIGKILL)
        wait_until(lambda: not daemon.alive(), STOP_SECONDS)
