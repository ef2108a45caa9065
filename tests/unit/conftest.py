"""A run of two replica groups, as those find it that keep one going."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.rundir import Manifest, Outputs, RunDir

MANIFEST = Manifest(
    run="tft-50", array_job_id=50, group_size=2, ranks_per_group=1, config="c.toml",
    lighthouse="http://127.0.0.1:1",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = Outputs(tmp_path).run_of_array(50)
    run.create(MANIFEST)
    return run
