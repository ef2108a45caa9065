"""What a keeper is given to keep going, and how an attempt of it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.config import Site
from launcher.environment import Task
from launcher.restarts import Limits
from launcher.rundir import Manifest, RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a keeper keeps going."""

    env: Mapping[str, str]
    site: Site
    manifest: Manifest
    run: RunDir
    limits: Limits
    flags: Callable[[Task], list[str]]
    """The trainer's flags for one attempt."""
    argv: Callable[[Path, list[str]], list[str]]
    """Command (torchrun, or the leader of several) that keeps its ranks' output in that folder and gives them those flags."""
    slurm_task: str
    """``<array job>_<index>``; empty when Slurm does not run this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How an attempt ended."""

    code: int
    reason: str = ""
    """Why it failed; empty when there is nothing to be started again."""
    stopped: bool = False
    """Whether the task was told to end."""
    trained: bool = False
    """Whether it had committed a step."""
    node: str = ""
    """Which of the group's nodes is to blame; empty: that is not known, or there is one only."""
