"""What a person asks a monitor to tell: JSON lines and a webhook, with real files and servers."""

import dataclasses
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher import sinks
from launcher.events import Event
from launcher.findings import Finding, Severity
from launcher.model import CriticalError, KitError, UsageError
from launcher.monitor import follow
from launcher.outlets import JsonLines, Outlets, Webhook
from launcher.rundir import RunDir
from launcher.sinks import Update
from launcher.slurm import Slurm
from tests.conftest import REPOSITORY, FakeRun
from tests.unit.telling import SECRET, Serve, run, serve, story, updates

__all__ = ["run", "serve", "story"]


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


def test_a_finding_that_comes_and_goes_does_not_fill_the_file(
    story: list[Event], tmp_path: Path
) -> None:
    path = tmp_path / "events.jsonl"
    sink = JsonLines(path, "tft-1", cooldown=300)
    plain = news(updates(story)[0], 0)
    hot, cool = (Finding(kind="gpu_hot", severity=Severity.WARNING, message=m) for m in "hc")
    other = dataclasses.replace(hot, replica=1)
    sink.deliver(dataclasses.replace(plain, appeared=(hot, other), notices=(), incidents=()))
    for second in range(1, 11):
        gone, back = ((hot,), ()) if second % 2 else ((), (cool,))
        later = news(plain, second)
        sink.deliver(dataclasses.replace(later, incidents=(), gone=gone, appeared=back))

    def findings() -> list[tuple[str | int | None, ...]]:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        keys = ("change", "replica", "message", "changes")
        return [tuple(x.get(k) for k in keys) for x in lines if x["kind"] == "finding"]

    first = [("appeared", None, "h", None), ("appeared", 1, "h", None), ("gone", None, "h", None)]
    assert findings() == first
    told = path.read_text().count('"kind": "notice"')
    assert told == 10 * len(plain.notices) > 0, "equal notices are events, each of them"
    sink.deliver(dataclasses.replace(plain, t=plain.t + 300, incidents=()))
    assert findings() == [*first, ("appeared", None, "c", 9)]
    sink.deliver(dataclasses.replace(plain, t=plain.t + 310, gone=(cool,)))
    sink.close()
    assert findings()[4:] == [("gone", None, "c", 1)]


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


def news(update: Update, t: float, *what: str) -> Update:
    """At ``t`` of the recorded update, replica 1 was lost or has recovered."""
    is_lost, is_back = "lost" in what, "recovered" in what
    return dataclasses.replace(
        update,
        t=update.t + t,
        lost=update.lost if is_lost else (),
        recovered=update.lost if is_back else (),
        appeared=(),
        gone=(),
    )


def test_the_webhook_holds_back_what_comes_again_too_soon_and_then_tells_it(
    story: list[Event], serve: Serve
) -> None:
    server = serve(lambda number: 200)
    sink = Webhook(server.url, "tft-1", cooldown=300)
    (update,) = (update for update in updates(story) if update.lost)
    for t, what in ((0, "lost"), (60, "recovered"), (70, "lost"), (80, "")):
        sink.deliver(news(update, t, what))
    lost, back = server.texts
    assert "replica 1 LOST on worker-1 at step 10" in lost
    assert "replica 1 RECOVERED" in back
    for t in (299, 300, 301):  # the group stays away, and nothing happens
        sink.deliver(news(update, t, ""))
    assert server.texts[2:] == [f"{lost} (told of the last 230 s together: lost 1 time)"]
    for t, what in ((310, "lost"), (320, "recovered"), (330, "lost"), (361, "recovered")):
        sink.deliver(news(update, t, what))
    # Its last recovery was told at 60: so this one is told now, and with it what came before.
    flapped = "(told of the last 51 s together: lost 2 times, recovered 2 times)"
    assert server.texts[3:] == [f"{back} {flapped}"]
    sink.deliver(news(update, 400, "lost"))
    assert server.texts[4:] == []
    sink.close()
    assert server.texts[4:] == [f"{lost} (told of the last 0 s together: lost 1 time)"]


def test_the_webhook_tells_in_one_message_what_happens_at_once(
    story: list[Event], serve: Serve
) -> None:
    server = serve(lambda number: 200)
    sink = Webhook(server.url, "tft-1")
    (update,) = (update for update in updates(story) if update.lost)
    many = tuple(dataclasses.replace(update.lost[0], replica=number) for number in range(64))
    sink.deliver(dataclasses.replace(update, lost=many))
    (text,) = server.texts
    lines = text.splitlines()
    assert [line.split(" LOST")[0] for line in lines[:2]] == [
        "tft-1: replica 0",
        "tft-1: replica 1",
    ]
    assert lines[30:] == ["tft-1: … and 34 more like these"]


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
    bad = ("http://[::1", "http://x:port", "http://x:99999", "http://x/a b", "http://x/ä")
    for url in (f"ftp://x{SECRET}", SECRET, f"http://x{SECRET} \n", "http://", *bad):
        with pytest.raises(UsageError) as refused:
            Webhook(url, "tft-1")
        assert SECRET not in str(refused.value)
        assert url not in str(refused.value)
        assert refused.value.__cause__ is None
    assert SECRET not in repr(Outlets(webhook=f"http://x{SECRET}"))


def test_a_webhook_that_answers_with_something_else_is_said_without_its_address(
    story: list[Event],
) -> None:
    (update,) = (update for update in updates(story) if update.lost)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            for _ in range(2):
                with server.accept()[0] as connection:
                    connection.recv(65536)
                    connection.sendall(f"no HTTP {SECRET}\r\n\r\n".encode())

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}{SECRET}"
        with pytest.raises(KitError) as caught:
            Webhook(url, "tft-1").deliver(update)
    assert str(caught.value) == "BadStatusLine"


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
    assert "time to recover 17.5 s" in told, "how it ended is told as without them"
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
