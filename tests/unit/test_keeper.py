"""A replica group is kept going: restarts, budgets, leases, orders, and unfit nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher import keeper, lease, nodecheck, orders, restarts, spares, stacks, timeouts
from launcher.config import Site
from launcher.environment import Task
from launcher.keeper import ELSEWHERE_CODE, Keeper
from launcher.model import KitError
from launcher.plan import Plan
from launcher.records import endings_in
from launcher.restarts import UNFIT, Ending, Limits, Next, decide
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.slurm import Slurm
from tests.conftest import FakeRun

MANIFEST = Manifest(
    run="tft-50", array_job_id=50, group_size=2, ranks_per_group=1, config="c.toml",
    lighthouse="http://127.0.0.1:1",
)  # fmt: skip


def end(t: float, reason: str = "rank 0 (pid 7) was killed by SIGKILL", *, trained: bool = True,
        host: str = "w0") -> Ending:  # fmt: skip
    return Ending(t=t, host=host, reason=reason, trained=trained)


# -- what to do next ---------------------------------------------------------------------


def test_a_crash_is_mended_in_place_and_the_budget_refills() -> None:
    endings = []
    for t in (0.0, 10.0, 20.0):
        endings.append(end(t))
        decision = decide(endings, Limits(), t)
        assert (decision.next, decision.pause) == (Next.HERE, 0.0), "it makes progress"
    endings.append(end(30.0))
    assert decide(endings, Limits(), 30.0).next is Next.ELSEWHERE
    endings.append(end(30.0 + restarts.HERE_WINDOW))
    assert decide(endings, Limits(), 30.0 + restarts.HERE_WINDOW).next is Next.HERE


def test_pauses_grow_while_there_is_no_progress() -> None:
    endings = [end(float(t), trained=False) for t in range(5)]
    pauses = [decide(endings[:n], Limits(here=9), 5.0).pause for n in range(1, 6)]
    assert pauses == [2.0, 10.0, 30.0, 30.0, 30.0]
    assert decide([*endings, end(5.0)], Limits(here=9), 5.0).pause == 0.0


def test_many_moves_without_a_step_are_the_end() -> None:
    limits = Limits(here=0, elsewhere=10)
    endings = [end(float(t), host=f"w{t}", trained=False) for t in range(12)]
    assert decide(endings[:10], limits, 10.0).next is Next.ELSEWHERE
    last = decide(endings, limits, 12.0)
    assert last.next is Next.NEVER
    assert "TFT_REQUEUES" in last.why
    # A run that makes progress is never given up, however often it fails.
    assert decide([*endings, end(13.0, host="x")], limits, 13.0).next is Next.ELSEWHERE


def test_the_same_error_twice_before_the_first_step_is_a_mistake() -> None:
    mistake = "rank {} (pid {}) exited with code 1: KeyError: 'dataset'"
    one = end(0.0, mistake.format(0, 100), trained=False)
    other = end(9.0, mistake.format(1, 222), trained=False)
    assert decide([one], Limits(), 0.0).next is Next.HERE
    assert decide([one, other], Limits(), 9.0).next is Next.NEVER
    different = end(9.0, "rank 0 (pid 5) exited with code 1: ValueError: x", trained=False)
    assert decide([one, different], Limits(), 9.0).next is Next.HERE
    assert decide([one, end(9.0, one.reason, trained=True)], Limits(), 9.0).next is Next.HERE


@pytest.mark.parametrize(
    "reason",
    [
        "rank 0 (pid 7) was killed by SIGKILL",
        "rank 1 (pid 7) exited with code 1: RuntimeError: Connection reset by peer",
        "rank 1 (pid 7) exited with code 1: RuntimeError: status: DeadlineExceeded, Timeout expired",
        "hung: did not join the quorum that others waited 9 s for",
    ],
)
def test_what_may_pass_is_no_mistake(reason: str) -> None:
    endings = [end(t, reason, trained=False) for t in (0.0, 5.0)]
    assert decide(endings, Limits(), 5.0).next is Next.HERE


def test_a_device_that_fails_twice_is_left() -> None:
    reason = "rank 3 (pid 7) exited with code 1: RuntimeError: CUDA error: an illegal memory access"
    endings = [end(0.0, reason), end(60.0, reason)]
    assert decide(endings[:1], Limits(), 0.0).next is Next.HERE
    assert decide(endings, Limits(), 60.0).next is Next.ELSEWHERE


def test_an_unfit_node_is_left_at_once_and_switches_are_heeded() -> None:
    unfit = [end(0.0, f"{UNFIT}7 GPUs are seen, and 8 are needed", trained=False)]
    assert decide(unfit, Limits(), 0.0).next is Next.ELSEWHERE
    storm = [end(float(t), unfit[0].reason, trained=False) for t in range(11)]
    pauses = [decide(storm[:n], Limits(), 11.0).pause for n in range(1, 6)]
    assert pauses == [0.0, 2.0, 10.0, 30.0, 30.0]
    assert decide(storm, Limits(), 11.0).next is Next.NEVER, "or the check itself is wrong"
    assert decide([end(0.0)], Limits(here=0), 0.0).next is Next.ELSEWHERE
    assert decide([end(0.0)], Limits(here=0, elsewhere=0), 0.0).next is Next.NEVER


# -- leases and orders -------------------------------------------------------------------


def test_a_newer_start_takes_the_lease(hostile: Path) -> None:
    path = hostile / "groups" / "0.lease.json"
    assert lease.current(path) is None
    first = lease.take(path, replica=0, task=0, host="a" * 200)
    assert not lease.lost(path, first)
    second = lease.take(path, replica=0, task=3, host="b")
    assert (first.number, second.number) == (1, 2)
    assert lease.lost(path, first)
    assert not lease.lost(path, second)
    assert lease.current(path) == second
    # A damaged file changes nothing: a number is given out once.
    path.write_text('{"replica": 0, "num')
    assert lease.current(path) == second
    assert lease.lost(path, first)
    assert not lease.held(path, second), "who cannot see it, is not let through"
    assert lease.take(path, replica=0, task=0, host="c").number == 3
    path.write_text('{"replica": 0, "number": null, "task": 0, "host": "", "t": 0}')
    assert lease.take(path, replica=0, task=0, host="d").number == 4
    for file in path.parent.glob("0.*.taken"):
        file.write_text("")
    path.write_text("")
    with pytest.raises(KitError, match="cannot be read"):
        lease.take(path, replica=0, task=0, host="e")


def test_two_who_take_a_lease_at_once_get_two_numbers(tmp_path: Path) -> None:
    path = tmp_path / "0.lease.json"
    got: list[lease.Lease] = []
    for _ in range(40):
        both = [
            threading.Thread(
                target=lambda: got.append(lease.take(path, replica=0, task=0, host="h"))
            )
            for _ in range(2)
        ]
        for one in both:
            one.start()
        for one in both:
            one.join()
        last = max(got, key=lambda one: one.number)
        assert [one for one in got if not lease.lost(path, one)] == [last]
    assert sorted(one.number for one in got) == list(range(1, 81))


def test_orders_are_for_one_attempt_and_grow_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "orders.jsonl"
    reader = orders.OrderReader(path)
    assert reader.restart(1, 1) is None
    for replica, attempt in ((0, 1), (1, 2), (1, 1)):
        orders.give(path, "restart", replica=replica, attempt=attempt, why=f"{replica}.{attempt}")
    orders.give(path, "take_over", replica=1, attempt=1, why="spare", task=7)
    with path.open("a") as file:
        file.write("not json\n{}\n")
    found = reader.restart(1, 1)
    assert found is not None
    assert found.why == "1.1"
    assert reader.restart(1, 1) is None, "an order is obeyed once"
    taken = orders.OrderReader(path).take_over(7)
    assert taken is not None
    assert (taken.replica, taken.why) == (1, "spare")
    assert orders.OrderReader(path).take_over(6) is None
    monkeypatch.setattr(orders, "VALID_SECONDS", -1.0)
    assert orders.OrderReader(path).restart(1, 2) is None


def test_a_task_keeps_its_group_until_a_spare_has_it(run: RunDir) -> None:
    assert [spares.role(run, MANIFEST, task) for task in (0, 1, 2)] == [0, 1, None]
    lease.take(run.lease(1), replica=1, task=1, host="a")
    assert spares.role(run, MANIFEST, 1) == 1
    lease.take(run.lease(1), replica=1, task=2, host="b")
    assert [spares.role(run, MANIFEST, task) for task in (0, 1, 2)] == [0, None, 1]


def test_a_spare_is_ready_while_it_says_so(tmp_path: Path) -> None:
    spare = spares.Spare(task=2, host="w2", t=100.0)
    spares.show(tmp_path, spare)
    spares.show(tmp_path, spares.Spare(task=10, host="a longer name", t=100.0))
    (tmp_path / "spare-11.json").write_text("{")
    assert [s.task for s in spares.ready(tmp_path, 105.0)] == [10, 2]
    assert not spares.ready(tmp_path, 100.0 + spares.FRESH)
    spares.withdraw(tmp_path, 10)
    assert spares.ready(tmp_path, 105.0) == [spare]


# -- the keeper, with programs that stand in for torchrun ----------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = Outputs(tmp_path).run_of_array(50)
    run.create(MANIFEST)
    return run


@pytest.fixture
def keep(run: RunDir, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Keeper]:
    """Makes a keeper of replica group 1 whose attempts run the given Python texts, in turn."""
    monkeypatch.setattr(keeper, "LOOK_EVERY", 0.05)
    monkeypatch.setattr(keeper, "REQUEUE_SECONDS", 0.05)
    monkeypatch.setattr(restarts, "PAUSES", (0.0,))

    monkeypatch.setattr(keeper, "STAND_BY_EVERY", 0.05)

    def make(*texts: str, limits: Limits | None = None, host: str = "w0", index: int = 1) -> Keeper:
        def flags(task: Task) -> list[str]:
            return [texts[min(task.attempt, len(texts)) - 1]]

        def argv(folder: Path, flags: list[str]) -> list[str]:
            return [sys.executable, "-c", *(flags or [STAND_BY])]

        plan = Plan(
            env={"PATH": os.environ["PATH"]},
            site=Site.from_environment({"TFT_DEVICE": "cpu", "TFT_OUTPUTS": str(run.path.parent)}),
            manifest=MANIFEST,
            run=run,
            limits=limits or Limits(),
            flags=flags,
            argv=argv,
            slurm_task="50_1",
        )
        return Keeper(plan, Task(replica=index, index=index, node=host), Slurm(fake_run))

    return make


#: What a spare's rank does: it waits for its assignment, and is what that says.
STAND_BY = (
    f"import sys; sys.path.insert(0, {str(Path(keeper.__file__).parent.parent)!r})\n"
    "import os\n"
    "from launcher.train.__main__ import await_assignment\n"
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
    hang = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(keeper.__file__).parent.parent)!r})\n"
        "from launcher import orders\n"
        "from pathlib import Path\n"
        f"orders.give(Path({str(run.orders)!r}), 'restart', replica=1, attempt=1, why='hung: in a test')\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    assert keep(hang, "").run() == 0
    assert time.monotonic() - started < 20
    assert events(run, "exit")[0]["reason"] == "hung: in a test"


def test_an_old_copy_is_fenced(keep: Callable[..., Keeper], run: RunDir) -> None:
    take = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(keeper.__file__).parent.parent)!r})\n"
        "from launcher import lease\n"
        "from pathlib import Path\n"
        f"lease.take(Path({str(run.lease(1))!r}), replica=1, task=1, host='elsewhere')\n"
        "time.sleep(60)"
    )
    assert keep(take).run() == 0
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


def test_a_stopped_task_is_not_started_again(keep: Callable[..., Keeper], run: RunDir) -> None:
    stop = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"
    assert keep(stop).run() == 128 + signal.SIGTERM
    (exit_event,) = events(run, "exit")
    assert exit_event["reason"] == "stopped by SIGTERM"


# -- nodes, stacks and timeouts ------------------------------------------------------------


class FakeNvml:
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 1

    def __init__(self, count: int, ecc: int = 0) -> None:
        self.count, self.ecc = count, ecc

    def nvmlInit(self) -> None: ...  # noqa: N802
    def nvmlShutdown(self) -> None: ...  # noqa: N802
    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index == 5:
            raise RuntimeError("GPU is lost")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> None: ...  # noqa: N802
    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:  # noqa: N802
        return self.ecc if handle == 2 else 0


def site(device: str = "cuda") -> Site:
    return Site.from_environment({"TFT_DEVICE": device})


def test_a_fit_node_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    nodecheck.check(site(), tmp_path, 4, nvml=FakeNvml(4))
    assert not list(tmp_path.iterdir())


def test_everything_wrong_with_a_node_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("slurm").mkdir()
    Path("slurm/node-check.sh").write_text("echo the fan is off; exit 1\n")
    with pytest.raises(nodecheck.UnfitNodeError) as error:
        nodecheck.check(site(), tmp_path, 8, nvml=FakeNvml(6, ecc=3))
    for part in (
        "6 GPUs are seen, and 8 are needed",
        "GPU 2 has had 3 uncorrected memory errors",
        "GPU 5 does not answer (GPU is lost)",
        "slurm/node-check.sh says: the fan is off",
    ):
        assert part in str(error.value)
    with pytest.raises(nodecheck.SharedFolderError, match="cannot be written"):
        nodecheck.check(site(), tmp_path / "not there", 4, nvml=FakeNvml(4))
    with pytest.raises(nodecheck.UnfitNodeError, match="GiB of memory are free, and 1000000 ranks"):
        nodecheck.check(site("cpu"), tmp_path, 1_000_000)


def test_stacks_are_written_by_a_hung_rank(tmp_path: Path) -> None:
    code = (
        "import os, json, time\n"
        "from launcher.train.__main__ import write_stacks_when_asked\n"
        "write_stacks_when_asked()\n"
        "def stuck_here(): time.sleep(60)\n"
        f"open({str(tmp_path / 'events')!r}, 'a').write(json.dumps({{'kind': 'start', 'rank': 0, "
        "'attempt': 1, 'pid': os.getpid()}, separators=(',', ':')) + chr(10))\n"
        "stuck_here()\n"
    )
    env = {**os.environ, "TFT_STACKS": str(tmp_path), "RANK": "0"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        deadline = time.monotonic() + 20
        while not stacks.rank_pids(tmp_path / "events", 1):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
        files = stacks.collect(tmp_path, tmp_path / "events", attempt=1, start=0)
        assert [file.name for file in files] == ["stacks.0.txt"]
        assert "stuck_here" in files[0].read_text()
        # Nobody else's process is ever signalled.
        assert not stacks._is_ours(os.getpid(), tmp_path)
    finally:
        process.kill()
        process.wait()


def test_the_order_of_timeouts_is_checked() -> None:
    good = {
        "process_group_timeout_ms": 30_000,
        "train_timeout_seconds": 100,
        "init_timeout_seconds": 300,
    }
    assert not list(timeouts.problems(good, 600))
    (problem,) = timeouts.problems(good | {"process_group_timeout_ms": 100_000}, 600)
    assert "process_group_timeout_ms (100 s) must be shorter than train_timeout_seconds" in problem
    (problem,) = timeouts.problems(good, 38)
    assert "must be longer than" in problem
    assert not list(timeouts.problems(dict.fromkeys(good), 600))


def test_stacks_are_those_of_a_spare_that_became_the_group(tmp_path: Path) -> None:
    """Its environment, as the kernel shows it, is the spare's for ever."""
    code = "import time; print('up', flush=True); time.sleep(60)"
    for mark, ours in (
        (f"TFT_FAILURES={tmp_path}/ranks/spare-2.1/failures.json", True),
        (f"TFT_FAILURES={tmp_path}/ranks/2.1/failures.json", False),
        (f"TFT_STACKS={tmp_path}/ranks/1.2", True),
        (f"TFT_STACKS={tmp_path}/ranks/1.22", False),
    ):
        name, _, value = mark.partition("=")
        with subprocess.Popen(
            [sys.executable, "-c", code], env={name: value}, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert stacks._is_ours(process.pid, tmp_path / "ranks" / "1.2") is ours
            process.kill()
