"""A recorded run, told to sinks as a monitor would; and a webhook on loopback."""

import http.server
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.events import Event
from launcher.findings import Finding, Severity
from launcher.rundir import Outputs, RunDir
from launcher.sinks import Delivery, Update
from launcher.state import RunState
from launcher.watcher import Watcher
from tests.conftest import FIXTURES

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


class Keep:
    """A sink that keeps what it gets."""

    name = "keep"

    def __init__(self) -> None:
        self.got: list[Update] = []

    def deliver(self, update: Update) -> None:
        self.got.append(update)

    def close(self) -> None:
        pass


def updates(story: list[Event]) -> list[Update]:
    """What any sink gets of the recorded run."""
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
