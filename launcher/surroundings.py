"""What the doctor reads of the machine it runs on: environment, outputs, lighthouses, tokens."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.doctor_node import installed
from launcher.environment import wandb_switch
from launcher.lighthouse import Address, LighthouseDir, alive
from launcher.lighthouse_child import listen_address
from launcher.model import BlindError, KitError, UsageError
from launcher.preflight import check_assets, load
from launcher.process import port_holder
from launcher.reach import responds
from launcher.rundir import Outputs
from launcher.target import Target
from launcher.titan import switch

#: Slurm's commands that this kit uses.
COMMANDS = ("sbatch", "squeue", "scontrol", "sinfo", "scancel", "srun")
#: A lighthouse's own port, and those of its processes.
PORTS = 9
#: Age in seconds from which on a doctor's folder is one that was left behind.
OLD = 3600.0


def requirements() -> str:
    """The pins; empty where the file is not there."""
    with contextlib.suppress(OSError):
        path = Path(__file__).resolve().parent.parent / "requirements.txt"
        return path.read_text(encoding="utf-8")
    return ""


def versions(names: Mapping[str, str]) -> dict[str, str]:
    """Versions of the packages ``names`` here; without those that are missing."""
    return installed(list(names))


def prefix() -> Path:
    """Environment of this interpreter."""
    return Path(sys.prefix).resolve()


def environment(target: Target) -> Path | None:
    """Environment of the job scripts, with links followed; None when it is not there."""
    there = (target.environment / "bin" / "activate").is_file()
    return target.environment.resolve() if there else None


def missing_commands() -> list[str]:
    return [name for name in COMMANDS if shutil.which(name) is None]


def open_files() -> int:
    """Soft limit; -1: none."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def space(folder: Path) -> tuple[str, int]:
    """Why ``folder`` cannot be written (empty: it can), and its free bytes."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".doctor-{os.getpid()}"
        probe.write_text("x")
        probe.unlink()
        return "", shutil.disk_usage(folder).free
    except OSError as error:
        return error.strerror or str(error), 0


def training(target: Target) -> tuple[dict[str, Any] | None, str]:
    """The torchtitan settings as parsed (None: not to be had), and what is wrong with the file or
    what it names (empty: nothing)."""
    try:
        settings = load(target.config)
    except UsageError as error:
        return None, str(error)
    try:
        check_assets(settings, target.extra_args, target.config)
    except UsageError as error:
        return settings, str(error)
    return settings, ""


def writes_checkpoints(target: Target, settings: dict[str, Any] | None) -> bool:
    return bool(settings and switch(settings, target.extra_args, "checkpoint", "enable"))


def hub_token() -> bool:
    """Whether there is a token for Hugging Face."""
    with contextlib.suppress(Exception):  # a damaged library is another check's finding
        from huggingface_hub import get_token

        return get_token() is not None
    return False


def wandb_key(env: Mapping[str, str]) -> bool:
    """Whether training would log to W&B by itself."""
    return wandb_switch(env) is True


@dataclass(frozen=True, slots=True, kw_only=True)
class Lighthouses:
    """What is published below the outputs."""

    free: tuple[str, ...]
    """Those that a run submitted by hand might mean."""
    stale: tuple[str, ...]
    """Those that are not up, in words."""
    up: tuple[Address, ...]

    def own_ports(self) -> list[int]:
        """Ports of this machine that they hold."""
        here = [one for one in self.up if one.host == socket.gethostname()]
        serving = [int(one.serving.rpartition(":")[2]) for one in here if one.serving]
        return [*(one.port for one in here), *serving]


def lighthouses(outputs: Outputs) -> Lighthouses:
    """Read what is published, and ask each whether it is up (seconds, for one that hangs)."""
    free, stale, up = [], [], []
    for path in sorted(outputs.lighthouses.glob("*/address.json")):
        if re.fullmatch(r"tft-\d+", path.parent.name):
            continue  # of a run of one machine, for its own processes
        try:
            address = LighthouseDir(path.parent).address()
        except KitError as error:
            stale.append(str(error))
            continue
        if address is None:
            continue
        if not address.with_run:  # that one is its run's own
            free.append(address.url)
        if problem := _down(address):
            stale.append(f"{address.url} ({problem})")
        else:
            up.append(address)
    return Lighthouses(free=tuple(free), stale=tuple(stale), up=tuple(up))


def _down(address: Address) -> str:
    """Why a lighthouse is not up; empty when it is."""
    try:
        if not alive(address):
            return f"its process {address.pid} is gone"
    except BlindError:  # it is on another machine
        if (problem := responds(address.url)) is not None:
            return f"started on {address.host}, does not answer: {problem}"
    return ""


def places(target: Target, known: Lighthouses, listening: list[int]) -> list[dict[str, Any]]:
    """What a node should be able to reach: the lighthouse if there is one, and the ports that one
    may use here."""
    chosen = [one for one in known.up if target.lighthouse in ("", one.url)]
    urls = [one.url for one in chosen] or ([target.lighthouse] if target.lighthouse else [])
    urls += [f"http://{one.serving}" for one in chosen if one.serving]
    is_here = not urls or any(one.host == socket.gethostname() for one in chosen)
    ports = listening if is_here else []
    return [
        *({"url": url} for url in urls),
        *({"host": target.lighthouse_host, "port": port} for port in ports),
    ]


def bind(target: Target) -> str:
    """Address that a lighthouse here would listen on; empty: every interface."""
    return target.lighthouse_bind or listen_address(target.lighthouse_host)


def ports(target: Target) -> range:
    return range(target.lighthouse_port, min(target.lighthouse_port + PORTS, 65536))


def holders(taken: Mapping[int, str]) -> dict[int, str]:
    """Who holds ports that could not be opened, in words; else the system's own."""
    return {port: port_holder(port) or said for port, said in taken.items()}


def old_visits(outputs: Outputs) -> list[Path]:
    """Folders of doctors that did not clean up."""
    found = []
    for visit in outputs.visits():
        with contextlib.suppress(OSError):
            if time.time() - visit.path.stat().st_mtime > OLD:
                found.append(visit.path)
    return found
