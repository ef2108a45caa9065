"""The lighthouse is lost with its host, and a replica group's launcher stands in for it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher import deputy, lease
from launcher.config import Site
from launcher.deputy import Deputy
from launcher.lease import Lease
from launcher.lighthouse import Address, LighthouseDir
from launcher.model import KitError
from launcher.office import Office
from launcher.plan import Plan
from launcher.reach import answers
from launcher.records import newest_step
from launcher.relay import Relay
from launcher.restarts import Limits
from launcher.rundir import RunDir
from launcher.terms import Commit, Term, Terms, electors
from tests.unit.conftest import MANIFEST
from tests.unit.test_relay import Echo


def test_a_term_is_taken_once_and_a_vote_stays(hostile: Path) -> None:
    terms = Terms(hostile / "terms")
    assert terms.newest() == Term(number=0)
    for replica in (0, 1):
        terms.begin(replica)
    assert terms.present_for(0) == Term(number=0)
    terms.vote(1, 0)
    terms.begin(0)  # its next start
    assert terms.present_for(0) is None, "it has nothing to do with term 0 any more"
    assert terms.present_for(1) == Term(number=0)
    assert terms.voters(1, range(3)) == {0}
    taken: list[bool] = []
    both = [
        threading.Thread(target=lambda p=p: taken.append(terms.take(1, f"h:{p}", "me")))
        for p in (1, 2)
    ]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert sorted(taken) == [False, True]
    assert terms.newest().serving in ("h:1", "h:2")
    assert terms.present_for(0) == terms.newest()
    assert terms.voters(2, range(3)) == frozenset()


def test_damaged_files_never_give_a_vote_back(tmp_path: Path) -> None:
    terms = Terms(tmp_path)
    terms.begin(0)
    assert terms.take(1, "h:1", "me")
    (tmp_path / "newest.json").write_text('{"numb')
    assert terms.newest().serving == "h:1"
    assert terms.take(2, "h:2", "me")
    (tmp_path / "vote.0.json").write_text("")
    with pytest.raises(KitError):
        terms.present_for(0)
    terms.begin(0)  # as its next start does
    assert terms.present_for(0) is None
    assert terms.take(3, "", "the supervisor")
    assert terms.present_for(0) is not None
    # Whoever took a term and died before it was told has taken it all the same.
    (tmp_path / "newest.json").write_text((tmp_path / "1.taken").read_text())
    assert terms.newest().number == 3


def test_on_a_full_disk_nobody_votes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terms = Terms(tmp_path)
    terms.begin(0)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("launcher.files.os.link", full)
    with pytest.raises(KitError, match="No space left"):
        terms.vote(1, 0)
    assert terms.present_for(0) == Term(number=0), "it would have nowhere to go"


def test_who_may_have_committed_the_newest_step_must_have_voted() -> None:
    assert electors({}) == frozenset()
    late = {0: Commit(t=1000, step=50), 1: Commit(t=990, step=49), 2: Commit(t=900, step=20)}
    assert electors(late) == {0, 1}
    assert electors(late | {2: Commit(t=950, step=20)}) == {0, 1, 2}, "its files may lag"
    assert electors(late | {2: Commit(t=100, step=49)}) == {0, 1, 2}, "steps may be long"


def test_a_group_that_said_that_it_ended_has_no_newest_step(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    assert newest_step(events) is None
    lines = [
        {"kind": "quorum", "t": 1.0, "step": 3, "quorum_id": 0},
        {"kind": "commit", "t": 2.0, "step": 3, "committed": True, "quorum_id": 0},
        {"kind": "metrics", "t": 3.0, "step": 4},
    ]
    text = "".join(json.dumps(each, separators=(",", ":")) + "\n" for each in lines)
    events.write_text(text + '{"kind":"com')
    assert newest_step(events) == Commit(t=2.0, step=3)
    # It may come back, and how late shared files are is not known.
    events.write_text(events.read_text() + 'x\n{"kind":"exit","t":4.0,"code":1,"attempt":1}\n')
    assert newest_step(events) == Commit(t=4.0, step=3)
    events.write_text(events.read_text() + '{"kind":"exit","t":5.0,"code":0,"attempt":1}\n')
    assert newest_step(events) is None
    more = '{"kind":"quorum","t":9.0,"step":0,"attempt":2,"quorum_id":7}\n'
    more += '{"kind":"gpu"}\n' * 9000  # an hour between two syncs
    more += '{"kind":"exit","t":9.5,"code":0,"attempt":1}\n'  # said by the old copy
    events.write_text(events.read_text() + more)
    assert newest_step(events) == Commit(t=9.0, step=0, quorum_id=7)
    events.unlink()
    events.mkdir()
    with pytest.raises(KitError, match="cannot be read"):
        newest_step(events)


# -- the supervisor ----------------------------------------------------------------------


def test_a_supervisor_that_lives_answers_a_vote(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, heard = list[str](), [True]
    office, terms = Office(lambda: run, lambda: heard[0], said.append), Terms(run.terms)
    terms.begin(1)
    terms.vote(1, 1)
    office.look()
    assert terms.newest() == Term(number=1, by="the supervisor", t=terms.newest().t)
    assert "replica 1" in said[0]
    office.look()
    assert terms.newest().number == 1, "once"
    # One whom nobody reaches, or whose lighthouse has not come up for long, lets others.
    terms.vote(2, 1)
    heard[0] = False
    office.look()
    assert terms.newest().number == 1
    heard[0] = True
    now = time.monotonic() + 31
    monkeypatch.setattr("launcher.office.time.monotonic", lambda: now)
    office.look()
    assert terms.newest().number == 1


def test_a_supervisor_knows_that_another_one_stands_in(run: RunDir) -> None:
    said, heard = list[str](), [True]
    office, terms = Office(lambda: run, lambda: heard[0], said.append), Terms(run.terms)
    assert terms.take(1, "node-3:29511", "replica 3 on node-3")
    terms.vote(2, 1)
    office.look()
    assert office.deposed
    assert office.stand_in == ("node-3", 29511)
    assert terms.newest().number == 1, "the votes are for the one that stands in"
    assert terms.take(2, "", "replica 3")
    office.look()
    assert not office.deposed
    assert said == [
        "replica 3 on node-3 stands in for this lighthouse (term 1)",
        "this lighthouse serves again (term 2)",
    ]


# -- the launchers -----------------------------------------------------------------------


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
    run: RunDir, published: Callable[..., Echo], monkeypatch: pytest.MonkeyPatch
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
        # Once more, all others, at once: they do not reach it. The next one is another's.
        terms.vote(first.number + 2, 1)
        eventually(lambda: terms.newest().by.startswith("replica 1"))
        eventually(lambda: one.deputy.place() == two.deputy.place() is not None)


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
