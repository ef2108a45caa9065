"""A lighthouse that was started for a run ends with it: not before, and not never."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher import supervisor
from launcher.lighthouse import LighthouseDir
from launcher.lighthouse_child import LighthouseSettings
from launcher.rundir import Outputs
from launcher.supervisor import Supervisor


@pytest.fixture
def serving(tmp_path: Path) -> Supervisor:
    outputs = Outputs(tmp_path)
    (outputs.run_of_array(50).path).mkdir(parents=True)
    folder = LighthouseDir(outputs.lighthouses / "h-1")
    settings = LighthouseSettings(host="h", port=1)
    return Supervisor(settings, folder, outputs, with_run=True, say=lambda line: None)


def ended(serving: Supervisor, run: int | None) -> bool:
    serving._end_with_run(run)
    return serving._stop.is_set()


def test_it_ends_when_the_guardian_says_that_the_run_is_over(serving: Supervisor) -> None:
    assert not ended(serving, 50)
    serving._guardian.over = True
    assert ended(serving, 50)


def test_it_waits_for_a_run_and_again_when_one_has_let_it_go(
    serving: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [time.monotonic() + 1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    assert not ended(serving, 50), "a run has it, however late it came"
    assert not ended(serving, None), "its claim is about to be another run's"
    now[0] += supervisor.UNUSED_SECONDS + 1
    assert ended(serving, None)


def test_a_run_whose_folder_is_gone_is_over(serving: Supervisor) -> None:
    assert not ended(serving, 51), "its first task makes the folder"
    serving._guardian.tried = True
    assert ended(serving, 51)
