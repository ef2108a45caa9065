"""Ties a process's life to its parent's, so that no rank outlives its launcher.

A scheduler that kills a batch shell with SIGKILL gives it no chance to end its
children; on clusters without cgroup tracking they would train on as orphans.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

#: ``PR_SET_PDEATHSIG`` of ``<linux/prctl.h>``: the signal sent on the parent's death.
PR_SET_PDEATHSIG = 1
#: ``PR_SET_CHILD_SUBREAPER`` of the same: whose parent ends becomes a child of this process.
PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(sig: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Ask the kernel to send ``sig`` to this process when its parent ends.

    Exits at once when the parent is already gone (it was handed to init before
    the request could be made): ``parent`` is whose child it should be, where that
    is known. Does nothing on systems other than Linux.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(sig), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) was refused")
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, instead of init.

    Does nothing on systems other than Linux.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) was refused")
