"""Drills: the table is whole, what is printed is what is run, and everything is put back."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.drill_command import commands, confirm
from launcher.drills import KINDS, OPERATOR, STAGES, Target, describe
from launcher.inject import Injector, aim
from launcher.lighthouse import Address, LighthouseDir
from launcher.model import KitError, UsageError
from launcher.process import start_time
from launcher.rundir import Manifest, Outputs, RunDir
from launcher.slurm import Slurm
from tests.conftest import REPOSITORY, FakeRun
from tests.unit.drilling import TARGET
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
    "lighthouse-host",
]


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
                 "slow", "disk-full", "lighthouse-freeze", "lighthouse-host", "oom"):  # fmt: skip
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
    "lighthouse-host": [
        f"{HANDS} supervisor STOP --pid=77 --started=1000.00",
        f"{HANDS} lighthouse KILL --pid=77 --started=1000.00",
        f"{HANDS} supervisor CONT --pid=77 --started=1000.00",
    ],
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


def test_a_rank_of_a_group_of_several_nodes_is_hit_where_it_is(
    scene: tuple[RunDir, Manifest], fake_run: FakeRun
) -> None:
    run, manifest = scene
    manifest = dataclasses.replace(manifest, nodes_per_group=2, ranks_per_group=2)
    for node, pid in ((0, 700), (1, 701)):
        start = {"kind": "start", "rank": node, "attempt": 1, "pid": pid}
        run.events(1, node).write_text(json.dumps(start, separators=(",", ":")) + "\n")
    state = training()
    state.groups[1].nodes = ("w1", "w5")
    fake_run.on("squeue", "--noheader", "--array", out="61|60|1|RUNNING|w[1,5]|N/A|None\n")
    targets = {}
    for choice in ({"rank": 0}, {"rank": 1}, {"node": "w5"}):
        target = aim(KINDS["kill-rank"], run, manifest, state, Slurm(fake_run), {}, **choice)
        targets[str(choice)] = (target.replica, target.node, target.pids[target.rank])
        assert f"--nodelist={target.node}" in target.at_node
    assert list(targets.values()) == [(1, "w1", 700), (1, "w5", 701), (1, "w5", 701)]


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


def test_in_a_run_that_may_grow_a_group_that_runs_is_aimed_at(
    scene: tuple[RunDir, Manifest], fake_run: FakeRun
) -> None:
    run, manifest = scene
    may_grow = (run, replace(manifest, group_size=3))
    assert aimed(may_grow, fake_run, "kill-rank").replica == 1
    with pytest.raises(UsageError, match="replica 2 of tft-60 does not run"):
        aimed(may_grow, fake_run, "kill-rank", replica=2)


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


def test_a_run_of_one_machine_has_no_nodes_to_break(
    scene: tuple[RunDir, Manifest], fake_run: FakeRun
) -> None:
    run, manifest = scene
    local = (run, dataclasses.replace(manifest, cluster="local"))
    for kind in ("node-down", "node-drain", "node-crash", "network-cut", "preempt", "time-limit"):
        with pytest.raises(UsageError, match=f"{kind} is done to Slurm's nodes"):
            aimed(local, fake_run, kind)
    target = aimed(local, fake_run, "kill-rank")
    assert target.at_node == (), "everything of it is on this machine"
    (step,) = KINDS["requeue"].steps(target)
    assert step.argv[1:] == ("-m", "launcher", "requeue", str(run.path), "1")
