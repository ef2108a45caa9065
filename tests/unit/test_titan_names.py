"""Mistakes in torchtitan's flags and files, told before anything is submitted."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from launcher import preflight, titan_names
from launcher.config import Site
from launcher.model import UsageError
from tests.conftest import REPOSITORY


def told(settings: dict[str, Any], *extra: str) -> list[str]:
    return titan_names.problems(settings, extra, "c.toml")


@pytest.mark.parametrize("config", ["debug-cpu.toml", "llama3.1-8b.toml"])
def test_what_is_shipped_has_no_mistake(config: str) -> None:
    assert told(tomllib.loads((REPOSITORY / "configs" / config).read_text())) == []


def test_flags_that_torchtitan_takes_pass() -> None:
    assert told(
        {},
        "--training.steps", "200", "--training.local-batch-size=2", "--optimizer.lr=8e-4",
        "--metrics.no-enable-wandb", "--compile.enable", "--debug.seed=None", "--debug.seed", "3",
        "--activation_checkpoint.mode=full", "--fault_tolerance.sync_steps=20", "--job.description",
        "a --b c", "--quantize.linear.float8.filter_fqns=a,b",
    ) == []  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--training.stpes=5"], "no flag --training.stpes: is --training.steps meant?"),
        (["--steps", "5"], "no flag --steps: is --training.steps meant?"),
        (["--nothing-like-it"], "torchtitan has no flag --nothing-like-it"),
        (["--training.steps=many"], "--training.steps must be a whole number, not 'many'"),
        (["--optimizer.lr", "fast"], "--optimizer.lr must be a number, not 'fast'"),
        (["--activation_checkpoint.mode=all"], "must be one of selective, full, memory_budget"),
        (["--job.description", "--compile.enable"], "--job.description needs a value"),
        (["--compile.enable=true"], "--compile.enable is a switch"),
        (["--compile.no-enable=true"], "--compile.no-enable is a switch"),
        (["--compile.enable", "true"], "'true' stands after no flag that takes a value"),
        (["--training.steps", "5", "6"], "'6' stands after no flag"),
        (["--stpes", "5", "6"], "no flag --stpes"),
    ],
)
def test_a_mistake_in_a_flag_is_told(flags: list[str], problem: str) -> None:
    (said,) = told({}, *flags)
    assert problem in said


def test_a_mistake_in_the_file_is_told_with_every_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "training": {"stpes": 5, "steps": "x", "local_batch_size": 2},
        "trainig": {"steps": 1},
        "compile": {"enable": "yes"},
        "quantize": {"linear": {"float8": {"emulate": True, "emulat": True}}},
    }
    assert told(settings) == [
        "c.toml: torchtitan has no setting training.stpes: is training.steps meant?",
        "c.toml: training.steps must be a whole number, not 'x'",
        "c.toml: torchtitan has no setting trainig.steps: is training.steps meant?",
        "c.toml: compile.enable must be true or false, not 'yes'",
        "c.toml: torchtitan has no setting q.emulat: is q.emulate meant?".replace(
            "q.", "quantize.linear.float8."
        ),
    ]
    config = tmp_path / "c.toml"
    config.write_text("[training]\nstpes = 5\n")
    site = Site.from_environment({"TFT_CONFIG": str(config), "TFT_EXTRA_ARGS": "--steps 1"})
    with pytest.raises(UsageError, match=r"training\.stpes.*; .*no flag --steps: is"):
        preflight.check(site)


def test_settings_of_a_module_of_the_users_own_are_not_ours_to_judge() -> None:
    own = {"job": {"custom_config_module": "my.config"}, "mine": {"a": 1}}
    assert told(own, "--mine.b=2") == []
