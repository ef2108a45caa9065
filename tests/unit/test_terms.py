"""Terms and votes: who may serve as the lighthouse of a run."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path

import pytest

from launcher.model import KitError
from launcher.office import Office
from launcher.records import newest_step
from launcher.rundir import RunDir
from launcher.terms import Commit, Term, Terms, electors


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
