"""When W&B is on, and the workspace in it that is built in code; without a network."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher import wandb_sink
from launcher.command import wandb_flags
from launcher.dashboard import run_dashboard
from launcher.events import Event
from launcher.model import UsageError
from tests.unit.telling import run, story, updates

__all__ = ["run", "story"]

#: Packages of W&B warn of their own future.
foreign = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_wandb_is_wanted_with_a_key_a_login_or_offline(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert not wandb_sink.wanted(home)
    assert wandb_sink.wanted(home | {"WANDB_API_KEY": "k"})
    assert not wandb_sink.wanted(home | {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"})
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password k\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert wandb_sink.wanted(home)
    assert not wandb_sink.wanted(home | {"WANDB_BASE_URL": "https://wandb.example.org"})
    assert not wandb_sink.wanted(home | {"WANDB_DISABLED": "true"})


ON = ["--metrics.enable_wandb"]


@pytest.mark.parametrize(
    ("env", "toml", "extra", "flags"),
    [
        ({}, {}, [], []),
        ({"WANDB_API_KEY": "k"}, {}, [], ON),
        ({"WANDB_MODE": "offline"}, {"metrics": {"log_freq": 1}}, [], ON),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, {}, [], []),
        ({"WANDB_API_KEY": "k", "WANDB_DISABLED": "true"}, {}, [], []),
        ({"WANDB_API_KEY": "k"}, {"metrics": {"enable_wandb": True}}, [], []),
        ({"WANDB_API_KEY": "k"}, {"metrics": {"enable_wandb": False}}, [], []),
        ({"WANDB_API_KEY": "k"}, {}, ["--metrics.enable-wandb"], []),
        ({"WANDB_API_KEY": "k"}, {}, ["--metrics.no-enable-wandb"], []),
        ({"WANDB_API_KEY": "k"}, {}, ["--metrics.enable_wandb=False"], []),
    ],
)
def test_training_logs_to_wandb_unless_something_was_said(
    env: dict[str, str], toml: dict[str, Any], extra: list[str], flags: list[str]
) -> None:
    assert wandb_flags(env, toml, extra) == flags


@foreign
def test_the_dashboard_of_wandb_without_a_network() -> None:
    said: list[str] = []
    run_dashboard("12", entity="", project="p", dry_run=True, env={}, say=said.append)
    (text,) = said
    spec = json.loads(text)
    assert (spec["displayName"], spec["project"]) == ("torchft tft-12", "p")
    for metric in ("loss_metrics/global_avg_loss", "mfu(%)", "tft/quorum_members", "tft/incidents"):
        assert f'"{metric}"' in text
    (runs,) = spec["spec"]["section"]["runSets"]
    assert runs["grouping"] == [{"section": "run", "name": "group"}]
    assert runs["filters"]["filters"][0]["value"] == "tft-12"
    for odd in ("<script>", "x' or 1", "²", "a" * 101):
        with pytest.raises(UsageError, match="is no run's name"):
            run_dashboard(odd, entity="", project="p", dry_run=True, env={}, say=said.append)
    with pytest.raises(UsageError, match="--entity"):
        run_dashboard("", entity="", project="", dry_run=False, env={}, say=said.append)


@foreign
def test_the_panels_ask_for_what_the_controller_logs(story: list[Event]) -> None:
    said: list[str] = []
    run_dashboard("", entity="e", project="", dry_run=True, env={}, say=said.append)
    asked = set(re.findall(r'"(tft/\w+)"', said[0]))
    assert asked <= set(wandb_sink.figures(updates(story)[-1]))
