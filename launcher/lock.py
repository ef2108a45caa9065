"""One at a time: a lock that ends with the process that has it."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO


def acquire(path: Path) -> IO[str] | None:
    """Take the lock at ``path``, for as long as the returned file is open.

    Returns:
        None while somebody else has it. Where the file system has no locks everybody gets one.

    Raises:
        OSError: the file cannot be made.
    """
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    except OSError:
        pass  # a file system without locks
    return lock
