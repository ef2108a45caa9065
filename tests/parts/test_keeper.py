"""A replica group is kept going, with programs that stand in for torchrun."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher import keeper, lease, nodecheck, orders, restarts, spares, stacks
from launcher.config import Site
from launcher.environment import Task
from launcher.keeper import ELSEWHERE_CODE, Keeper
from launcher.model import KitError
from launcher.plan import Plan
from launcher.records import endings_in
from launcher.relay import Relay
from launcher.restarts import Limits
from launcher.rundir import RunDir
from launcher.slurm import Slurm
from tests.conftest import FakeRun
from tests.unit.conftest import MANIFEST

#: Begins a rank that uses this kit's modules.
HERE = f"import sys, time\nsys.path.insert(0, {str(Path(keeper.__file__).parent.parent)!r})\n"


@pytest.fixture
def keep(run: RunDir, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Keeper]:
    """Makes a keeper of replica group 1 whose attempts run the given Python texts, in turn."""
    monkeypatch.setattr(keeper, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(keeper, "REQUEUE_SECONDS", 0.05)
    monkeypatch.setattr(restarts, "PAUSES", (0.0,))

    monkeypatch.setattr(keeper, "STAND_BY_EVERY", 0.05)

    def make(
        *texts: str,
        limits: Limits | None = None,
        host: str = "w0",
        index: int = 1,
        warm: str = "1",
        nodes: tuple[str, ...] = (),
    ) -> Keeper:
        def flags(task: Task) -> list[str]:
            return [texts[min(task.attempt, len(texts)) - 1]]

        def argv(folder: Path, flags: list[str]) -> list[str]:
            return [sys.executable, "-c", *(flags or [STAND_BY])]

        plan = Plan(
            env={"PATH": os.environ["PATH"]},
            site=Site.from_environment(
                {"TFT_DEVICE": "cpu", "TFT_OUTPUTS": str(run.path.parent), "TFT_WARM": warm}
            ),
            manifest=MANIFEST,
            run=run,
            limits=limits or Limits(),
            flags=flags,
            argv=argv,
            slurm_task="50_1",
        )
        return Keeper(
            plan, Task(replica=index, index=index, node=host, nodes=nodes), Slurm(fake_run)
        )

    return make


#: What a spare's rank does: it waits for its assignment, and is what that says.
STAND_BY = (
    f"import sys; sys.path.insert(0, {str(Path(keeper.__file__).parent.parent)!r})\n"
    "import os\n"
    "from launcher.train.rank import await_assignment\n"
    "await_assignment(os.environ['TFT_STANDBY'])\n"
    "exec(sys.argv[1])\n"
)


def events(run: RunDir, kind: str) -> list[dict[str, Any]]:
    lines = run.events(1).read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


FAIL = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def test_a_crash_is_mended_in_place(keep: Callable[..., Keeper], run: RunDir) -> None:
    assert keep(FAIL, "").run() == 0
    first, second = events(run, "exit")
    assert (first["next"], first["code"], first["attempt"]) == ("restarted in place", 137, 1)
    assert (second["code"], second["attempt"]) == (0, 2)
    assert [launch["attempt"] for launch in events(run, "launch")] == [1, 2]
    assert run.finished.exists()


def test_too_many_crashes_are_requeued_under_the_tasks_own_name(
    keep: Callable[..., Keeper], run: RunDir, fake_run: FakeRun
) -> None:
    fake_run.on("scontrol", "requeue", "50_1")
    assert keep(FAIL, limits=Limits(here=1)).run() == ELSEWHERE_CODE
    assert [e["next"] for e in events(run, "exit")] == ["restarted in place", "requeued"]
    assert fake_run.calls == [("scontrol", "requeue", "50_1")]
    # A later start knows of the earlier ones.
    assert keep(FAIL, limits=Limits(here=1, elsewhere=1)).run() == 137
    assert events(run, "exit")[-1]["next"] == "given up"
    assert len(endings_in(run.endings(1))) == 3


def test_a_mistake_is_not_retried_for_ever(keep: Callable[..., Keeper], run: RunDir) -> None:
    script = (
        "import json, os, sys; json.dump([{'rank': 0, 'local_rank': 0, 'pid': os.getpid(), "
        "'exit_code': 1, 'time': 1, 'message': 'KeyError: nope'}], "
        "open(os.environ['TFT_FAILURES'], 'w')); sys.exit(1)"
    )
    assert keep(script).run() == 1
    last = events(run, "exit")[-1]
    assert (last["attempt"], last["next"]) == (2, "given up")
    assert "mend the configuration" in last["why"]


def test_an_order_ends_a_hung_attempt(keep: Callable[..., Keeper], run: RunDir) -> None:
    hang = HERE + (
        "from launcher import orders\n"
        "from pathlib import Path\n"
        f"orders.give(Path({str(run.orders)!r}), 'restart', replica=1, attempt=1, why='hung: in a test')\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    assert keep(hang, "").run() == 0
    assert time.monotonic() - started < 20
    assert events(run, "exit")[0]["reason"] == "hung: in a test"


def test_of_several_nodes_the_one_to_blame_is_remembered(
    keep: Callable[..., Keeper], run: RunDir, fake_run: FakeRun
) -> None:
    unfit = (
        "import json, os, sys\n"
        "told = [{'unfit': 'w1: the fan is off', 'node': 'w1'}]\n"
        "json.dump(told, open(os.environ['TFT_FAILURES'], 'w')); sys.exit(1)"
    )
    fake_run.on("scontrol", "requeue", "50_1")
    assert keep(FAIL, unfit, nodes=("w0", "w1")).run() == ELSEWHERE_CODE
    crash, left = events(run, "exit")
    assert (crash["node"], left["node"]) == ("", "w1")
    assert left["reason"] == "unfit node: w1: the fan is off"
    assert left["why"] == "w1 is unfit"
    assert [ending.host for ending in endings_in(run.endings(1))] == ["w0, w1", "w1"]
    assert events(run, "launch")[0]["nodes"] == ["w0", "w1"]


@pytest.mark.parametrize(
    ("reaches", "node", "why"),
    [
        (True, "w1", "unfit node: w1 does not answer any more"),
        (False, "w0", "unfit node: w0 reaches neither w1 nor the lighthouse"),
    ],
)
def test_a_node_that_is_cut_off_does_not_blame_the_others(
    keep: Callable[..., Keeper],
    run: RunDir,
    fake_run: FakeRun,
    monkeypatch: pytest.MonkeyPatch,
    reaches: bool,
    node: str,
    why: str,
) -> None:
    monkeypatch.setattr(Relay, "reaches", lambda self: reaches)
    silent = (
        "import json, os, sys\n"
        f"told = [{{'unfit': 'w1 {restarts.SILENT}', 'node': 'w1'}}]\n"
        "json.dump(told, open(os.environ['TFT_FAILURES'], 'w')); sys.exit(1)"
    )
    fake_run.on("scontrol", "requeue", "50_1")
    assert keep(silent, nodes=("w0", "w1")).run() == ELSEWHERE_CODE
    (exit_event,) = events(run, "exit")
    assert (exit_event["node"], exit_event["reason"]) == (node, why)


def test_the_leader_of_several_nodes_is_asked_for_their_stacks(
    keep: Callable[..., Keeper], run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "SECONDS", 0.1)
    asked = tmp_path / "asked"
    hang = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGQUIT, lambda *a: open({str(asked)!r}, 'w').close())\n"
        f"sys.path.insert(0, {str(Path(keeper.__file__).parent.parent)!r})\n"
        "from launcher import orders\n"
        "from pathlib import Path\n"
        f"orders.give(Path({str(run.orders)!r}), 'restart', replica=1, attempt=1, why='hung: x')\n"
        "while True: time.sleep(1)"
    )
    assert keep(hang, "", nodes=("w0", "w1")).run() == 0
    assert asked.exists()


def test_an_old_copy_is_fenced(keep: Callable[..., Keeper], run: RunDir) -> None:
    take = HERE + (
        "from launcher import lease\n"
        "from pathlib import Path\n"
        f"lease.take(Path({str(run.lease(1))!r}), replica=1, task=1, host='elsewhere')\n"
        "time.sleep(60)"
    )
    assert keep(take).run() == ELSEWHERE_CODE
    assert [e["kind"] for e in map(json.loads, run.events(1).read_text().splitlines())] == [
        "launch",
        "fenced",
    ]
    assert not run.finished.exists(), "an old copy has not finished anything"


def test_a_spare_becomes_the_group_it_is_told_to_be(
    keep: Callable[..., Keeper], run: RunDir, tmp_path: Path
) -> None:
    lease.take(run.lease(1), replica=1, task=1, host="lost")
    told: list[bool] = []

    def tell() -> None:
        deadline = time.monotonic() + 20
        while not spares.ready(run.groups) and time.monotonic() < deadline:
            time.sleep(0.02)
        told.append(bool(spares.ready(run.groups)))
        orders.give(run.orders, "take_over", replica=1, attempt=1, why="", task=2)

    thread = threading.Thread(target=tell)
    thread.start()
    out = tmp_path / "out"
    script = f"import os; open({str(out)!r}, 'w').write(os.environ['REPLICA_GROUP_ID'])"
    assert keep(script, index=2, host="w9").run() == 0
    thread.join()
    assert told == [True]
    assert out.read_text() == "1"
    (launch,) = events(run, "launch")
    assert (launch["task"], launch["host"], launch["attempt"]) == (2, "w9", 2)
    assert not spares.ready(run.groups)
    # The task whose place was taken finds nothing to do, and is a spare until the end.
    assert keep("raise SystemExit('never')").run() == 0


#: Commits a step, and is killed a second later.
TRAIN_AND_FAIL = (
    "import os, signal, time\n"
    "open(os.environ['TFT_EVENTS'], 'a').write('{\"kind\":\"commit\",\"committed\":true}\\n')\n"
    "time.sleep(1)\n"
    "os.kill(os.getpid(), signal.SIGKILL)"
)


@pytest.mark.parametrize("warm", ["1", "0"])
def test_ranks_wait_for_the_next_start_in_place(
    keep: Callable[..., Keeper], run: RunDir, tmp_path: Path, warm: str
) -> None:
    out = tmp_path / "out"
    say = f"import os; open({str(out)!r}, 'a').write(str('TFT_STANDBY' in os.environ) + ' ')"
    kept = keep(TRAIN_AND_FAIL, f"{say}\n{TRAIN_AND_FAIL}", say, warm=warm)
    assert kept.run() == 0
    waited = "True" if warm == "1" else "False"
    assert out.read_text() == f"{waited} {waited} "
    assert [e["attempt"] for e in events(run, "launch")] == [1, 2, 3]
    assert not psutil.Process().children(), "nobody waits any longer"


def test_ranks_that_wait_and_cannot_be_told_cost_a_bare_start(
    keep: Callable[..., Keeper],
    run: RunDir,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("launcher.standby.overwrite", full)
    assert keep(TRAIN_AND_FAIL, "pass").run() == 0
    assert [e["reason"] for e in events(run, "exit")][1:] == ["finished"]
    assert "cannot be told what to be: [Errno 28]" in capsys.readouterr().err
    assert not psutil.Process().children()


def test_ranks_that_wait_end_with_the_task(keep: Callable[..., Keeper], tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    train = TRAIN_AND_FAIL.replace("time.sleep(1)", f"time.sleep(1); open({str(alone)!r}, 'w')")
    train = train.replace("os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(60)")

    def stop() -> None:
        deadline = time.monotonic() + 20
        while not alone.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        found.extend(psutil.Process().children())
        os.kill(os.getpid(), signal.SIGTERM)

    found: list[psutil.Process] = []
    thread = threading.Thread(target=stop)
    thread.start()
    assert keep(train).run() == 128 + signal.SIGTERM
    thread.join()
    assert len(found) == 2
    assert not any(process.is_running() for process in found)


def test_a_task_that_is_told_to_end_does_not_become_a_spare(
    keep: Callable[..., Keeper], run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """A spare has taken its place while its ranks were ending."""

    def stop() -> None:
        deadline = time.monotonic() + 20
        while not psutil.Process().children() and time.monotonic() < deadline:
            time.sleep(0.02)
        lease.take(run.lease(1), replica=1, task=2, host="w9")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert keep("import time; time.sleep(60)").run() == 128 + signal.SIGTERM
    thread.join()
    assert "stand ready" not in capsys.readouterr().out


def test_the_watch_of_an_attempt_that_is_over_ends_no_other(keep: Callable[..., Keeper]) -> None:
    kept, over = keep("pass"), threading.Event()
    over.set()
    kept._end_attempt(over, "hung")
    assert kept._must_end == ""
    kept._end_attempt(threading.Event(), "hung")
    assert kept._must_end == "hung"


def test_an_order_that_is_read_late_changes_nothing(
    keep: Callable[..., Keeper], run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """The group has come back by itself meanwhile."""
    lease.take(run.lease(1), replica=1, task=1, host="lost")
    lease.take(run.lease(1), replica=1, task=1, host="back")

    def tell() -> None:
        deadline = time.monotonic() + 20
        while not spares.ready(run.groups) and time.monotonic() < deadline:
            time.sleep(0.02)
        orders.give(run.orders, "take_over", replica=1, attempt=1, why="", task=2)
        time.sleep(1.0)
        run.finished.write_text("{}")

    thread = threading.Thread(target=tell)
    thread.start()
    assert keep("raise SystemExit('never')", index=2).run() == 0
    thread.join()
    assert not run.events(1).exists()


def test_a_full_disk_at_the_last_step_is_no_failure(
    keep: Callable[..., Keeper], run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> bool:
        raise KitError("cannot write finished.json: No space left on device")

    monkeypatch.setattr(keeper, "create_once", full)
    assert keep("").run() == 0
    assert events(run, "exit")[-1]["code"] == 0


def test_a_watch_that_fails_is_noticed(
    keep: Callable[..., Keeper], run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = iter([True])

    def broken(*args: Any) -> bool:
        if next(fails, False):
            raise ValueError("in a test")
        return False

    monkeypatch.setattr(lease, "lost", broken)
    assert keep("import time; time.sleep(60)", "").run() == 0
    assert events(run, "exit")[0]["reason"] == "its watch failed: in a test"


def test_a_spare_ends_with_the_run(keep: Callable[..., Keeper], run: RunDir) -> None:
    thread = threading.Timer(1.0, lambda: run.finished.write_text("{}"))
    thread.start()
    assert keep(index=2).run() == 0
    assert not run.events(2).exists()


def test_an_unfit_node_is_left(
    keep: Callable[..., Keeper], run: RunDir, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unfit(*args: Any, **kwargs: Any) -> None:
        raise nodecheck.UnfitNodeError("GPU 3 does not answer")

    monkeypatch.setattr(nodecheck, "check", unfit)
    fake_run.on("scontrol", "requeue", "50_1")
    assert keep("raise SystemExit('never run')").run() == ELSEWHERE_CODE
    (exit_event,) = events(run, "exit")
    assert exit_event["reason"] == "unfit node: GPU 3 does not answer"
    assert exit_event["next"] == "requeued"
    # With no requeue left, its exit code asks for none either.
    assert keep("raise SystemExit('never run')", limits=Limits(elsewhere=0)).run() == 1


def test_a_stopped_task_is_not_started_again(keep: Callable[..., Keeper], run: RunDir) -> None:
    stop = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"
    assert keep(stop).run() == 128 + signal.SIGTERM
    (exit_event,) = events(run, "exit")
    assert exit_event["reason"] == "stopped by SIGTERM"
