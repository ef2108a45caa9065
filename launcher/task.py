"""Entry of the job scripts: ``python -m launcher.task replica``, ``classic``, or
``script -- my_train.py --its --own flags``.

``leader`` and ``node`` are the parts of a replica group of several nodes, and started by it.

Beside the command line, not in it: a replica group is away for as long as this takes to start.
"""

from __future__ import annotations

import os
import sys

from launcher.model import KitError, UsageError
from launcher.payload import complain
from launcher.slurm import Slurm


def main(words: list[str]) -> int:
    """Run this task's node side; what is missing is a stamped line in its error log.

    Returns:
        The task's exit code.
    """
    try:
        if words == ["replica"]:
            from launcher.replica import run_replica

            return run_replica(os.environ, Slurm())
        if words[:2] == ["script", "--"]:
            from launcher.replica import run_replica

            if not words[2:]:
                raise UsageError(
                    "no script: submit with `sbatch --array=0-3 slurm/replica-group.sbatch my_train.py`"
                )
            return run_replica(os.environ, Slurm(), script=words[2:])
        if words == ["classic"]:
            from launcher.classic import run_classic

            return run_classic(os.environ, Slurm())
        if words == ["node"]:
            from launcher.node import run_node

            return run_node(os.environ)
        if words[:1] == ["leader"]:
            from launcher.leader import run_leader

            return run_leader(words[1:], os.environ)
    except KitError as error:
        complain(f"error: {error}")
        return error.exit_code
    except OSError as error:
        complain(f"error: {error.strerror or error}: {error.filename or 'no file'}")
        return 1
    complain(f"error: {' '.join(words) or 'nothing'} is none of replica, classic and script")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
