"""The lighthouse is lost with its host, and a replica group's launcher stands in for it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from launcher import deputy, lease
from launcher.config import Site
from launcher.deputy import Deputy
from launcher.lease import Lease
from launcher.lighthouse import Address, LighthouseDir
from launcher.office import Office
from launcher.plan import Plan
from launcher.reach import answers
from launcher.relay import Relay
from launcher.restarts import Limits
from launcher.rundir import RunDir
from launcher.terms import Terms
from tests.unit.conftest import MANIFEST
from tests.unit.test_relay import Echo

#: A lighthouse answers this as it does a manager's: at once.
HEARTBEAT = b"GET /status HTTP/1.1\r\nHost: lighthouse\r\n\r\n"


class Group:
    """A replica group's launcher, as far as the lighthouse is concerned, and its manager."""

    def __init__(self, run: RunDir, replica: int) -> None:
        site = Site.from_environment({"TFT_DEVICE": "cpu", "TFT_NODE_ADDRESS": "127.0.0.1"})
        plan = Plan(
            env={"PATH": os.environ["PATH"]},
            site=site,
            manifest=MANIFEST,
            run=run,
            limits=Limits(),
            flags=lambda task: [],
            argv=lambda folder, flags: [],
            slurm_task="",
        )
        self.lease: Lease = lease.take(run.lease(replica), replica=replica, task=0, host="h")
        self.deputy = Deputy(plan, lambda: self.lease)
        self._ended = threading.Event()

    @contextlib.contextmanager
    def going(self) -> Iterator[Group]:
        with Relay(self.deputy.place) as relay, self.deputy.beside(relay):
            speaks = threading.Thread(target=self._speak, args=(relay.port,), daemon=True)
            speaks.start()
            try:
                yield self
            finally:
                self._ended.set()

    def _speak(self, port: int) -> None:
        while not self._ended.is_set():
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), 1) as client,
            ):
                while client.send(HEARTBEAT) and client.recv(1 << 16):
                    time.sleep(0.02)
            time.sleep(0.02)


@pytest.fixture
def published(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Echo]]:
    """Publishes a lighthouse of the login node's; the groups are in a hurry."""
    monkeypatch.setattr(deputy, "AWAY_SECONDS", 0.4)
    monkeypatch.setattr(deputy, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(deputy, "GRACE_SECONDS", 0.2)
    servers: list[Echo] = []
    for replica in (0, 1):
        step = '{"kind":"commit","t":5.0,"step":7,"quorum_id":400}\n'
        run.events(replica).write_text(step)

    def publish(past: int = 0) -> Echo:
        server = Echo(b"login:")
        servers.append(server)
        LighthouseDir.of_run(run, MANIFEST).publish(
            Address(
                url=MANIFEST.lighthouse, host="h", port=1, pid=1, process_started=1.0, user="u",
                started=time.time(), past=past, answers_votes=True, serving=f"127.0.0.1:{server.place[1]}",
            )
        )  # fmt: skip
        return server

    yield publish
    for server in servers:
        with contextlib.suppress(OSError):
            server.end()


def eventually(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_group_stands_in_and_gives_it_back(
    run: RunDir, published: Callable[..., Echo], capsys: pytest.CaptureFixture[str]
) -> None:
    terms, server = Terms(run.terms), published()
    with Group(run, 0).going() as one, Group(run, 1).going() as two:
        eventually(lambda: one.deputy.place() == server.place)
        server.end()
        eventually(lambda: terms.newest().serving)
        serving = terms.newest().serving
        assert answers(f"http://{serving}") is None, "a real lighthouse"
        expected = ("127.0.0.1", int(serving.rpartition(":")[2]))
        assert one.deputy.place() == two.deputy.place() == expected
        folder = LighthouseDir.of_run(run, MANIFEST)
        eventually(lambda: folder.newest_quorum_id() >= 500)  # beyond what the groups have had
        past = folder.newest_quorum_id()
        # One that knows fewer quorum ids than were given out is not let in again.
        published(past=0)
        time.sleep(1.0)
        assert terms.newest().serving == serving
        back = published(past=10 * past)
        eventually(lambda: not terms.newest().serving)
        assert answers(f"http://{serving}") is not None, "it has ended"
        eventually(lambda: one.deputy.place() == two.deputy.place() == back.place)
    told = [json.loads(line) for line in run.events(0).read_text().splitlines()]
    assert [e["serves"] for e in told if e["kind"] == "stand_in"] == [True, False]
    said = capsys.readouterr()
    assert "replica 0 on 127.0.0.1 stands in for the lighthouse" in said.out
    assert "asks for another" in said.err


def test_whoever_stands_in_answers_votes_until_nobody_reaches_it(
    run: RunDir,
    published: Callable[..., Echo],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A vote cannot be taken back: without an answer one silence would cut a group off for good."""
    monkeypatch.setattr(deputy, "TURN_SECONDS", 2.0)
    terms, server = Terms(run.terms), published()
    with Group(run, 0).going() as one, Group(run, 1).going() as two:
        eventually(lambda: one.deputy.place() == server.place)
        server.end()
        eventually(lambda: terms.newest().serving)
        first = terms.newest()
        terms.vote(first.number + 1, 1)
        eventually(lambda: terms.newest().number == first.number + 1)
        assert terms.newest().serving == first.serving
        assert one.deputy.place() == two.deputy.place() is not None
        # Once more, all others, at once: they do not reach it. It ends, and another is chosen.
        terms.vote(first.number + 2, 1)
        eventually(lambda: terms.newest().number == first.number + 2, 30)
        eventually(lambda: one.deputy.place() == two.deputy.place() is not None)
    assert "do not reach the lighthouse that stands in here: it ends" in capsys.readouterr().err


def test_a_supervisor_of_before_is_not_voted_against(
    run: RunDir, published: Callable[..., Echo]
) -> None:
    server = published()
    folder = LighthouseDir.of_run(run, MANIFEST)
    address = json.loads((folder.path / "address.json").read_text())
    del address["answers_votes"]
    (folder.path / "address.json").write_text(json.dumps({**address, "of a newer version": 1}))
    with Group(run, 0).going() as one:
        eventually(lambda: one.deputy.place() == server.place)
        server.end()
        time.sleep(1.5)
        assert Terms(run.terms).voters(1, range(2)) == frozenset()


def test_a_group_that_starts_without_any_lighthouse_votes_too(
    run: RunDir, published: Callable[..., Echo]
) -> None:
    terms, server = Terms(run.terms), published()
    with Group(run, 0).going() as one:
        eventually(lambda: one.deputy.place() == server.place)
        eventually(terms.kept)
    LighthouseDir.of_run(run, MANIFEST).unpublish(1)
    server.end()
    with Group(run, 0).going(), Group(run, 1).going():
        eventually(lambda: terms.newest().serving)


def test_one_group_alone_is_not_enough(run: RunDir, published: Callable[..., Echo]) -> None:
    terms, server = Terms(run.terms), published()
    with Group(run, 0).going() as one:
        eventually(lambda: one.deputy.place() == server.place)
        server.end()
        eventually(lambda: terms.voters(1, range(2)) == {0})
        assert one.deputy.place() is None, "it has voted"
        time.sleep(1.5)
        assert terms.newest().number == 0
        # The supervisor, had it been alive all the time, says so: the group goes to it again.
        again = published()
        Office(lambda: run, lambda: True, print).look()
        eventually(lambda: one.deputy.place() == again.place)


def test_a_copy_that_was_replaced_does_not_vote(
    run: RunDir, published: Callable[..., Echo]
) -> None:
    server = published()
    with Group(run, 0).going() as old:
        eventually(lambda: old.deputy.place() == server.place)
        lease.take(run.lease(0), replica=0, task=1, host="elsewhere")
        server.end()
        time.sleep(1.5)
        assert old.deputy.place() is None
        assert Terms(run.terms).voters(1, range(2)) == frozenset()
