"""The monitor's sinks, with real parts on this machine: servers, files, W&B offline."""

import dataclasses
import http.server
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launcher import sinks, wandb_sink
from launcher.command import wandb_flags
from launcher.dashboard import run_dashboard
from launcher.events import Event
from launcher.findings import Finding, Severity
from launcher.model import CriticalError, KitError, UsageError
from launcher.monitor import follow
from launcher.outlets import JsonLines, Outlets, Webhook
from launcher.prometheus import METRICS, Prometheus
from launcher.rundir import Outputs, RunDir
from launcher.sinks import Delivery, Update
from launcher.slurm import Slurm
from launcher.state import RunState
from launcher.watcher import Watcher
from tests.conftest import FIXTURES, REPOSITORY, FakeRun

#: Packages of W&B warn of their own future.
foreign = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SECRET = "/services/T00/not-to-be-seen"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = Outputs(tmp_path).run_of_array(5183502)
    shutil.copytree(FIXTURES / "node-down", run.path)
    return run


@pytest.fixture
def story(run: RunDir) -> list[Event]:
    seen: list[Event] = []
    with Watcher.of_run(run) as watcher:
        watcher.on_event = lambda state, event: seen.append(event)
        watcher.look(final=True)
    return seen


NAN = Finding(kind="loss_nan", severity=Severity.CRITICAL, replica=1, message="it is nan")


def tell(delivery: Delivery, clock: list[float], story: list[Event]) -> RunState:
    """The recorded run, delivered event by event, with a critical finding while it lasts."""
    state = RunState(2, 120)
    for number, event in enumerate(story):
        notices = state.apply(event)
        clock[0] = event.t
        findings = [NAN] if 200 < number < 300 else []
        if notices or number in (250, 350):
            delivery.deliver(state, notices, findings, blind=False)
    return state


def updates(story: list[Event]) -> list[Update]:
    """What any sink gets of the recorded run."""

    class Keep:
        name = "keep"

        def __init__(self) -> None:
            self.got: list[Update] = []

        def deliver(self, update: Update) -> None:
            self.got.append(update)

        def close(self) -> None:
            pass

    keep, clock = Keep(), [0.0]
    delivery = Delivery([keep], clock=lambda: clock[0])
    tell(delivery, clock, story)
    assert delivery.close() == []
    return keep.got


class Server:
    """A webhook on loopback that keeps what it gets."""

    def __init__(self, answer: Callable[[int], int | None]) -> None:
        texts: list[str] = []
        tries = [0]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                tries[0] += 1
                body = self.rfile.read(int(self.headers["Content-Length"]))
                code = answer(tries[0])
                if code is None:
                    time.sleep(2)  # longer than anybody in these tests waits
                    return
                texts.append(json.loads(body)["text"])
                self.send_response(code)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.texts, self.tries = texts, tries
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}{SECRET}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[int], int | None]], Server]]:
    servers: list[Server] = []

    def start(answer: Callable[[int], int | None]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield start
    for server in servers:
        server.server.shutdown()
        server.server.server_close()


Serve = Callable[[Callable[[int], int | None]], Server]


def test_a_sink_hears_of_a_loss_and_of_a_recovery_once(story: list[Event]) -> None:
    got = updates(story)
    assert [i.replica for update in got for i in update.lost] == [1]
    assert [i.recovered_at_step for update in got for i in update.recovered] == [37]
    assert [f.kind for update in got for f in update.appeared] == ["loss_nan"]
    assert [f.kind for update in got for f in update.gone] == ["loss_nan"]
    assert got[-1].last_recovery == pytest.approx(17.5, abs=0.1)


def test_a_sink_that_raises_hangs_or_is_slow_costs_the_monitor_nothing(
    story: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "QUEUE", 2)
    monkeypatch.setattr(sinks, "HUNG_SECONDS", 0.0)
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.3)
    held = threading.Event()

    class Raises:
        name = "broken"

        def deliver(self, update: Update) -> None:
            raise ValueError(SECRET)

        def close(self) -> None:
            raise KitError("cannot close")

    class Hangs:
        name = "stuck"

        def deliver(self, update: Update) -> None:
            held.wait()

        def close(self) -> None:
            pass

    delivery = Delivery([Raises(), Hangs()])
    state, said = RunState(2, 120), []
    started = time.monotonic()
    for event in story:
        notices = state.apply(event)
        said += [n.text for n in delivery.deliver(state, notices, [], blind=False)]
    said += delivery.close()
    assert time.monotonic() - started < 5
    held.set()
    told = "\n".join(said)
    assert told.count("broken failed (ValueError); further failures are only counted") == 1
    assert told.count("broken did not end well (cannot close)") == 1
    assert told.count("stuck has not answered for") == 1
    assert told.count("stuck is too slow, its news are being dropped") == 1
    assert "stuck did not finish in time and was left behind" in told
    assert re.search(r"stuck: \d+ updates were not delivered", told)
    assert SECRET not in told


def test_json_lines(story: list[Event], tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _ in range(2):  # a monitor that is started again appends
        sink = JsonLines(path, "tft-1")
        for update in updates(story):
            sink.deliver(update)
        sink.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0]["kind"] == "monitor"
    assert sum(line["kind"] == "monitor" for line in lines) == 2
    half = lines[: len(lines) // 2]
    assert sum(line["kind"] == "notice" for line in half) == 12
    assert [x["change"] for x in half if x["kind"] == "finding"] == ["appeared", "gone"]
    last = [line for line in half if line["kind"] == "incident"][-1]
    assert (last["replica"], last["steps_lost"]) == (1, 1)
    assert last["recovered_at"] == "2026-11-20T14:05:50.698+00:00"
    with pytest.raises(UsageError, match="--events-to"):
        JsonLines(tmp_path / "no" / "folder", "tft-1")


def scrape(port: int) -> dict[str, list[Any]]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {
        sample.name: [s for s in family.samples if s.name == sample.name]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_prometheus_serves_the_documented_metrics(story: list[Event]) -> None:
    endpoint = Prometheus("0")
    try:
        assert scrape(endpoint.port) == {}
        got = updates(story)
        endpoint.deliver(next(update for update in got if update.findings))
        (finding,) = scrape(endpoint.port)["tft_findings"]
        assert finding.labels == {"kind": "loss_nan", "severity": "critical"}
        measured = tuple(dataclasses.replace(g, busy_seconds=0.25) for g in got[-1].groups)
        endpoint.deliver(dataclasses.replace(got[-1], groups=measured))
        seen = scrape(endpoint.port)
        with socket.create_server(("", 0)) as other, pytest.raises(UsageError, match="listen"):
            Prometheus(str(other.getsockname()[1]))
    finally:
        endpoint.close()

    def value(name: str, **labels: str) -> float:
        (sample,) = (s for s in seen[name] if s.labels == labels)
        return float(sample.value)

    assert set(seen) | {"tft_findings"} == {metric.name for metric in METRICS}
    assert value("tft_quorum_id") == 3
    assert value("tft_step") == 119
    assert value("tft_busy_seconds", replica="1") == 0.25
    assert value("tft_failed_commits_total") == 1
    assert value("tft_commits_total") == 212
    assert value("tft_incidents_total", cause="unknown") == 1
    assert value("tft_time_to_recover_seconds") == pytest.approx(17.5, abs=0.1)
    assert value("tft_replica_state", replica="1", state="DONE") == 1
    assert value("tft_replica_state", replica="1", state="LOST") == 0
    assert sum(s.value for s in seen["tft_replica_state"]) == 2
    for place in ("nine", "1.2.3.4", "70000"):
        with pytest.raises(UsageError, match="--prometheus must look like"):
            Prometheus(place)


def test_every_metric_is_documented_and_nothing_else() -> None:
    rows = re.findall(
        r"^\| `(tft_\w+)(?:\{(.*)\})?` \| (.*) \|$",
        (REPOSITORY / "docs" / "metrics.md").read_text(),
        flags=re.MULTILINE,
    )
    assert rows == [(m.name, ", ".join(m.labels), m.meaning) for m in METRICS]


def test_the_grafana_dashboard_asks_for_metrics_that_exist() -> None:
    board = json.loads((REPOSITORY / "configs" / "grafana-dashboard.json").read_text())
    assert (board["title"], board["schemaVersion"] >= 36, board["id"]) == (
        "torchft run",
        True,
        None,
    )
    panels, names = board["panels"], {metric.name: set(metric.labels) for metric in METRICS}
    assert len({panel["id"] for panel in panels}) == len(panels)
    asked: set[str] = set()
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            found = set(re.findall(r"\btft_\w+", target["expr"]))
            assert found, target
            assert found <= set(names), found - set(names)
            labels = {label for name in found for label in names[name]}
            legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert legend <= labels, target
            asked |= found
    assert asked == set(names)


def test_the_webhook_hears_of_what_matters(story: list[Event], serve: Serve) -> None:
    server = serve(lambda number: 500 if number == 1 else 200)
    sink = Webhook(server.url, "tft-1")
    for update in updates(story):
        sink.deliver(update)
    texts = server.texts[1:]  # the first try was answered with 500 and made again
    assert server.texts[0] == server.texts[1]
    assert [text.split(":")[0] for text in texts] == ["tft-1"] * 3
    told = "\n".join(texts)
    assert "replica 1 LOST on worker-1 at step 10" in told
    assert "replica 1 RECOVERED at step 37; 2 of 2 replica groups are in the quorum" in told
    assert "CRITICAL loss_nan: it is nan" in told


def test_the_webhook_says_the_same_only_once_in_a_while(story: list[Event], serve: Serve) -> None:
    server = serve(lambda number: 200)
    sink = Webhook(server.url, "tft-1", cooldown=300)
    (update,) = (update for update in updates(story) if update.lost)
    for seconds in (0, 10, 20, 301):
        later = {f: getattr(update, f) for f in Update.__dataclass_fields__}
        sink.deliver(Update(**later | {"t": update.t + seconds}))
    assert len(server.texts) == 2
    assert server.texts[1] == server.texts[0] + " (2 more of these were held back before)"


@pytest.mark.parametrize(
    ("answer", "says"), [(500, "HTTP 500"), (None, "no answer within 0.2 s"), (404, "HTTP 404")]
)
def test_a_webhook_that_fails_is_said_without_its_address(
    answer: int | None, says: str, story: list[Event], serve: Serve
) -> None:
    server = serve(lambda number: answer)
    sink = Webhook(server.url, "tft-1", timeout=0.2)
    (update,) = (update for update in updates(story) if update.lost)
    with pytest.raises(KitError) as caught:
        sink.deliver(update)
    assert str(caught.value) == says
    assert server.tries[0] == 2


def test_no_error_shows_the_webhooks_address(story: list[Event]) -> None:
    (update,) = (update for update in updates(story) if update.lost)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(KitError) as caught:
        Webhook(f"http://127.0.0.1:{port}{SECRET}", "tft-1").deliver(update)
    assert str(caught.value) == "ConnectionRefusedError"
    for url in (f"ftp://x{SECRET}", SECRET, f"http://x{SECRET} \n", "http://"):
        with pytest.raises(UsageError) as refused:
            Webhook(url, "tft-1")
        assert SECRET not in str(refused.value)
    assert SECRET not in repr(Outlets(webhook=f"http://x{SECRET}"))


def test_following_with_sinks_that_fail_ends_as_without(
    run: RunDir, fake_run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve
) -> None:
    monkeypatch.setattr(sinks, "FRESH_SECONDS", 1e9)  # the recorded loss is long ago
    server = serve(lambda number: 500)
    fake_run.on("squeue", out="1|1|0|COMPLETED|w|None\n")
    events = tmp_path / "told.jsonl"
    said: list[str] = []
    outlets = Outlets(events_to=events, prometheus="127.0.0.1:0", webhook=server.url, env={})
    follow(run, say=said.append, slurm=Slurm(fake_run), outlets=outlets)
    told = "\n".join(said)
    assert said[-2].startswith("replica 1  DONE")
    assert "metrics for Prometheus on port" in told
    assert "webhook failed (HTTP 500)" in told
    assert "webhook: 1 updates were not delivered" in told
    assert SECRET not in told + events.read_text()
    assert events.read_text().count('"kind": "notice"') == 12


@pytest.mark.parametrize("watched", [True, False])
def test_the_webhook_hears_of_a_run_that_ends_early(
    run: RunDir,
    fake_run: FakeRun,
    monkeypatch: pytest.MonkeyPatch,
    serve: Serve,
    tmp_path: Path,
    watched: bool,
) -> None:
    """Where the monitor saw it live; not of one that was over long before."""
    monkeypatch.setattr("launcher.monitor.QUIET_SECONDS", 0.0)
    monkeypatch.setattr("launcher.watcher.ASK_EVERY", 0.0)
    lines = run.events(1).read_text().splitlines(keepends=True)
    run.events(1).write_text("".join(lines[:-8]))
    gone = "1|1|0|COMPLETED|w|2026-11-20T15:00:00|None\n1|1|1|FAILED|w|2026-11-20T15:00:00|x\n"
    live = gone.replace("FAILED", "RUNNING")
    fake_run.on("squeue", out=live if watched else gone)
    sleep = time.sleep

    def slept(seconds: float) -> None:
        sleep(min(seconds, 0.05))
        fake_run.on("squeue", out=gone)

    monkeypatch.setattr("launcher.monitor.time.sleep", slept)
    server = serve(lambda number: 200)
    events = tmp_path / "told.jsonl"
    said: list[str] = []
    outlets = Outlets(webhook=server.url, events_to=events, env={})
    with pytest.raises(CriticalError, match="ended before its last step"):
        follow(run, say=said.append, slurm=Slurm(fake_run), outlets=outlets)
    text = "the run ENDED EARLY at step 119 of 120: replica 1 TRAINING"
    assert server.texts == ([f"{run.name}: {text}"] if watched else [])
    assert (text in events.read_text()) is watched


# -- Weights & Biases --------------------------------------------------------------------


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
    with pytest.raises(UsageError, match="--entity"):
        run_dashboard("", entity="", project="", dry_run=False, env={}, say=said.append)


@foreign
def test_the_panels_ask_for_what_the_controller_logs(story: list[Event]) -> None:
    said: list[str] = []
    run_dashboard("", entity="e", project="", dry_run=True, env={}, say=said.append)
    asked = set(re.findall(r'"(tft/\w+)"', said[0]))
    assert asked <= set(wandb_sink.figures(updates(story)[-1]))


def test_the_command_line_hides_the_webhook(run: RunDir) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "monitor", run.name, "--webhook", f"ftp://x{SECRET}"],
        env={"PATH": "", "TFT_OUTPUTS": str(run.path.parent.parent)},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == UsageError.exit_code
    assert "the webhook (--webhook, TFT_WEBHOOK) is not an http(s) address" in done.stderr
    assert SECRET not in done.stdout + done.stderr
