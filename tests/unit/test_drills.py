"""Drills: the table is whole, what is printed is what is run, and everything is put back."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from launcher import growth, hands
from launcher.drill import Drill, whole
from launcher.drill_command import commands, confirm, duration
from launcher.drill_verdict import Before, Outcome, Story, judge
from launcher.drills import KINDS, OPERATOR, STAGES, Stage, Target, describe
from launcher.events import Event
from launcher.incidents import Incident
from launcher.inject import Injector, aim
from launcher.lighthouse import Address, LighthouseDir
from launcher.lighthouse_log import Waiting
from launcher.model import KitError, UsageError
from launcher.process import start_time
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.slurm import Slurm
from launcher.soak import Active, begin, room, schedule
from launcher.soak_report import Cost, Planned, Soak, quantile, unexplained
from launcher.state import RunState
from launcher.verdict import Check
from tests.conftest import REPOSITORY, FakeRun
from tests.unit.test_guardian import training

ISSUE = [
    "node-down",
    "node-drain",
    "node-crash",
    "network-cut",
    "requeue",
    "preempt",
    "time-limit",
    "kill-rank",
    "kill-replica",
    "kill-rpc",
    "segfault",
    "oom",
    "hang",
    "stop",
    "slow",
    "disk-full",
    "lighthouse-kill",
    "lighthouse-freeze",
]

TARGET = Target(
    run="/o/torchft/tft-60",
    array=60,
    task=1,
    node="worker-1",
    replica=1,
    pids=(500, 501),
    member="torchtitan_ft_1:abc",
    lighthouse="http://login:29510",
    supervisor=(77, 1000.0),
    sandbox="/run/box",
    partition="urgent",
    time_limit="UNLIMITED",
)


def typed(kind: str, target: Target = TARGET) -> list[str]:
    return [line[4:] for line in commands(KINDS[kind], target) if line.startswith("  $ ")]


def test_every_kind_is_there_and_says_what_it_does() -> None:
    assert list(KINDS) == ISSUE
    docs = (REPOSITORY / "docs" / "drills.md").read_text()
    for name, kind in KINDS.items():
        assert kind.name == name
        assert f"| `{name}` |" in docs, "docs/drills.md has a row for it"
        assert kind.steps(TARGET)
        assert all(step.argv for step in [*kind.steps(TARGET), *kind.restore(TARGET)])
        text = " ".join(describe(kind))
        assert kind.does in text
        assert kind.rights in text
        assert kind.follows.value in text
        limits = [kind.deadline(stage) for stage in STAGES[kind.follows]]
        assert limits == sorted(limits), f"the deadlines of {name} are in order"
        assert kind.restore_after is None or kind.restore_after in STAGES[kind.follows]


def test_what_lasts_is_put_back() -> None:
    for name in ("node-down", "node-drain", "node-crash", "network-cut", "time-limit", "stop",
                 "slow", "disk-full", "lighthouse-freeze", "oom"):  # fmt: skip
        assert KINDS[name].restore(TARGET), name


FLAGS = ["--job-name=tft-drill", "--nodes=1", "--ntasks=1", "--time=5", "--partition=urgent"]
HANDS = "python -m launcher.hands"
GOLDEN = {
    "node-down": [
        "scontrol update NodeName=worker-1 State=DOWN Reason=drill",
        "scontrol update NodeName=worker-1 State=RESUME",
    ],
    "node-crash": [
        "python -m launcher sandbox crash worker-1 --dir=/run/box",
        "python -m launcher sandbox restart worker-1 --dir=/run/box",
    ],
    "network-cut": [
        "python -m launcher sandbox cut worker-1 --dir=/run/box",
        "python -m launcher sandbox heal worker-1 --dir=/run/box",
    ],
    "requeue": ["scontrol requeue 60_1"],
    "preempt": [
        f"srun {' '.join(FLAGS)} --nodelist=worker-1 --exclusive sleep 20 &",
    ],
    "time-limit": [
        "scontrol update JobId=60_1 TimeLimit=1",
        "scontrol requeue 60_1 (if it has ended)",
        "scontrol update JobId=60_1 TimeLimit=UNLIMITED",
    ],
    "kill-rank": [f"{HANDS} signal KILL --run=/o/torchft/tft-60 --pid=500"],
    "kill-replica": [f"{HANDS} signal KILL --whole-task --run=/o/torchft/tft-60 --pid=500"],
    "kill-rpc": [f"{HANDS} rpc http://login:29510 torchtitan_ft_1:abc"],
    "stop": [
        f"{HANDS} signal STOP --run=/o/torchft/tft-60 --pid=500 --pid=501",
        f"{HANDS} signal CONT --run=/o/torchft/tft-60 --pid=500 --pid=501",
    ],
    "slow": [
        f"{HANDS} slow 20 --run=/o/torchft/tft-60 --pid=500 --pid=501 &",
        f"{HANDS} signal CONT --run=/o/torchft/tft-60 --pid=500 --pid=501",
    ],
    "lighthouse-kill": [f"{HANDS} lighthouse KILL --pid=77 --started=1000.00"],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_a_dry_run_prints_what_is_run(kind: str, fake_run: FakeRun) -> None:
    assert typed(kind) == GOLDEN[kind]
    # … and that is run: nothing else is answered.
    going: list[tuple[str, ...]] = []
    fake_run.on("scontrol")
    fake_run.on("python", "-m")
    fake_run.on("squeue", out="61|60|1|RUNNING|worker-1|N/A|None\n")
    injector = Injector(Slurm(fake_run), lambda line: None, run=fake_run, start=background(going))
    injector.inject(KINDS[kind], TARGET)
    injector.restore(KINDS[kind], TARGET)
    ran = [" ".join(call) for call in fake_run.calls if call[0] != "squeue"]
    ran += [" ".join(call) + " &" for call in going]
    assert sorted(ran) == sorted(x for x in GOLDEN[kind] if "if it has ended" not in x)


def test_another_nodes_ranks_are_reached_through_their_own_job() -> None:
    at_node = ("srun", "--jobid=61", "--overlap")
    (line,) = typed("kill-rank", dataclasses.replace(TARGET, at_node=at_node))
    assert line == f"srun --jobid=61 --overlap {GOLDEN['kill-rank'][0]}"


class Going:
    """A command in the background."""

    ended = False

    def poll(self) -> int | None:
        return 0 if self.ended else None

    def terminate(self) -> None:
        self.ended = True

    def wait(self, timeout: float | None = None) -> int:
        assert self.ended, "it is ended before it is waited for"
        return 0


def background(calls: list[tuple[str, ...]]) -> Callable[[Sequence[str]], Going]:
    def start(argv: Sequence[str]) -> Going:
        calls.append(tuple(argv))
        return Going()

    return start


# -- putting back ----------------------------------------------------------------------------


def test_a_step_that_fails_leaves_nothing_changed(fake_run: FakeRun) -> None:
    fake_run.on("scontrol", "update", "NodeName=worker-1", "State=DOWN", code=1,
                err="slurm_update error: Access/permission denied")  # fmt: skip
    fake_run.on("scontrol", "update", "NodeName=worker-1", "State=RESUME")
    injector = Injector(Slurm(fake_run), lambda line: None, run=fake_run)
    with pytest.raises(KitError, match="permission denied"):
        injector.inject(KINDS["node-down"], TARGET)
    assert fake_run.calls[-1][-1] == "State=RESUME"


def test_an_interrupt_while_it_is_made_puts_everything_back() -> None:
    calls: list[str] = []

    def run(argv: Sequence[str]) -> Any:
        calls.append(argv[-1])
        if argv[-1].startswith("State=DOWN") or "Reason=drill" in argv:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess([], 0)

    fake = FakeRun()
    fake.on("scontrol")

    def either(argv: Sequence[str]) -> Any:
        run(argv)
        return fake(argv)

    injector = Injector(Slurm(fake), lambda line: None, run=either)
    with pytest.raises(KeyboardInterrupt):
        injector.inject(KINDS["node-down"], TARGET)
    assert calls == ["Reason=drill", "State=RESUME"]


def test_a_node_that_slurm_has_taken_back_need_not_be_resumed(fake_run: FakeRun) -> None:
    fake_run.on("scontrol", code=1, err="Invalid node state specified")
    fake_run.on("sinfo", out="worker-1|idle|none\n")
    injector = Injector(Slurm(fake_run), lambda line: None, run=fake_run)
    assert injector.restore(KINDS["node-down"], TARGET) == []
    fake_run.on("sinfo", out="worker-1|down|drill\n")
    (problem,) = injector.restore(KINDS["node-down"], TARGET)
    assert "Invalid node state" in problem


def test_a_task_that_has_ended_is_requeued_and_one_that_runs_is_not(fake_run: FakeRun) -> None:
    fake_run.on("scontrol")
    injector = Injector(Slurm(fake_run), lambda line: None, run=fake_run)
    fake_run.on("squeue", out="61|60|1|RUNNING|worker-1|N/A|None\n")
    injector.restore(KINDS["time-limit"], TARGET)
    assert ("scontrol", "requeue", "60_1") not in fake_run.calls
    fake_run.on("squeue", out="61|60|1|TIMEOUT|worker-1|N/A|None\n")
    injector.restore(KINDS["time-limit"], TARGET)
    assert ("scontrol", "requeue", "60_1") in fake_run.calls


# -- aiming ------------------------------------------------------------------------------------


@pytest.fixture
def scene(tmp_path: Path) -> tuple[RunDir, Manifest]:
    run = Outputs(tmp_path).run_of_array(60)
    manifest = Manifest(
        run="tft-60",
        array_job_id=60,
        group_size=2,
        ranks_per_group=1,
        config="c",
        lighthouse="http://127.0.0.1:1",
        lighthouse_name="127.0.0.1-1",
    )
    return run, run.create(manifest)


def aimed(scene: tuple[RunDir, Manifest], fake_run: FakeRun, kind: str, **choice: Any) -> Target:
    env = choice.pop("env", {})
    fake_run.on("squeue", "--noheader", "--array", out="61|60|1|RUNNING|w1|N/A|None\n")
    return aim(KINDS[kind], *scene, training(), Slurm(fake_run), env, **choice)


def test_only_a_group_of_this_run_is_aimed_at(
    scene: tuple[RunDir, Manifest], fake_run: FakeRun
) -> None:
    target = aimed(scene, fake_run, "kill-rank")
    assert (target.replica, target.name, target.node) == (1, "60_1", "w1")
    assert target.member == "torchtitan_ft_1:u1"
    assert target.at_node[:2] == ("srun", "--jobid=61"), "no process of it is on this machine"
    assert aimed(scene, fake_run, "kill-rank", node="w0").replica == 0
    for choice, why in (
        ({"replica": 7}, "0 to 1"),
        ({"node": "elsewhere"}, "no replica group of tft-60"),
        ({"node": "w0", "replica": 1}, "replica 0 runs on w0"),
        ({"rank": 3}, "ranks"),
    ):
        with pytest.raises(UsageError, match=why):
            aimed(scene, fake_run, "kill-rank", **choice)


def test_what_would_hit_others_is_refused(
    scene: tuple[RunDir, Manifest], fake_run: FakeRun, tmp_path: Path
) -> None:
    fake_run.on("squeue", "--noheader", "--nodelist=w1", out="60\n99\n")
    with pytest.raises(UsageError, match="job 99 of another run"):
        aimed(scene, fake_run, "node-down")
    for kind in ("node-crash", "network-cut"):
        with pytest.raises(UsageError, match="for a sandbox"):
            aimed(scene, fake_run, kind)
    with pytest.raises(UsageError, match="no lighthouse is published"):
        aimed(scene, fake_run, "lighthouse-kill")
    fake_run.on("squeue", "--noheader", "--nodelist=w1", out="60\n")
    with pytest.raises(UsageError, match="--partition"):
        aimed(scene, fake_run, "preempt")
    box = tmp_path / "box"
    box.mkdir()
    (box / ".tft-sandbox").touch()
    env = {"SLURM_CONF": str(box / "slurm.conf")}
    assert aimed(scene, fake_run, "network-cut", env=env).sandbox == str(box)
    assert aimed(scene, fake_run, "preempt", env=env).partition == "urgent"


def test_the_lighthouse_is_that_of_the_run(
    scene: tuple[RunDir, Manifest], fake_run: FakeRun
) -> None:
    folder = LighthouseDir.of_run(*scene)
    here = Address(
        url="http://127.0.0.1:1",
        host=os.uname().nodename,
        port=1,
        pid=os.getpid(),
        process_started=start_time(os.getpid()),
        user="me",
        started=0.0,
    )
    folder.publish(here)
    assert aimed(scene, fake_run, "lighthouse-kill").supervisor[0] == os.getpid()
    folder.publish(dataclasses.replace(here, host="another"))
    with pytest.raises(UsageError, match="run the drill there"):
        aimed(scene, fake_run, "lighthouse-kill")


def test_nobody_breaks_a_node_without_being_asked() -> None:
    told: list[str] = []
    confirm([KINDS["kill-rank"]], "it", lambda question: None, told.append)
    assert not told
    with pytest.raises(UsageError, match="add --yes"):
        confirm([KINDS["node-down"]], "it", lambda question: None, told.append)
    assert OPERATOR in told[0]
    with pytest.raises(UsageError, match="nothing was done"):
        confirm([KINDS["kill-rank"]], "it", lambda question: False, told.append)
    confirm([KINDS["node-down"]], "it", lambda question: True, told.append)
    confirm([KINDS["node-down"]], "it", None, told.append)


# -- hands -------------------------------------------------------------------------------------


@pytest.fixture
def rank(tmp_path: Path) -> Any:
    """A process of a run in ``tmp_path`` that waits."""
    env = {**os.environ, "TFT_EVENTS": f"{tmp_path}/x.events.jsonl"}
    code = "import time; print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_only_a_process_of_the_run_is_touched(
    rank: subprocess.Popen[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["signal", "KILL", f"--pid={rank.pid}", f"--run={tmp_path}-other"]
    assert hands.main(words) == 1
    assert "no process of" in capsys.readouterr().err
    assert rank.poll() is None
    assert hands.main([*words[:3], f"--run={tmp_path}"]) == 0
    assert capsys.readouterr().out == "done: SIGKILL to 1 processes\n"
    assert rank.wait(10) == -signal.SIGKILL
    # Putting back what is gone is nothing to do.
    assert hands.main(["signal", "CONT", f"--pid={rank.pid}", f"--run={tmp_path}"]) == 0


def test_a_rank_that_does_not_listen_for_drills_is_left_alone(
    rank: subprocess.Popen[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in ("USR1", "USR2"):
        assert hands.main(["signal", number, f"--pid={rank.pid}", f"--run={tmp_path}"]) == 1
        assert "TFT_DRILLS=1" in capsys.readouterr().err
    assert rank.poll() is None


def test_limits_come_and_go(rank: subprocess.Popen[bytes], tmp_path: Path) -> None:
    which = [f"--pid={rank.pid}", f"--run={tmp_path}"]
    before = resource.prlimit(rank.pid, resource.RLIMIT_FSIZE)
    assert hands.main(["limit", "FSIZE", *which]) == 0
    assert resource.prlimit(rank.pid, resource.RLIMIT_FSIZE) == (0, before[1])
    assert hands.main(["limit", "FSIZE", "--free", *which]) == 0
    assert resource.prlimit(rank.pid, resource.RLIMIT_FSIZE) == (before[1], before[1])
    assert hands.main(["limit", "AS", *which]) == 0
    assert resource.prlimit(rank.pid, resource.RLIMIT_AS)[0] > hands.HEADROOM


@pytest.mark.parametrize("number", [None, signal.SIGTERM])
def test_a_slowed_process_goes_on_however_that_ends(
    rank: subprocess.Popen[bytes], tmp_path: Path, number: signal.Signals | None
) -> None:
    argv = [sys.executable, "-m", "launcher.hands", "slow", "0.6" if number is None else "60"]
    argv += [f"--pid={rank.pid}", f"--run={tmp_path}"]
    seen = set()
    with subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as slowing:
        deadline = time.monotonic() + 20
        while slowing.poll() is None and time.monotonic() < deadline:
            seen.add(state_of(rank.pid))
            if "T" in seen and number is not None:
                slowing.send_signal(number)
            time.sleep(0.02)
    assert seen >= {"S", "T"}
    assert state_of(rank.pid) == "S"


def state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_rank_hangs_and_runs_out_of_memory_when_told_to() -> None:
    code = (
        "import os, resource, signal, sys, time\n"
        "from launcher.train.__main__ import listen_for_drills\n"
        "listen_for_drills()\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20),) * 2)\n"
        "print('up', flush=True)\n"
        "while True: time.sleep(0.05)\n"
    )
    env = {**os.environ, "TFT_DRILLS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGUSR2)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "MemoryError" in err


# -- verdicts ----------------------------------------------------------------------------------


class Run:
    """A run that a failure happens to, told event by event."""

    def __init__(self, kind: str = "kill-rank", t: float = 200.0, size: int = 2) -> None:
        self.state, self.t = training(size), t
        self.story = Story(KINDS[kind], 1, Before.of(self.state, t))

    def say(self, after: float, kind: str, replica: int | None, **fields: Any) -> None:
        event = Event(t=self.t + after, kind=kind, replica=replica, fields=fields)
        self.state.apply(event)
        self.story.note(self.state, event)

    def quorum(self, after: float, *members: tuple[int, str, int]) -> None:
        entries = [(replica, uuid, step, "") for replica, uuid, step in members]
        number = self.state.quorum_id + 1
        self.say(after, "membership", None, quorum_id=number, members=entries)

    def lose(self, *, heal: bool = True, reason: str = "rank 0 was killed by SIGKILL") -> None:
        """Replica 1 is lost: noticed after 2 s, started again after 4, back after 8."""
        step = self.state.step
        self.say(0.5, "exit", 1, code=1, reason=reason)
        others = [replica for replica in self.state.groups if replica != 1]
        self.quorum(2, *[(replica, f"u{replica}", step) for replica in others])
        for other in others:
            self.say(2.5, "commit", other, rank=0, step=step, committed=False)
            self.say(3, "commit", other, rank=0, step=step, committed=True)
        self.say(4, "launch", 1, attempt=2, host="w1")
        if heal:
            back = [(replica, f"u{replica}", step + 1) for replica in others]
            self.quorum(6, *back, (1, "n1", 0))
            self.say(7, "heal", 1, rank=0, step=step + 1, source=0)
            for replica in self.state.groups:
                self.say(8, "commit", replica, rank=0, step=step + 1, committed=True)

    def weights(self, after: float, other: str = "a") -> None:
        for replica, digest in ((0, "a"), (1, other)):
            self.say(after, "weights", replica, rank=0, step=self.state.step, hash=digest)

    def judged(self, after: float, **options: Any) -> Outcome:
        self.story.look(self.state, self.t + after)
        return judge(self.story, self.state, "w1", self.t + after, **options)


def failed(outcome: Outcome) -> list[str]:
    return [check.text for check in outcome.checks if not check.ok]


def test_a_recovery_passes_with_its_times() -> None:
    run = Run()
    run.lose()
    run.story.look(run.state, run.t + 8.1)
    assert not run.story.complete, "no weights have been compared yet"
    run.weights(9)
    outcome = run.judged(9.1)
    assert run.story.complete
    assert outcome.passed, outcome.lines()
    assert outcome.lines() == [
        "verdict: PASSED",
        "  ok      detected: 2.0 s after the failure",
        "  ok      survivors committing again: 3.0 s after the failure",
        "  ok      requeued or restarted: 4.0 s after the failure",
        "  ok      back in quorum: 6.0 s after the failure",
        "  ok      healed: 7.0 s after the failure",
        "  ok      committing again: 8.0 s after the failure",
        "  ok      weights equal: at every (step, rank) compared since",
        "  ok      the cause is told: process crash: rank 0 was killed by SIGKILL",
        "  ok      steps lost: 1 of at most 1",
        "  ok      nobody else was harmed",
    ]
    assert outcome.as_data()["seconds"]["healed"] == 7.0


def test_what_does_not_follow_fails_the_drill() -> None:
    run = Run()
    run.lose(heal=False)
    assert run.story.overdue(run.t + 9, 1.0) == []
    run.story.look(run.state, run.t + 9)
    assert run.story.overdue(run.t + 421, 1.0) == [Stage.QUORUM]
    assert run.story.overdue(run.t + 43, 0.1)[0] is Stage.QUORUM, "patience stretches them"
    assert failed(run.judged(421)) == [
        "back in quorum: not within 420 s",
        "healed: not within 450 s",
        "committing again: not within 480 s",
        "weights equal: not within 600 s",
    ]


def test_a_wrong_cause_other_weights_and_bystanders_fail_it() -> None:
    run = Run("hang", size=3)
    run.lose()
    run.weights(9, "b")
    run.say(9.5, "launch", 2, attempt=2, host="w2")
    texts = failed(run.judged(10, problems=["the node is DOWN"]))
    assert any("process crash" in text and "and not hang" in text for text in texts)
    assert "weights DIFFER at 1 (step, rank) pairs" in texts
    assert any("replica 2 was started again" in text for text in texts)
    assert "not put back: the node is DOWN" in texts
    assert not any("started again" in x for x in failed(run.judged(10, excused={2})))


def test_an_outage_of_the_lighthouse_costs_nobody() -> None:
    run = Run("lighthouse-kill")
    step = run.state.step
    run.say(1, "listening", None)
    run.quorum(3, (0, "u0", step), (1, "u1", step))
    for replica in (0, 1):
        run.say(4, "commit", replica, rank=0, step=step, committed=True)
    run.story.look(run.state, run.t + 4)
    run.weights(5)
    outcome = run.judged(5)
    assert outcome.passed, outcome.lines()
    assert list(outcome.seconds.values())[:3] == [1.0, 1.0, 4.0]
    # A group that was started again was harmed.
    run.say(6, "launch", 1, attempt=2, host="w1")
    assert any("replica 1 was started again" in x for x in failed(run.judged(7)))


def test_what_takes_nobody_out_is_over_when_all_go_on() -> None:
    run = Run("disk-full")
    run.story.look(run.state, run.t + 1)
    assert not run.story.reached
    run.story.restored_at = run.t + 5
    for replica in (0, 1):
        run.say(6, "commit", replica, rank=0, step=run.state.step, committed=True)
    run.story.look(run.state, run.t + 6)
    run.weights(7)
    assert run.judged(7).passed


def test_a_run_is_whole_or_says_why_not() -> None:
    run = Run()
    assert whole(run.state) == ""
    run.lose(heal=False)
    assert "replica 1 is STARTING" in whole(run.state)


class Watched:
    """Stands in for a watcher."""

    def __init__(self, state: RunState) -> None:
        self.state = state


def test_a_node_is_given_back_as_soon_as_its_task_is_requeued(fake_run: FakeRun) -> None:
    fake_run.on("scontrol")
    run = Run("node-down", t=time.time())
    injector = Injector(Slurm(fake_run), lambda line: None, run=fake_run)
    watcher: Any = Watched(run.state)
    drill = Drill(KINDS["node-down"], TARGET, watcher, injector)
    drill.begin()
    run.story = drill.story
    assert not drill.poll(run.t + 1)
    assert fake_run.calls[-1][-1] == "Reason=drill"
    run.say(0.5, "slurm_cancelled", 1, due="NODE FAILURE")
    run.lose(reason="stopped by SIGTERM")
    assert not drill.poll(run.t + 8.5)
    assert len(fake_run.calls) == 1, "the old copy gets some time to end there"
    assert not drill.poll(run.t + 8.6 + drill.kind.restore_delay)
    assert fake_run.calls[-1][-1] == "State=RESUME"
    run.weights(19)
    assert drill.poll(run.t + 19)
    assert drill.outcome is not None
    assert drill.outcome.passed, drill.outcome.lines()
    drill.restore()
    assert len(fake_run.calls) == 2, "it is put back once"


def test_what_cannot_be_made_is_an_outcome_too(fake_run: FakeRun) -> None:
    fake_run.on("scontrol", code=1, err="Access denied")
    run = Run("requeue")
    watcher: Any = Watched(run.state)
    injector = Injector(Slurm(fake_run), lambda line: None, run=fake_run)
    active = Active()
    aim_at = partial(lambda target, kind, replica: target, TARGET)
    begin(planned_requeue(), watcher, injector, aim_at, active, 1.0, lambda line: None)
    (drill,) = active.drills
    assert drill.poll(run.t)
    assert drill.outcome is not None
    assert failed(drill.outcome) == ["could not be made: scontrol requeue 60_1: Access denied"]


def planned_requeue() -> Planned:
    return Planned(wait=0.0, kind="requeue", replica=1)


# -- soak ----------------------------------------------------------------------------------------


def test_a_schedule_is_reproduced_by_its_seed() -> None:
    def made(seed: int) -> list[Planned]:
        return schedule(["kill-rank", "hang", "stop"], count=90, mtbf=60, seed=seed, size=3)

    assert made(7) == made(7)
    assert made(7) != made(8)
    kinds = [one.kind for one in made(7)]
    assert {kinds.count(kind) for kind in ("kill-rank", "hang", "stop")} == {30}
    assert {one.replica for one in made(7)} == {0, 1, 2}
    assert 45 < sum(one.wait for one in made(7)) / 90 < 75, "exponential, sixty seconds on average"
    with pytest.raises(UsageError, match="no such kind"):
        schedule(["kill-rnak"], count=1, mtbf=60, seed=0, size=2)


def test_never_more_failures_at_once_than_allowed(fake_run: FakeRun) -> None:
    run = Run(size=3)
    watcher: Any = Watched(run.state)
    injector = Injector(Slurm(fake_run), lambda line: None, run=fake_run)

    def under_way(kind: str) -> Active:
        return Active([Drill(KINDS[kind], TARGET, watcher, injector)])

    assert room(run.state, Active(), 1)
    assert not room(run.state, under_way("kill-rank"), 1)
    assert room(run.state, under_way("kill-rank"), 2)
    assert not room(run.state, under_way("lighthouse-kill"), 2), "nobody can come back without it"
    run.lose(heal=False)
    assert not room(run.state, Active(), 1), "one is away still"
    assert room(run.state, under_way("kill-rank"), 2)
    assert under_way("kill-rank").hit() == {1}
    assert under_way("slow").hit() == set()


@pytest.mark.parametrize(
    ("text", "seconds"), [("60s", 60), ("90", 90), ("1.5m", 90), ("1h", 3600), ("a", None)]
)
def test_durations(text: str, seconds: float | None) -> None:
    if seconds is None:
        with pytest.raises(UsageError, match="not a time"):
            duration(text)
    else:
        assert duration(text) == seconds


def outcome(kind: str, t: float, *, ok: bool = True, back: float = 10.0) -> Outcome:
    return Outcome(
        kind=kind,
        replica=1,
        node="w1",
        t=t,
        ended=t + back,
        seconds={Stage.COMMITS.value: back},
        steps_lost=1,
        cause="x",
        checks=[Check(ok=ok, text="something")],
    )


def test_an_alarm_that_no_failure_explains_is_false() -> None:
    def event(t: float, replica: int, kind: str = "launch") -> Event:
        return Event(
            t=t, kind=kind, replica=replica, fields={"what": "is restarted", "why": "hung"}
        )

    events = [event(50, 0), event(105, 1), event(106, 0, "action"), event(300, 1)]
    lost = Incident(replica=1, first_sign=104, lost_at_step=5)
    other = Incident(replica=0, first_sign=160, lost_at_step=5)
    outcomes = [outcome("kill-rank", 100.0), outcome("lighthouse-kill", 150.0)]
    assert unexplained(outcomes, [lost, other], events, 90.0, 8.0) == [
        "replica 0 is restarted: hung",
        "replica 0 was lost: unknown",
        "replica 1 was started again: hung",
    ]


def held(memory: int = 50 << 20, files: int = 20) -> growth.Held:
    return growth.Held(memory=memory, files=files, sockets=5, threads=4, processes=3)


HELD = (
    "supervisor: memory 52 to 52 MB, files 20 to 20, sockets 5 to 5, threads 4 to 4, "
    "processes 3 to 3"
)


def soaked(**changes: Any) -> Soak:
    values: dict[str, Any] = {
        "seed": 1,
        "mtbf": 60.0,
        "planned": [Planned(wait=1.0, kind="kill-rank", replica=1)] * 2,
        "outcomes": [outcome("kill-rank", 0.0), outcome("time-limit", 50.0, back=20.0)],
        "cost": Cost(t=100, committed=95, failed=5, step=33, member_seconds=180, size=2),
        "false_alarms": [],
        "compared": 40,
        "differences": 0,
        "before": {"supervisor": held()},
        "after": {"supervisor": held()},
    }
    return Soak(**values | changes)


def test_the_report_of_a_soak() -> None:
    soak = soaked()
    assert soak.passed
    assert soak.lines() == [
        "soak: PASSED (seed 1, one every 60 s, 100 s)",
        "failures injected: 2 of 2 (kill-rank 1, time-limit 1)",
        "recovered without help: 1",
        "steps: 33; commits 95, failed commits 5",
        "step efficiency 95.0%, participation 90.0%, training efficiency 85.5%",
        "time to recover: median 15.0 s, p95 20.0 s, worst 20.0 s (2 measured)",
        "false alarms: none",
        "weights: equal at 40 of 40 compared (step, rank) pairs",
        HELD,
    ]
    assert json.loads(json.dumps(soak.as_data()))["time_to_recover_s"]["worst"] == 20.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"false_alarms": ["replica 0 was lost"]}, "false alarms: 1"),
        ({"differences": 2}, "weights: DIFFER at 2 of 40"),
        ({"after": {}}, "GROWN  supervisor is gone"),
        ({"after": {"supervisor": held(files=40)}}, "GROWN  supervisor: files 20 to 40"),
        ({"after": {"supervisor": held(memory=150 << 20)}}, "GROWN  supervisor: memory 52 to 157"),
        ({"outcomes": [outcome("stop", 0.0, ok=False)]}, "FAILED  stop on replica 1: something"),
    ],
)
def test_a_soak_fails_for(changes: dict[str, Any], says: str) -> None:
    soak = soaked(**changes)
    assert not soak.passed
    assert any(says in line for line in soak.lines()), soak.lines()


def test_quantiles() -> None:
    values = [float(number) for number in range(1, 101)]
    assert quantile(values, 0.95) == 95.0
    assert quantile([3.0], 0.95) == 3.0
    assert quantile([], 0.95) is None


# -- causes that drills have found to be told wrongly ----------------------------------------------


def test_a_launcher_that_requeues_its_own_task_is_no_person() -> None:
    """Slurm stamps whole seconds: its line may come before the launcher's, or after it."""
    for slurm_after in (-0.4, 0.4):
        run = Run()
        words = {"code": 1, "reason": "rank 0 was killed by SIGSEGV", "next": "requeued"}
        signs: list[tuple[float, str, dict[str, Any]]] = [
            (1.0, "exit", words),
            (1.0 + slurm_after, "slurm_cancelled", {"due": "JOB REQUEUE"}),
        ]
        for after, kind, fields in sorted(signs, key=lambda sign: sign[0]):
            run.say(after, kind, 1, **fields)
        run.quorum(2, (0, "u0", 20))
        (incident,) = run.state.incidents
        assert incident.why == "process crash: rank 0 was killed by SIGSEGV"
    # Without the launcher's word it was a person.
    run = Run()
    run.say(1.0, "slurm_cancelled", 1, due="JOB REQUEUE")
    run.say(1.4, "exit", 1, code=143, reason="stopped by SIGTERM")
    run.quorum(2, (0, "u0", 20))
    assert run.state.incidents[0].why == "requeued by a person"


@pytest.mark.parametrize(("ended", "cause"), [(1.0, "process crash"), (20.0, "hang")])
def test_a_dead_group_is_not_hung_because_another_was_waited_for(ended: float, cause: str) -> None:
    run = Run(size=3)
    run.say(ended, "exit", 1, code=1, reason="rank 0 was killed by SIGKILL")
    waited = Waiting(since=run.t + 1.0, requested={0})
    members = [(replica, f"u{replica}", 20, "") for replica in (0, 2)]
    run.say(21.0, "membership", None, quorum_id=2, members=members, waited=waited)
    (incident,) = run.state.incidents
    assert incident.cause.value == cause
