"""torchrun, with its failures also written where the launcher can read them.

torchrun's own exit code says only that something failed. This runs it unchanged and,
when ranks fail, writes who, how and the first lines of why to ``TFT_FAILURES``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from launcher.parentage import die_with_parent


def main() -> None:
    die_with_parent(parent=int(os.environ.get("TFT_LAUNCHER") or 0))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(sys.argv[1:])
    except SignalException as stopped:
        sys.exit(128 + int(stopped.sigval))  # told to stop: its ranks are ended, no traceback
    except ChildFailedError as error:
        _write_failures(error)
        # torchrun's own summary is on stderr through its log; keep its exit code.
        print(error, file=sys.stderr)
        sys.exit(1)


def _write_failures(error: Any) -> None:
    path = os.environ.get("TFT_FAILURES")
    if not path:
        return
    failures = [
        {
            "rank": rank,
            "local_rank": failure.local_rank,
            "pid": failure.pid,
            "exit_code": failure.exitcode,
            "time": failure.timestamp,
            "message": _first_line(failure.message),
        }
        for rank, failure in sorted(error.failures.items())
    ]
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(failures, file)
    except OSError as problem:
        print(f"cannot write {path}: {problem}", file=sys.stderr)


def _first_line(message: Any) -> str:
    """torch hands over a plain string, or a dict with the exception's text inside."""
    if isinstance(message, dict):
        message = message.get("message", message)
        if isinstance(message, dict):
            message = message.get("message", message)
    lines = [line for line in str(message).splitlines() if line.strip()]
    return lines[0][:500] if lines else ""


if __name__ == "__main__":
    main()
