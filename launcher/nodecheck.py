"""Is this node fit to train on? Asked before every attempt; seconds, not minutes.

A node that is not is left at once, named, and left out of the group's next attempt.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.config import Site
from launcher.model import KitError
from launcher.restarts import UNFIT

#: Bytes of memory below which a start is hopeless (interpreter and torch of one rank).
MEMORY_PER_RANK = 1 << 30
#: Seconds by which this node's clock may differ from the shared file system's.
CLOCK_SKEW = 5.0
#: Seconds that the site's own check may take.
SITE_SECONDS = 60.0
#: The site's own check, from the root of the repository; it is run when it is there.
SITE_SCRIPT = Path("slurm/node-check.sh")


class UnfitNodeError(KitError):
    """This node cannot train now; another may."""


class SharedFolderError(KitError):
    """The run's folder cannot be written: no node's fault, and it may pass."""


def check(site: Site, folder: Path, ranks: int, *, manager_port: int = 0, nvml: Any = None) -> None:
    """Check this node for a start of ``ranks`` ranks that write below ``folder``.

    Args:
        manager_port: port that torchft's manager will listen on; 0: any.
        nvml: stands in for NVIDIA's library in tests.

    Raises:
        UnfitNodeError: names everything that is wrong.
        SharedFolderError: the run's folder cannot be written.
    """
    checks: list[Callable[[], Iterator[str]]] = [
        lambda: _memory(ranks),
        lambda: _shared_folder(folder),
        lambda: _port(manager_port),
        _site_script,
    ]
    if site.device == "cuda":
        checks.insert(0, lambda: _gpus(ranks, nvml))
    problems = [problem for one in checks for problem in one()]
    if problems:
        raise UnfitNodeError("; ".join(problems))


def problem(site: Site, folder: Path, ranks: int, *, manager_port: int = 0) -> str:
    """Why a group cannot start on this node, as it is told; empty when it can."""
    try:
        check(site, folder, ranks, manager_port=manager_port)
    except SharedFolderError as error:
        return str(error)
    except UnfitNodeError as error:
        return f"{UNFIT}{error}"
    return ""


def _gpus(ranks: int, nvml: Any) -> Iterator[str]:
    """Too few GPUs, memory errors that cannot be corrected, or a GPU that does not answer."""
    try:
        if nvml is None:
            import pynvml

            nvml = pynvml
        nvml.nvmlInit()
    except Exception as error:
        yield f"the NVIDIA driver does not answer ({error})"
        return
    try:
        count = nvml.nvmlDeviceGetCount()
        if count < ranks:
            yield f"{count} GPUs are seen, and {ranks} are needed"
        for index in range(count):
            yield from _gpu(nvml, index)
    except Exception as error:
        yield f"the NVIDIA driver gives an error ({error})"
    finally:
        with contextlib.suppress(Exception):
            nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> Iterator[str]:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        nvml.nvmlDeviceGetMemoryInfo(handle)
    except Exception as error:
        yield f"GPU {index} does not answer ({error})"
        return
    with contextlib.suppress(Exception):  # not every GPU counts them
        errors = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
        if errors:
            yield f"GPU {index} has had {errors} uncorrected memory errors since its driver started"
    with contextlib.suppress(Exception):
        if nvml.nvmlDeviceGetRetiredPagesPendingStatus(handle):
            yield f"GPU {index} has memory pages to retire: it needs a reset"


def _memory(ranks: int) -> Iterator[str]:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
                if available < MEMORY_PER_RANK * ranks:
                    yield (
                        f"{available / 2**30:.1f} GiB of memory are free, and {ranks} ranks need "
                        f"at least {MEMORY_PER_RANK * ranks / 2**30:.0f}"
                    )


def _shared_folder(folder: Path) -> Iterator[str]:
    """The run's folder can be written, and its clock is ours."""
    probe = folder / f".check-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.write_text("x")
        skew = probe.stat().st_mtime - time.time()
    except OSError as error:
        raise SharedFolderError(f"{folder} cannot be written ({error.strerror})") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    if abs(skew) > CLOCK_SKEW:
        yield f"its clock is {abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} the file system's"


def _port(port: int) -> Iterator[str]:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
    except OSError as error:
        yield f"port {port or '(any)'} cannot be opened ({error.strerror})"


def _site_script() -> Iterator[str]:
    if not SITE_SCRIPT.is_file():
        return
    try:
        done = subprocess.run(
            ["bash", str(SITE_SCRIPT)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SITE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        yield f"{SITE_SCRIPT} did not end within {SITE_SECONDS:.0f} s"
        return
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()
        yield f"{SITE_SCRIPT} says: {lines[-1] if lines else f'exit code {done.returncode}'}"
