"""What one check of the doctor says, and the exit code that follows. No I/O."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.model import BlindError, KitError


class Grade(enum.Enum):
    """How a check ended; the value is the word that is printed."""

    PASSED = "passed"
    WARNING = "warning"  # training works, and something costs time or safety
    FAILED = "failed"
    BLIND = "could not look"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row of the doctor's table."""

    check: str
    grade: Grade
    found: str
    """What was read; of one that could not look, why not."""
    remedy: str = ""
    needed: bool = True
    """Of one that could not look: whether the answer would matter here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Checks of one place."""

    name: str
    results: Sequence[Result]


def passed(check: str, found: str) -> Result:
    return Result(check=check, grade=Grade.PASSED, found=found)


def warning(check: str, found: str, remedy: str) -> Result:
    return Result(check=check, grade=Grade.WARNING, found=found, remedy=remedy)


def failed(check: str, found: str, remedy: str) -> Result:
    return Result(check=check, grade=Grade.FAILED, found=found, remedy=remedy)


def blind(check: str, why: str, remedy: str = "", *, needed: bool = True) -> Result:
    return Result(check=check, grade=Grade.BLIND, found=why, remedy=remedy, needed=needed)


def exit_code(results: Iterable[Result]) -> int:
    """1 when something failed; else 4 when something needed could not be looked at; else 0."""
    found = list(results)
    if any(result.grade is Grade.FAILED for result in found):
        return KitError.exit_code
    if any(result.grade is Grade.BLIND and result.needed for result in found):
        return BlindError.exit_code
    return 0
