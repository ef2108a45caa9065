"""The guardian as a process: one for the run that is served, started again, ended with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import guardian_child
from launcher.guardian_child import GuardianChild


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], GuardianChild]:
    monkeypatch.setattr(guardian_child, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(guardian_child, "LOOK_EVERY", 0.0)

    def make(script: str) -> GuardianChild:
        return GuardianChild([sys.executable, "-uc", script], tmp_path / "log", {})

    return make


def tend(child: GuardianChild, run: str | None, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not until():
        assert time.monotonic() < deadline
        if child.due():
            child.tend(run)
        time.sleep(0.02)


def words(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []


def test_one_that_fails_is_started_again_and_one_for_another_run_takes_its_place(
    child: Callable[[str], GuardianChild], tmp_path: Path
) -> None:
    guardian = child("import sys; print(sys.argv[1]); sys.exit(4)")
    tend(guardian, "tft-1", lambda: words(tmp_path).count("tft-1") >= 2)
    tend(guardian, "tft-2", lambda: "tft-2" in words(tmp_path))
    guardian.end()


def test_one_that_has_done_its_work_is_left_alone(
    child: Callable[[str], GuardianChild], tmp_path: Path
) -> None:
    guardian = child("print('done')")
    tend(guardian, "tft-1", lambda: guardian._next > time.monotonic() + 30)
    assert words(tmp_path) == ["done"]


def test_it_ends_with_its_supervisor(child: Callable[[str], GuardianChild], tmp_path: Path) -> None:
    guardian = child("import time; print('up'); time.sleep(60)")
    tend(guardian, None, lambda: True)
    assert guardian._process is None, "no run, no guardian"
    tend(guardian, "tft-1", lambda: "up" in words(tmp_path))
    process = guardian._process
    assert process is not None
    guardian.end()
    assert process.returncode == -15
