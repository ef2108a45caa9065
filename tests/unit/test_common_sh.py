"""The job scripts' shared shell: logs, modules, environment, container."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def bash(text: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail\nsource {REPOSITORY}/slurm/common.sh\n{text}"],
        cwd=folder,
        env={"PATH": f"{folder}/bin:{os.environ['PATH']}", **env},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@pytest.fixture
def node(hostile: Path) -> Path:
    """A folder with a virtual environment and an `apptainer` that says what it was told."""
    (hostile / ".env" / "bin").mkdir(parents=True)
    (hostile / ".env" / "bin" / "activate").write_text("echo activated\n")
    (hostile / "bin").mkdir()
    program = hostile / "bin" / "apptainer"
    program.write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\n')
    program.chmod(0o755)
    return hostile


def test_without_a_container_a_command_runs_on_the_node(node: Path) -> None:
    done = bash("tft_activate; tft_run printf '%s|' 'a b' '$(x)'", node)
    assert (done.returncode, done.stdout) == (0, "activated\na b|$(x)|")


def test_in_a_container_with_its_flags_and_this_folder(node: Path) -> None:
    image = node / "my image.sif"
    image.touch()
    done = bash(
        "tft_activate; tft_run python -m 'x y'",
        node,
        TFT_CONTAINER=str(image),
        TFT_CONTAINER_FLAGS="--nv --cleanenv",
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.removeprefix("activated\n")
    assert words.startswith("<exec>\n<--nv>\n<--cleanenv>\n<--bind>\n<")
    assert words.endswith(f"<{image}>\n<python>\n<-m>\n<x y>\n")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"TFT_CONTAINER": "no.sif"}, "no container image at no.sif"),
        ({"TFT_MODULES": "cuda"}, "this node has no 'module' command"),
        ({"TFT_ENV": "elsewhere"}, "no virtual environment at elsewhere: run 'make setup'"),
    ],
)
def test_what_is_missing_is_said_in_a_line(node: Path, env: dict[str, str], words: str) -> None:
    done = bash("tft_activate", node, **env)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_modules_are_loaded_in_order_and_before_the_environment(node: Path) -> None:
    module = 'module() { echo "module $*"; [ "$2" != bad ]; }\n'
    done = bash(f"{module}tft_activate", node, TFT_MODULES="cuda/12.8 openmpi")
    assert done.stdout == "module load cuda/12.8\nmodule load openmpi\nactivated\n"
    done = bash(f"{module}tft_activate", node, TFT_MODULES="bad")
    assert (done.returncode, "module bad cannot be loaded" in done.stderr) == (2, True)


def logs(folder: Path, words: str, target: Path) -> subprocess.CompletedProcess[str]:
    """A task whose output Slurm has opened at ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a") as out, target.with_suffix(".err").open("a") as err:
        return subprocess.run(
            ["bash", "-c", f"source {REPOSITORY}/slurm/common.sh; tft_keep_logs run tft-5_0; {words}"],
            cwd=folder, stdout=out, stderr=err, text=True, timeout=20, check=True,
        )  # fmt: skip


def test_one_log_over_requeues_under_two_names(hostile: Path) -> None:
    for word in ("first", "second"):
        logs(hostile, f"echo {word}; echo {word} >&2", hostile / ".slurm" / "tft-5_0.out")
    for name in ("run/tft-5_0.out", "run/tft-5_0.err", ".slurm/tft-5_0.out"):
        assert (hostile / name).read_text() == "first\nsecond\n"


def test_a_task_that_joins_appends_to_the_log_that_is_there(hostile: Path) -> None:
    logs(hostile, "echo first", hostile / ".slurm" / "tft-5_0.out")
    logs(hostile, "echo joined; echo wrong >&2", hostile / ".slurm" / "tft-9_0.out")
    assert (hostile / "run" / "tft-5_0.out").read_text() == "first\njoined\n"
    assert (hostile / "run" / "tft-5_0.err").read_text() == "wrong\n"
    assert (hostile / ".slurm" / "tft-9_0.out").read_text() == ""
