"""The nouns of the kit: errors, exit codes and frozen records. No I/O.

Errors::

    KitError            1  something failed
    ├── UsageError      2  bad input or configuration: nothing was started
    ├── CriticalError   3  a critical finding, a failed drill, a run that did not recover
    └── BlindError      4  could not see: never to be read as "nothing there"
"""

from __future__ import annotations

import enum


class KitError(Exception):
    """Something failed; the message says what, where and what to do."""

    exit_code = 1


class UsageError(KitError):
    """Bad input or configuration, found before anything was started."""

    exit_code = 2


class CriticalError(KitError):
    """The run has a critical finding, or a drill did not end in recovery."""

    exit_code = 3


class BlindError(KitError):
    """A source (the scheduler, a log) could not be read."""

    exit_code = 4


class GroupState(enum.Enum):
    """What a replica group is doing."""

    PENDING = "PENDING"  # in Slurm's queue, not started yet
    REQUEUED = "REQUEUED"  # requeued, waiting for Slurm's BeginTime or for a node
    STARTING = "STARTING"  # the launcher or torchrun runs; not in the quorum yet
    HEALING = "HEALING"  # in the quorum, taking the state of a peer
    TRAINING = "TRAINING"  # in the quorum and committing
    STALLED = "STALLED"  # alive but not joining while others wait (launcher/stalls.py)
    LOST = "LOST"  # left the quorum without having finished
    DONE = "DONE"  # trained to the last step


class ReportFormat(enum.Enum):
    """What a report is written as; the value is how it is asked for."""

    HTML = "html"
    MARKDOWN = "markdown"
    JSON = "json"

    @property
    def suffix(self) -> str:
        """Last part of the name of a report's file."""
        return ".md" if self is ReportFormat.MARKDOWN else f".{self.value}"
