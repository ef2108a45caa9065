"""Shared by all tests: one time zone, a fake way to run commands, hostile paths."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil
import pytest

from launcher.events import Event
from launcher.process import Completed
from launcher.state import Notice, RunState

FIXTURES = Path(__file__).parent / "fixtures"
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorded logs are in local time, and that was UTC."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("TFT_", "SLURM_", "TORCHFT_", "SBATCH_", "WANDB_")):
            monkeypatch.delenv(name)


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose name breaks whatever forgets to quote it."""
    folder = tmp_path / 'it\'s a "test" $(touch oops) ü\nwith a newline'
    folder.mkdir()
    return folder


def golden(path: Path, text: str) -> None:
    """Compare with what is kept in ``path``; REWRITE_GOLDEN=1 keeps what there is now."""
    if os.environ.get("REWRITE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; REWRITE_GOLDEN=1 keeps the new one"


def copy_of(rank: int) -> list[psutil.Process]:
    """Every process of the replica group's copy that process ``rank`` is of."""
    process = psutil.Process(rank)
    while (parent := process.parent()) is not None and parent.name() != "slurmstepd":
        process = parent
    return [process, *process.children(recursive=True)]


class FakeRun:
    """Answers the commands it was told of, and refuses every other."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self._answers: list[tuple[tuple[str, ...], Callable[[], Completed]]] = []

    def on(self, *prefix: str, out: str = "", err: str = "", code: int = 0) -> None:
        """Answer commands that start with ``prefix``; a later answer wins."""
        self._answers.insert(0, (prefix, lambda: Completed(prefix, code, out, err)))

    def __call__(self, argv: Sequence[str]) -> Completed:
        call = tuple(argv)
        self.calls.append(call)
        for prefix, answer in self._answers:
            if call[: len(prefix)] == prefix:
                return answer()
        raise AssertionError(f"unexpected command: {call}")


@pytest.fixture
def fake_run() -> FakeRun:
    run = FakeRun()
    run.on("sinfo", out="worker-0|mix|none\nworker-1|down*|Not responding\n")
    return run


def apply_all(state: RunState, events: Iterable[Event]) -> list[Notice]:
    """Fold events in; returns what is told of them."""
    return [notice for event in events for notice in state.apply(event)]
