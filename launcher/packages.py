"""Installs Slurm and munge for the sandbox, where they are missing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.model import KitError, UsageError
from launcher.process import run

#: Debian's and Ubuntu's packages of the parts.
PACKAGES = (
    "slurmctld",
    "slurmd",
    "slurm-client",
    "munge",
    "iproute2",
    "util-linux",
    "mount",
    "hostname",
)
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "sinfo", "scancel")
#: Only needed for nodes with a network of their own.
NETWORK_PROGRAMS = ("ip", "unshare", "nsenter", "mount", "umount", "hostname")


def install() -> None:
    """Install Slurm and munge from the distribution's packages, without starting them.

    Raises:
        UsageError: not root, or not a Debian-like system.
        KitError: apt failed; the message ends with its last words.
    """
    if all(shutil.which(program) for program in (*PROGRAMS, *NETWORK_PROGRAMS)):
        return
    if shutil.which("apt-get") is None:
        raise UsageError(f"no apt-get here: install {' '.join(PACKAGES)} (or their like) by hand")
    if os.geteuid() != 0:
        raise UsageError(
            f"installing packages needs root: sudo apt-get install {' '.join(PACKAGES)}"
        )
    environment = ["env", "DEBIAN_FRONTEND=noninteractive"]
    with _services_held_back():
        run([*environment, "apt-get", "update", "-q"], 300.0)
        flags = ["install", "-y", "-q", "--no-install-recommends"]
        done = run([*environment, "apt-get", *flags, *PACKAGES], 600.0)
    if done.code != 0:
        raise KitError(f"apt-get failed: {' | '.join(done.err.splitlines()[-3:])}")


@contextlib.contextmanager
def _services_held_back() -> Iterator[None]:
    """Keep the packages from starting system-wide daemons (Debian's policy-rc.d)."""
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            policy.unlink(missing_ok=True)
