"""Running other programs with a time limit: the one place that does."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launcher.model import BlindError

#: Seconds that a scheduler command may take before it counts as not answering.
DEFAULT_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Completed:
    """A program that ended."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str


#: Injected wherever commands are run, so that tests can stand in for them.
Run = Callable[[Sequence[str]], Completed]


def run(argv: Sequence[str], timeout: float = DEFAULT_TIMEOUT) -> Completed:
    """Run ``argv`` without a shell and without standard input.

    Raises:
        BlindError: the program is not there, or did not answer in ``timeout`` seconds.
    """
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise BlindError(f"{argv[0]} is not on this machine's PATH") from error
    except subprocess.TimeoutExpired as error:
        raise BlindError(f"{argv[0]} did not answer within {timeout:g} s") from error
    return Completed(tuple(argv), done.returncode, done.stdout, done.stderr)
