"""The controller's run in Weights & Biases, which is real, and offline."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import socketserver
import time

import pytest

from launcher import wandb_sink
from launcher.events import Event
from launcher.rundir import RunDir
from launcher.sinks import Delivery
from launcher.state import RunState
from tests.conftest import REPOSITORY
from tests.unit.telling import SECRET, run, story, updates
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
        assert config["controller"] == {"node": socket.gethostname()}
        assert config["replicas"] == {
            "0": {"node": "worker-0", "attempt": 1, "array_task": 0},
            "1": {"node": "worker-1", "attempt": 2, "array_task": 1},
        }
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


def test_alerts_in_wandb_are_held_back_and_summed_up(run: RunDir, story: list[Event]) -> None:
    (update,) = (update for update in updates(story) if update.lost)
    controller = wandb_sink.open_controller(run, wandb_environment(WANDB_MODE="offline"))
    assert controller is not None
    update = dataclasses.replace(update, appeared=(), notices=())
    for t in (0, 10, 20, 300, 301):
        lost = () if t == 300 else update.lost
        controller.deliver(dataclasses.replace(update, t=update.t + t, lost=lost))
    controller.close()
    (path,) = (run.path / "wandb").glob("offline-run-*/*.wandb")
    alerts = [r.alert for r in records(path) if r.HasField("alert")]
    assert {alert.title for alert in alerts} == {"replica 1 lost"}
    first, *others = (alert.text for alert in alerts)
    assert others == [
        f"{first} (told of the last 290 s together: lost 2 times)",
        f"{first} (told of the last 0 s together: lost 1 time)",
    ]
    assert {alert.wait_duration for alert in alerts} == {1000}, "W&B drops equal ones of a minute"


def test_what_wandb_says_of_its_failure_holds_no_key(run: RunDir) -> None:
    key = "not-to-be-seen"  # too short: W&B says so, and is then on disk
    controller = wandb_sink.open_controller(
        run, wandb_environment(WANDB_API_KEY=key, WANDB_BASE_URL="http://127.0.0.1:9")
    )
    assert controller is not None
    controller._errors.write(f"bad key {key}".encode())
    assert controller._why() == "bad key ***"
    delivery = Delivery([controller])
    delivery.deliver(RunState(2), [], [], blind=False)
    (said,) = delivery.close()
    assert "no contact (AuthenticationError): upload with `wandb sync" in said
    assert key not in said


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
