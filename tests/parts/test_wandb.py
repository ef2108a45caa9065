"""The controller's run in Weights & Biases, which is real, and offline."""

from __future__ import annotations

import json
import os
import socketserver
import time

import pytest

from launcher import wandb_sink
from launcher.events import Event
from launcher.rundir import RunDir
from launcher.sinks import Delivery
from launcher.state import RunState
from tests.conftest import REPOSITORY
from tests.unit.test_sinks import SECRET, run, story, updates
from tests.wandb_file import config_of, records

__all__ = ["run", "story"]


def wandb_environment(**more: str) -> dict[str, str]:
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return keep | {"PYTHONPATH": str(REPOSITORY)} | more


def test_the_controllers_run_in_wandb_over_two_monitors(run: RunDir, story: list[Event]) -> None:
    env = wandb_environment(WANDB_MODE="offline", TFT_WEBHOOK=f"http://x{SECRET}")
    assert wandb_sink.wanted(env)
    got = updates(story)
    for _ in range(2):
        controller = wandb_sink.open_controller(run, env)
        assert controller is not None
        assert wandb_sink.open_controller(run, env) is None, "two monitors must not mix rows"
        for update in got:
            controller.deliver(update)
        controller.close()
    files = sorted((run.path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    manifest = run.manifest()
    for path in files:
        found = list(records(path))
        start = next(r.run for r in found if r.HasField("run"))
        assert start.run_id == f"{run.name}-controller-{int(manifest.created)}"
        assert (start.run_group, start.job_type) == (run.name, "controller")
        config = config_of(found)
        assert config["slurm"]["array_job_id"] == manifest.array_job_id
        assert config["versions"] == manifest.versions
        rows = [
            {(*i.nested_key, i.key)[0]: json.loads(i.value_json) for i in r.history.item}
            for r in found
            if r.HasField("history")
        ]
        assert {"tft/quorum_members", "tft/participation", "tft/step_efficiency"} <= set(rows[-1])
        assert rows[-1]["tft/step"] == 119
        steps = [row["_step"] for row in rows]
        assert steps == sorted(steps)
        assert steps[-1] - steps[0] > 60, "the steps are seconds of the run"
        assert any("tft/incidents_table" in row for row in rows)
        alerts = [r.alert.title for r in found if r.HasField("alert")]
        assert alerts == ["replica 1 lost", "replica 1 recovered"]
        assert SECRET.encode() not in path.read_bytes()


def test_a_wandb_that_hangs_costs_a_limited_time(
    run: RunDir, story: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_sink, "END_SECONDS", 0.5)
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as silent:
        env = wandb_environment(
            WANDB_API_KEY="0" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{silent.server_address[1]}"
        )
        controller = wandb_sink.open_controller(run, env)
        assert controller is not None
        delivery = Delivery([controller])
        started = time.monotonic()
        delivery.deliver(RunState(2), [], [], blind=False)
        assert time.monotonic() - started < 1
        assert delivery.close() == ["W&B did not end well (did not finish within 0.5 s)"]
        assert time.monotonic() - started < 5
    assert controller._child.poll() is not None
    assert controller._errors.closed
