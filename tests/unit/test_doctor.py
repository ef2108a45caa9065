"""The doctor's jobs and table, with a Slurm that is pretended and a node that is a thread."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from launcher import doctor, doctor_job, doctor_node, process, surroundings
from launcher.checks import Grade, Section, blind, failed, passed
from launcher.doctor_job import Errand
from launcher.lighthouse import Address, LighthouseDir, discover
from launcher.listener import Listener, heard
from launcher.model import BlindError, KitError
from launcher.process import Completed
from launcher.rundir import Outputs, Visit
from launcher.slurm import Slurm
from launcher.target import Target, target_of
from tests.conftest import FIXTURES, REPOSITORY, FakeRun

PENDING = "77|77|N/A|PENDING||N/A|Resources\n"
FAILED = "77|77|N/A|FAILED|worker-0|2026-11-20T15:00:00|NonZeroExitCode\n"
RUNNING = "77|77|N/A|RUNNING|worker-0|2026-11-20T15:00:00|None\n"


class Cluster(FakeRun):
    """Slurm's commands; a job that is submitted is ``body(mode, folder)`` in a thread."""

    def __init__(
        self, state: str, body: Callable[[str, Visit], Any] = lambda mode, visit: 0
    ) -> None:
        super().__init__()
        self.on("scancel", "--me")
        self.on("squeue", "--me")
        self.on("squeue", "--noheader", "--array", out=state)
        self._body = body
        self.threads: list[threading.Thread] = []
        self.flags: list[str] = []

    def __call__(self, argv: Sequence[str]) -> Completed:
        if argv[0] != "sbatch":
            return super().__call__(argv)
        assert "--test-only" not in argv
        self.flags = [word for word in argv if word.startswith("--")]
        mode, folder = argv[-2:]
        thread = threading.Thread(target=self._run, args=(mode, Visit(Path(folder))), daemon=True)
        self.threads.append(thread)
        thread.start()
        return Completed(tuple(argv), 0, "77\n", "")

    def _run(self, mode: str, visit: Visit) -> None:
        with contextlib.suppress(KitError, OSError):  # its folder goes away with the job
            self._body(mode, visit)

    def cancelled(self) -> bool:
        return any(call[0] == "scancel" for call in self.calls)


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(doctor_job, "SLURM_EVERY", 0.05)
    monkeypatch.setattr(doctor_job, "APPEAR_SECONDS", 0.2)
    monkeypatch.setattr(doctor_job, "ARRIVE_SECONDS", 0.3)


@pytest.fixture
def target(hostile: Path) -> Target:
    return target_of("", {"TFT_OUTPUTS": str(hostile / "100%j"), "TFT_DEVICE": "cpu"})[0]


@pytest.fixture
def _looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_node, "look", lambda asked: {"saw": asked["what"]})


def errand(target: Target, cluster: Cluster) -> Errand:
    return Errand(target, Slurm(cluster), "abc", lambda line: None)


def on_node(mode: str, visit: Visit) -> int:
    return doctor_node.main([mode, str(visit.path)])


@pytest.mark.usefixtures("_looks")
def test_a_node_is_looked_at(target: Target) -> None:
    cluster = Cluster(RUNNING, on_node)
    visit = errand(target, cluster)
    found = visit.node({"what": "this"})
    assert (found.problem, found.node, found.host) == ("", {"saw": "this"}, socket.gethostname())
    assert found.round_trip is not None
    assert 0 < found.round_trip < 5
    assert found.clock is not None
    assert found.clock[0] < 0 < found.clock[1]
    assert cluster.cancelled()
    assert not visit.visit.path.exists()
    assert "--job-name=tft-doctor-abc" in cluster.flags
    (output,) = [flag for flag in cluster.flags if flag.startswith("--output=")]
    assert "100%%j" in output, "Slurm would put the job's id there"


def test_a_busy_queue_is_not_waited_for_for_ever(target: Target) -> None:
    cluster = Cluster(PENDING)
    visit = errand(target, cluster)
    found = visit.node({}, queue_seconds=0.2)
    assert found.problem == "no node came free in time: the job waits (Resources)"
    assert cluster.cancelled()
    assert not visit.visit.path.exists()
    assert visit.deep(2, queue_seconds=0.2).problem.startswith("no node came free")


def test_a_job_whose_words_do_not_arrive(target: Target) -> None:
    found = errand(target, Cluster(FAILED)).node({})
    assert found.ran_on == "worker-0"
    assert found.problem == "the job on worker-0 is FAILED, and arrived.json did not come"
    silent = errand(target, Cluster(RUNNING)).node({})
    assert silent.ran_on == "worker-0"
    said = errand(target, Cluster(FAILED, lambda mode, visit: visit.log.write_text("no python\n")))
    mute = said.node({})
    assert mute.problem == "the job on worker-0 is FAILED: no python"
    assert (found.wrote, mute.wrote) == (False, True)


def test_a_node_without_the_environment_says_so(target: Target) -> None:
    def refuse(mode: str, visit: Visit) -> None:
        visit.refused.write_text("worker-0\nno virtual environment at .env\n")

    found = errand(target, Cluster(RUNNING, refuse)).node({})
    assert (found.host, found.refused) == ("worker-0", "no virtual environment at .env")


def test_an_interrupted_doctor_cancels_its_job(target: Target) -> None:
    def interrupt(line: str) -> None:
        if "waiting" in line:
            raise KeyboardInterrupt

    cluster = Cluster(PENDING)
    visit = Errand(target, Slurm(cluster), "abc", interrupt)
    with pytest.raises(KeyboardInterrupt):
        visit.node({})
    assert ("scancel", "--me", "--name=tft-doctor-abc") in cluster.calls
    assert not visit.visit.path.exists()


def test_a_job_that_cannot_be_cancelled_is_named(target: Target) -> None:
    cluster = Cluster(PENDING)
    cluster.on("scancel", code=1, err="scancel: error: Socket timed out on send/recv operation")
    visit = errand(target, cluster)
    visit.node({}, queue_seconds=0.1)
    assert "may still run" in visit.left
    assert "`scancel --me --name=tft-doctor-abc`" in visit.left


def test_an_allreduce_over_nodes(target: Target) -> None:
    def part(mode: str, visit: Visit) -> None:
        assert mode == "deep"
        assert json.loads(visit.asked.read_text())["ranks"] == 1
        for rank in (1, 0):
            words = {"host": f"worker-{rank}", "gpus": [], "code": 0, "failure": ""}
            if rank == 0:
                visit.allreduce.write_text('{"ranks": 2}')
            visit.part(rank).write_text(json.dumps(words))

    cluster = Cluster(RUNNING, part)
    found = errand(target, cluster).deep(2)
    assert (found.problem, found.allreduce) == ("", {"ranks": 2})
    assert [one["host"] for one in found.parts] == ["worker-0", "worker-1"]
    assert "--nodes=2" in cluster.flags
    assert not any("gpus" in flag for flag in cluster.flags)

    def broken(mode: str, visit: Visit) -> None:
        words = {"host": "worker-0", "gpus": [], "code": 1, "failure": "rank 0: timed out"}
        visit.part(0).write_text(json.dumps(words))

    assert errand(target, Cluster(FAILED, broken)).deep(2).problem == "worker-0: rank 0: timed out"


def test_a_job_that_slurm_refuses_is_told_in_its_words(target: Target) -> None:
    class Refusing(Cluster):
        def __call__(self, argv: Sequence[str]) -> Completed:
            if argv[0] == "sbatch":
                said = "sbatch: error: Batch job submission failed: Invalid account"
                return Completed(tuple(argv), 1, "", said)
            return super().__call__(argv)

    visit = errand(target, Refusing(PENDING))
    (result,) = doctor._job("a node", visit, lambda: visit.node({}), lambda found: [])
    assert result.grade is Grade.BLIND
    assert result.found == (
        "Slurm refuses the job: sbatch: error: Batch job submission failed: Invalid account"
    )
    assert not visit.visit.path.exists()


def test_a_slurm_that_stops_answering_is_blindness(target: Target) -> None:
    cluster = Cluster(PENDING)
    cluster.on(
        "squeue", "--noheader", "--array", code=1, err="slurm_load_jobs error: Socket timed out"
    )
    visit = errand(target, cluster)
    with pytest.raises(BlindError):
        visit.node({}, queue_seconds=0.1)
    assert cluster.cancelled()


# -- ports ------------------------------------------------------------------------


@pytest.fixture
def held() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield int(server.getsockname()[1])


def test_the_listener_is_heard_and_nobody_else(held: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = int(probe.getsockname()[1])
    with Listener([held, free], "word", "127.0.0.1") as listener:
        assert listener.open == [free]
        assert "in use" in listener.taken[held]
        places = [{"host": "127.0.0.1", "port": free}, {"host": "127.0.0.1", "port": 1}]
        one, other = doctor_node.reach(places, "word")
        assert one["error"] == ""
        assert "refused" in other["error"]
        assert heard("127.0.0.1", free, "another", 1.0) == "something else answers"
    assert "refused" in heard("127.0.0.1", free, "word", 1.0)
    # Somebody who listens and says nothing.
    assert heard("127.0.0.1", held, "word", 0.2)


def test_what_a_node_should_reach(target: Target, tmp_path: Path) -> None:
    def address(host: str, url: str, serving: str = "") -> Address:
        return Address(
            url=url, host=host, port=1, pid=1, process_started=0.0, user="", started=0.0,
            serving=serving,
        )  # fmt: skip

    def places(*up: Address, by_hand: str = "") -> list[str]:
        import dataclasses

        known = surroundings.Lighthouses(free=(), stale=(), up=up)
        chosen = dataclasses.replace(target, lighthouse=by_hand, lighthouse_host="login")
        found = surroundings.places(chosen, known, [5])
        return [one.get("url") or f"{one['host']}:{one['port']}" for one in found]

    assert places() == ["login:5"]
    here = address(socket.gethostname(), "http://login:4", "login:6")
    assert places(here) == ["http://login:4", "http://login:6", "login:5"]
    assert places(address("other", "http://other:4")) == ["http://other:4"]
    assert places(by_hand="http://far:9") == ["http://far:9"]


def test_a_runs_own_lighthouse_is_nothing_left_over(tmp_path: Path) -> None:
    outputs, here = Outputs(tmp_path), socket.gethostname()
    own = process.start_time(os.getpid())
    for name, with_run in (
        ("login-1", True),
        ("login-2", True),
        ("login-3", False),
        ("tft-9", False),
    ):
        LighthouseDir(outputs.lighthouses / name).publish(
            Address(
                url=f"http://{name}:1", host=here, port=1, pid=os.getpid(), process_started=own,
                user="me", started=1.0, with_run=with_run,
            )
        )  # fmt: skip
    for run in (1, 2):
        claim = outputs.lighthouses / f"login-{run}" / "claim.json"
        claim.write_text(json.dumps({"array_job_id": run}))
    known = surroundings.lighthouses(outputs)
    assert known.free == ("http://login-3:1",)
    assert [one.url for one in known.up] == [f"http://login-{n}:1" for n in (1, 2, 3)]
    # … and a run that is submitted by hand does not take them for its own.
    assert discover(outputs, "", 7)[0] == "http://login-3:1"


def test_a_lighthouse_that_is_gone_is_told(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    folder = LighthouseDir.of(outputs, "http://127.0.0.1:1")
    folder.publish(
        Address(
            url="http://127.0.0.1:1", host=socket.gethostname(), port=1, pid=2**22 + 1,
            process_started=1.0, user="me", started=1.0,
        )
    )  # fmt: skip
    known = surroundings.lighthouses(outputs)
    assert known.up == ()
    assert known.stale == (f"http://127.0.0.1:1 (its process {2**22 + 1} is gone)",)


# -- the whole --------------------------------------------------------------------


def sections(
    monkeypatch: pytest.MonkeyPatch, target: Target, run: FakeRun, **scope: Any
) -> list[Section]:
    monkeypatch.setattr(surroundings, "missing_commands", list)
    return doctor.examine(target, doctor.Scope(**scope), Slurm(run), {}, lambda line: None)


def sandbox_answers(run: FakeRun) -> None:
    run.on("scontrol", "show", "config", out=(FIXTURES / "slurm-config.txt").read_text())
    run.on("scontrol", "--oneliner", out=(FIXTURES / "slurm-partitions.txt").read_text())
    run.on("sinfo", out="w-0|idle|128|1|gpu:8|none\nw-1|idle|128|1|gpu:8|none\n")
    run.on("sacctmgr", code=1, err="You are not running a supported accounting_storage plugin")
    run.on("sbatch", "--test-only", err="sbatch: Job 7 to start at once\n")


@pytest.mark.usefixtures("_looks")
def test_nothing_is_submitted_where_it_is_not_wanted_or_would_be_refused(
    monkeypatch: pytest.MonkeyPatch, target: Target, fake_run: FakeRun
) -> None:
    import dataclasses

    sandbox_answers(fake_run)
    here = sections(monkeypatch, target, fake_run, job=False)
    assert [section.name for section in here] == ["this machine", "training", "Slurm", "a node"]
    assert here[-1].results == [blind("a node", "--no-job: nothing was submitted", needed=False)]
    nowhere = dataclasses.replace(target, partition="nope")
    there = sections(monkeypatch, nowhere, fake_run)
    assert there[-1].results[0].found.startswith("nothing was submitted: Slurm would not take it")
    fake_run.on("sbatch", "--test-only", code=1, err="allocation failure: Requested node ...\n")
    (script,) = [
        result
        for result in sections(monkeypatch, target, fake_run, job=False)[2].results
        if result.check == "job script"
    ]
    assert script.grade is Grade.FAILED
    assert script.found.endswith("allocation failure: Requested node ...")
    fake_run.on("scontrol", code=1, err="Unable to contact slurm controller (connect failure)")
    silent = sections(monkeypatch, target, fake_run)
    assert [result.grade for result in silent[2].results] == [Grade.PASSED, Grade.BLIND]
    assert silent[-1].results[0].grade is Grade.BLIND
    assert not [call for call in fake_run.calls if call[0] == "sbatch" and call[1] != "--test-only"]


def test_secrets_are_never_told(
    monkeypatch: pytest.MonkeyPatch, target: Target, fake_run: FakeRun
) -> None:
    sandbox_answers(fake_run)
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setattr(surroundings, "missing_commands", list)
    scope = doctor.Scope(job=False)
    env = {"WANDB_API_KEY": "verysecret"}
    found = doctor.examine(target, scope, Slurm(fake_run), env, lambda line: None)
    text = doctor.as_json(found) + "\n".join(doctor.lines(found))
    assert "verysecret" not in text
    checks = {result.check: result.found for section in found for result in section.results}
    assert checks["Hugging Face token"] == "present"
    assert checks["W&B key"].startswith("present")


def test_the_table_in_its_three_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    found = [
        Section(
            name="Slurm", results=[passed("version", "22.05"), failed("nodes", "none", "wait")]
        ),
        Section(name="a node", results=[blind("a node", "busy")]),
    ]
    assert list(doctor.lines(found)) == [
        "== Slurm",
        "passed         version: 22.05",
        "failed         nodes: none",
        "                 remedy: wait",
        "== a node",
        "could not look a node: busy",
        "doctor: 1 passed, 1 failed, 1 could not look",
    ]
    data = json.loads(doctor.as_json(found))
    assert data["exit_code"] == 1
    assert data["sections"][0]["checks"][1] == {
        "check": "nodes",
        "result": "failed",
        "found": "none",
        "remedy": "wait",
        "needed": True,
    }
    doctor.show(found, Console(width=100, color_system=None))
    shown = capsys.readouterr().out
    assert re.search(r"nodes +failed +none", shown)
    assert "→ wait" in shown


def test_an_error_line_is_taken_apart() -> None:
    result = doctor._of_error("c", "no tokenizer in x (of y): run `z` on the login node first")
    assert (result.found, result.remedy) == (
        "no tokenizer in x (of y)",
        "run `z` on the login node first",
    )
    assert doctor._of_error("c", "it is odd").remedy == "mend that"


def test_every_check_is_documented() -> None:
    """Each row of the table has its row in docs/doctor.md."""
    page = (REPOSITORY / "docs" / "doctor.md").read_text()
    documented = set(re.findall(r"^\| ([^|]+?) \|", page, re.MULTILINE)) - {"check", "---"}
    said: set[str] = set()
    for name in ("checks_here", "checks_slurm", "checks_training", "checks_node", "doctor"):
        text = (REPOSITORY / "launcher" / f"{name}.py").read_text()
        said |= set(
            re.findall(
                r'\b(?:passed|warning|failed|blind|make|_known|_unknown)\(\s*(?:config, )?"([^"]+)"',
                text,
            )
        )
    assert said, "the pattern finds nothing"
    assert said - documented == set()
