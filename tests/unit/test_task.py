"""The entry of the job scripts: exit codes, and one line that says what is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from launcher import task
from tests.conftest import REPOSITORY


def test_what_is_missing_is_one_stamped_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    assert task.main(["replica"]) == 2
    assert "error: not in a Slurm array" in capsys.readouterr().err
    assert task.main(["replicas"]) == 2
    assert "replicas is none of replica, classic and script" in capsys.readouterr().err
    assert task.main(["script", "--"]) == 2
    assert "no script: submit with `sbatch" in capsys.readouterr().err
    assert task.main(["script", "--", "train.py"]) == 2
    assert "sbatch --array=0-3 slurm/replica-group.sbatch" in capsys.readouterr().err


def test_it_starts_without_the_command_line() -> None:
    code = (
        "import sys, launcher.task\n"
        "from launcher import replica\n"
        "print(sorted({'typer', 'rich', 'torch', 'psutil', 'launcher.drills'} & set(sys.modules)))"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
