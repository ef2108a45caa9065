"""The node side of the doctor's jobs (``slurm/doctor.sbatch``): looks, and writes what it sees.

It judges nothing. What it cannot read is left out, or said in words.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launcher.classic import meeting_point
from launcher.command import Torchrun
from launcher.config import Site
from launcher.environment import common_environment
from launcher.files import read_json, replace
from launcher.listener import heard
from launcher.model import KitError
from launcher.process import run
from launcher.reach import responds
from launcher.rundir import Visit
from launcher.slurm import Slurm

#: Seconds that a node waits for the login node's answer: a minute is the longest for which a
#: network file system keeps an old file by default (NFS's acregmax).
PING_SECONDS = 65.0
#: Seconds for one connection to the login node.
CONNECT_SECONDS = 3.0
#: Seconds for the imports, from a file system that has not seen them yet.
IMPORT_SECONDS = 90.0
#: Seconds for nvidia-smi, whose driver may have to wake up first.
SMI_SECONDS = 20.0
#: Seconds for the all-reduce, imports and meeting included.
ALLREDUCE_SECONDS = 150.0

DRIVER = Path("/proc/driver/nvidia/version")
_IMPORTS = """
import json, sys
from launcher.train import device
if sys.argv[1] == "cpu":
    device.prepare("cpu")
import launcher.train.trainer, torch, torchft
print("found " + json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda}))
"""
_SMI = "index,name,driver_version,memory.total,temperature.gpu"


def main(words: Sequence[str]) -> int:
    """``node FOLDER`` or ``deep FOLDER``; returns the task's exit code."""
    mode, folder = words
    visit = Visit(Path(folder))
    asked = read_json(visit.asked)
    if asked is None:
        print(f"{socket.gethostname()} does not see {visit.asked}", file=sys.stderr)
        return 1
    if mode == "deep":
        return _deep(visit, asked, os.environ)
    replace(visit.arrived, json.dumps({"token": asked["token"], "host": _host()}) + "\n")
    _answer(visit)
    replace(visit.findings, json.dumps(look(asked)) + "\n")
    return 0


def _host() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _answer(visit: Visit) -> None:
    """Wait until the login node's file changes, and say so, with our clock."""
    deadline = time.monotonic() + PING_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(KitError):  # just being written
            if (read_json(visit.asked) or {}).get("ping"):
                replace(visit.pong, json.dumps({"time": time.time()}) + "\n")
                return
        time.sleep(0.02)


def look(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that one node tells of itself; ``asked`` is what the login node wrote."""
    return {
        "host": _host(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": installed(asked["packages"]),
        "imports": imports(str(asked["device"])),
        "interfaces": interfaces(),
        "reached": reach(asked["reach"], asked["token"]),
        "driver": driver(),
        "limits": limits(),
        "shm_bytes": _total("/dev/shm"),  # noqa: S108
    }


def installed(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those of ``packages`` that this environment has."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def imports(device: str) -> dict[str, Any]:
    """Whether what a rank imports can be imported here, and how long it takes (seconds)."""
    begun = time.monotonic()
    try:
        done = run([sys.executable, "-c", _IMPORTS, device], IMPORT_SECONDS)
    except KitError as error:
        return {"error": str(error)}
    match = re.search(r"^found (.*)$", done.out, re.MULTILINE)
    if done.code != 0 or match is None:
        lines = (done.err or done.out).strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {done.code}"}
    return {**json.loads(match[1]), "seconds": time.monotonic() - begun}


def interfaces() -> dict[str, list[str]]:
    """Network interfaces that are up, with their addresses."""
    import psutil

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [one.address.partition("%")[0] for one in addresses if one.family in families]
        for name, addresses in psutil.net_if_addrs().items()
        if name in up
    }


def reach(places: Sequence[Mapping[str, Any]], token: str) -> list[dict[str, Any]]:
    """Try every place; each comes back with ``error`` (empty: reached) and ``seconds``."""

    def try_one(place: Mapping[str, Any]) -> dict[str, Any]:
        begun = time.monotonic()
        if place.get("url"):
            error = responds(str(place["url"])) or ""
        else:
            error = heard(str(place["host"]), int(place["port"]), token, CONNECT_SECONDS)
        return {**place, "error": error, "seconds": time.monotonic() - begun}

    if not places:
        return []
    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(try_one, places))


def driver() -> str:
    """Version of the NVIDIA driver; empty where there is none. Needs no GPU of the job."""
    try:
        match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", DRIVER.read_text())
    except OSError:
        return ""
    return match[1] if match else ""


def limits() -> dict[str, int]:
    """Soft limits of this process; -1: none."""
    names = {"nofile": "RLIMIT_NOFILE", "nproc": "RLIMIT_NPROC", "memlock": "RLIMIT_MEMLOCK"}
    return {name: resource.getrlimit(getattr(resource, what))[0] for name, what in names.items()}


def _total(folder: str) -> int | None:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return None


def _deep(visit: Visit, asked: Mapping[str, Any], env: Mapping[str, str]) -> int:
    """This node's part of the all-reduce."""
    node_rank, nodes = int(env["SLURM_NODEID"]), int(env["SLURM_NNODES"])
    site = Site.from_environment(env)
    ranks = visit.ranks(node_rank)
    ranks.mkdir(parents=True, exist_ok=True)
    part: dict[str, Any] = {"host": _host(), "gpus": gpus() if site.device == "cuda" else []}
    torchrun = Torchrun(
        ranks_per_node=int(asked["ranks"]),
        log_dir=ranks,
        node_address=site.node_address,
        nodes=nodes,
        node_rank=node_rank,
        master=meeting_point(env, Slurm(), int(env["SLURM_JOB_ID"])) if nodes > 1 else "",
        entry="launcher.train.allreduce",
    )
    failures = ranks / "failures.json"
    child = {**common_environment(env, site), "TFT_FAILURES": str(failures)}
    code = _limited(torchrun.argv([str(visit.allreduce)]), child)
    part |= {"code": code, "failure": _failure(failures) if code else ""}
    replace(visit.part(node_rank), json.dumps(part) + "\n")
    return code


def _limited(argv: Sequence[str], env: Mapping[str, str]) -> int:
    """Run ``argv`` for at most ``ALLREDUCE_SECONDS``; 124 when it took longer."""
    with subprocess.Popen(argv, env=dict(env), start_new_session=True) as process:
        try:
            return process.wait(ALLREDUCE_SECONDS)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _failure(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
        first = json.loads(path.read_text(encoding="utf-8"))[0]
        return f"rank {first['rank']}: {first['message'] or 'exit code ' + str(first['exit_code'])}"
    return ""


def gpus() -> list[str] | str:
    """A line of nvidia-smi for each GPU of this job; a text says why there is none."""
    try:
        done = run(["nvidia-smi", f"--query-gpu={_SMI}", "--format=csv,noheader"], SMI_SECONDS)
    except KitError as error:
        return str(error)
    if done.code != 0:
        return (done.out or done.err).strip()[:200]
    return [line.strip() for line in done.out.splitlines() if line.strip()]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (KitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
