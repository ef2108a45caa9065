"""What is wrong: every rule fires, and no longer just below its limit or when it is over."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from launcher.events import Event
from launcher.findings import STRANGE_LINES, Finding, Snapshot, judge
from launcher.incidents import Incident
from launcher.lighthouse_log import Waiting
from launcher.model import GroupState
from launcher.slurm import Job
from launcher.state import RunState
from tests.conftest import REPOSITORY

#: When everything here is looked at.
NOW = 1000.0


def training(groups: int = 2, nodes: Sequence[str] = ()) -> RunState:
    """Groups that train, a step a second; ``nodes``: those of each, if not one of its own."""
    state = RunState(groups)
    for replica in range(groups):
        hosts = list(nodes) or [f"worker-{replica}"]
        tell(state, NOW - 100, "launch", replica, attempt=1, host=hosts[0], nodes=hosts)
    quorum(state, NOW - 90, *range(groups))
    for step in range(1, 4):
        for replica in range(groups):
            tell(state, NOW - 80 + step, "commit", replica, step=step, committed=True, rank=0)
    return state


def tell(state: RunState, t: float, kind: str, replica: int | None, **fields: Any) -> None:
    state.apply(Event(t=t, kind=kind, replica=replica, fields=fields))


def quorum(state: RunState, t: float, *replicas: int) -> None:
    members = [(r, f"uuid-{number}", 1, "x") for number, r in enumerate(replicas)]
    tell(state, t, "membership", None, quorum_id=int(t), members=members)


def lost(state: RunState, *incidents: tuple[int | None, str, float]) -> RunState:
    """Add losses: which group (None: the lighthouse), on which node, how many seconds ago."""
    for replica, host, ago in incidents:
        state.incidents.append(
            Incident(replica=replica, host=host, first_sign=NOW - ago, recovered_at=NOW - ago + 1)
        )
    return state


def sampled(gpus: Mapping[str, Mapping[str, Any]]) -> RunState:
    """One group, and a sample of each GPU: ``{"w_3": {"celsius": 60}}`` is GPU 3 of node w."""
    state = training(1, sorted({name[0] for name in gpus}))
    for name, fields in gpus.items():
        host, _, gpu = name.rpartition("_")
        defaults = {"gpu": int(gpu), "host": host, "ecc": 2, "slowed": []}
        tell(state, NOW - 5, "gpu", 0, **{**defaults, **fields})
    return state


def at(state: RunState, **more: Any) -> Snapshot:
    return Snapshot(state=state, now=NOW, job="77", **more)


def told(state: RunState, kind: str, replica: int = 1, ago: float = 1.0, **fields: Any) -> Snapshot:
    tell(state, NOW - ago, kind, replica, **fields)
    return at(state)


def waits(state: RunState, seconds: float, *asked: int, status: str = "") -> Snapshot:
    return at(state, waiting=Waiting(since=NOW - seconds, requested=set(asked), status=status))


def queued(reason: str, *, task: int = 1, state: RunState | None = None) -> Snapshot:
    """Replica 1 waits in Slurm's queue, in task ``task``."""
    state = state or RunState(2)
    state.group(1).task = task
    job = Job(job_id=5, array_job_id=77, task=task, state="PENDING", node="", reason=reason)
    state.observe([job], NOW)
    return at(state)


def differing(hashes: Sequence[str] = ("aa", "bb")) -> Snapshot:
    state = training()
    for replica, value in enumerate(hashes):
        tell(state, NOW - 1, "weights", replica, step=4, rank=0, hash=value)
    return at(state)


def twice(*replicas: int) -> Snapshot:
    state = lost(training(), (1, "worker-9", 30.0))
    quorum(state, NOW - 1, *replicas)
    return at(state)


def over_again(recovered_at: float | None = None) -> Snapshot:
    state = lost(training(), (1, "worker-1", 30.0))
    state.incidents[-1].started_over, state.incidents[-1].recovered_at = True, recovered_at
    return at(state)


def slow(nodes: Sequence[str] = (), by: float = 2.0) -> Snapshot:
    state = training(2, nodes)
    for replica, seconds in ((0, 1.0), (1, by)):
        for _ in range(5):
            tell(state, NOW - 1, "metrics", replica, busy_seconds=seconds)
    return at(state)


HALF = "need at least half of 2 healthy workers"
WARM = {"w_0": {"celsius": 60}, "w_1": {"celsius": 61}, "w_2": {"celsius": 73}}
SLOWED = {"w_0": {"slowed": ["power cap"]}}
STORM = ((1, "a", 599.0), (1, "b", 300.0), (1, "c", 1.0))
BAD = ((0, "n-1", 1799.0), (1, "n-1", 900.0), (0, "n-1", 1.0))

#: By kind: where it stands, and what the message must say to do.
STANDS: dict[str, tuple[Callable[[], Snapshot], str]] = {
    "ended_early": (lambda: at(training(), over=True), "the end of its `.err` logs says why"),
    "monitor_blind": (lambda: at(training(), blind={"Slurm": "timeout"}), "`squeue` and"),
    "log_not_understood": (
        lambda: at(training(), lines={"a.log": (STRANGE_LINES, 0)}),
        "`tail a.log`",
    ),
    "second_copy": (lambda: twice(0, 1, 1), "on worker-9 that Slurm has given up; end it there"),
    "started_over": (over_again, "`python -m launcher cancel tft-77`"),
    "weights_differ": (differing, "`python -m launcher cancel tft-77`"),
    "loss_nan": (
        lambda: told(training(), "metrics", loss=float("nan")),
        "`python -m launcher cancel tft-77`",
    ),
    "replica_stalled": (
        lambda: waits(training(), 9.0, 0),
        "1/stacks.*.txt`, where the guardian writes them), or end it with `python -m launcher requeue",
    ),
    "survivor_blocked": (
        lambda: waits(training(), 9.0, 0, status=HALF),
        "replica 1 must end before the others can go on: `python -m launcher requeue tft-77 1`",
    ),
    "quorum_stalled": (
        lambda: waits(training(), 9.0, 0, 1),
        "`python -m launcher lighthouse status`",
    ),
    "lighthouse_unreachable": (
        lambda: told(training(), "heartbeat_failed", text="no route", ago=14.9),
        "`python -m launcher lighthouse status`",
    ),
    "lighthouse_stand_in": (
        lambda: told(training(), "stand_in", host="worker-1", serves=True),
        "`python -m launcher lighthouse up --detach`",
    ),
    "gpu_xid": (
        lambda: told(training(), "xid", host="worker-1", gpu=3, xid=79, ago=599.0),
        "`scontrol update NodeName=worker-1 State=DRAIN`",
    ),
    "gpu_ecc": (
        lambda: told(sampled({"w_0": {}}), "gpu", 0, host="w", gpu=0, ecc=3),
        "`scontrol update NodeName=w State=DRAIN`",
    ),
    "gpu_throttled": (
        lambda: at(sampled(SLOWED)),
        "`nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER -i 0`; if it stays, `scontrol update",
    ),
    "gpu_hot": (lambda: at(sampled(WARM)), "`nvidia-smi -q -d TEMPERATURE -i 2`"),
    "straggler": (slow, "`scontrol update NodeName=worker-1 State=DRAIN`"),
    "restart_storm": (
        lambda: at(lost(training(), *STORM)),
        "`python -m launcher report tft-77` has the causes, `tft-77_1.err` the errors",
    ),
    "bad_node": (lambda: at(lost(training(), *BAD)), "`sbatch --exclude=n-1`"),
    "held_by_slurm": (lambda: queued("JobHeldUser"), "`scontrol release 77_1`"),
    "waiting_begin_time": (
        lambda: queued("BeginTime"),
        "`scontrol update JobId=77_1 StartTime=now`",
    ),
}
#: By kind: what is not quite it, and what is over.
STANDS_NOT: list[tuple[str, Callable[[], Snapshot]]] = [
    ("ended_early", lambda: at(done(training()), over=True)),
    ("ended_early", lambda: at(training())),
    ("monitor_blind", lambda: at(training())),
    ("log_not_understood", lambda: at(training(), lines={"a.log": (STRANGE_LINES - 1, 0)})),
    ("log_not_understood", lambda: at(training(), lines={"a.log": (STRANGE_LINES, 1)})),
    ("second_copy", lambda: twice(0, 1)),
    ("started_over", lambda: over_again(recovered_at=NOW)),
    ("weights_differ", lambda: differing(("aa", "aa"))),
    ("weights_differ", lambda: differing(("aa",))),
    ("loss_nan", lambda: told(training(), "metrics", loss=1e30)),
    ("loss_nan", lambda: told(STANDS["loss_nan"][0]().state, "metrics", loss=2.5)),
    ("replica_stalled", lambda: waits(training(), 7.9, 0)),
    ("replica_stalled", lambda: waits(training(), 9.0, 0, 1)),
    ("survivor_blocked", lambda: waits(training(), 7.9, 0, status=HALF)),
    ("survivor_blocked", lambda: waits(training(), 9.0, 0)),
    ("quorum_stalled", lambda: waits(training(), 7.9, 0, 1)),
    ("quorum_stalled", lambda: waits(training(), 9.0, 0)),
    ("quorum_stalled", lambda: waits(done(training()), 9.0, 0, 1)),
    (
        "lighthouse_unreachable",
        lambda: told(training(), "heartbeat_failed", text="no route", ago=15.0),
    ),
    (
        "lighthouse_stand_in",
        lambda: told(
            STANDS["lighthouse_stand_in"][0]().state, "stand_in", host="worker-1", serves=False
        ),
    ),
    ("gpu_xid", lambda: told(training(), "xid", host="worker-1", gpu=3, xid=79, ago=600.0)),
    ("gpu_ecc", lambda: at(sampled({"w_0": {}}))),
    (
        "gpu_ecc",
        lambda: told(STANDS["gpu_ecc"][0]().state, "launch", 0, attempt=2, host="w"),
    ),
    ("gpu_throttled", lambda: told(sampled(SLOWED), "gpu", 0, host="w", gpu=0, slowed=[])),
    ("gpu_throttled", lambda: told(sampled(SLOWED), "exit", 0, code=1, reason="x")),
    ("gpu_hot", lambda: at(sampled({**WARM, "w_2": {"celsius": 72}}))),
    ("gpu_hot", lambda: at(sampled({"w_0": {"celsius": 60}, "w_1": {"celsius": 90}}))),
    ("gpu_hot", lambda: told(sampled(WARM), "exit", 0, code=1, reason="x")),
    ("straggler", lambda: slow(by=1.5)),
    ("restart_storm", lambda: at(lost(training(), *STORM[1:]))),
    ("restart_storm", lambda: at(lost(training(), (1, "a", 600.0), *STORM[1:]))),
    ("restart_storm", lambda: at(lost(training(), (0, "a", 1.0), *STORM[1:]))),
    ("restart_storm", lambda: at(lost(training(), *[(None, "", 1.0)] * 3))),
    ("bad_node", lambda: at(lost(training(), *BAD[1:]))),
    ("bad_node", lambda: at(lost(training(), (0, "n-1", 1800.0), *BAD[1:]))),
    ("bad_node", lambda: at(lost(training(), (0, "n-2", 1.0), *BAD[1:]))),
    ("bad_node", lambda: at(lost(training(), *[(None, "", 1.0)] * 3))),
    ("held_by_slurm", lambda: queued("Resources")),
    ("held_by_slurm", lambda: told(queued("JobHeldUser").state, "launch", attempt=1, host="w")),
    ("waiting_begin_time", lambda: queued("Resources")),
    ("waiting_begin_time", lambda: told(queued("BeginTime").state, "launch", attempt=1, host="w")),
]


def done(state: RunState) -> RunState:
    for group in state.groups.values():
        group.state = GroupState.DONE
    return state


def of(kind: str, snapshot: Snapshot) -> list[Finding]:
    return [finding for finding in judge(snapshot) if finding.kind == kind]


def documented() -> dict[str, str]:
    """Severity by kind, from the contract."""
    text = (REPOSITORY / "docs" / "monitor.md").read_text().partition("## Findings")[2]
    return dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", text, flags=re.MULTILINE))


def test_every_finding_is_documented_and_tested() -> None:
    assert set(STANDS) == {kind for kind, _ in STANDS_NOT} == set(documented())


@pytest.mark.parametrize("kind", STANDS)
def test_it_stands_and_says_what_to_do(kind: str) -> None:
    snapshot, remedy = STANDS[kind][0](), STANDS[kind][1]
    (finding,) = of(kind, snapshot)
    assert finding.severity.value == documented()[kind]
    assert remedy in finding.message
    if "replica 1" in finding.message and kind not in ("second_copy", "survivor_blocked"):
        assert finding.replica in (1, None)


@pytest.mark.parametrize(("kind", "scene"), STANDS_NOT)
def test_it_does_not_stand(kind: str, scene: Callable[[], Snapshot]) -> None:
    assert of(kind, scene()) == []


def test_nothing_is_wrong_with_a_run_that_trains() -> None:
    assert judge(at(training())) == []
    assert judge(at(RunState(0))) == []


def test_the_worst_comes_first() -> None:
    state = queued("BeginTime", state=lost(training(), *BAD)).state
    state.group(1).state = GroupState.REQUEUED
    tell(state, NOW, "metrics", 0, loss=float("inf"))
    found = [finding.severity.value for finding in judge(at(state))]
    assert found == ["critical", "warning", "info"]


@pytest.mark.parametrize(
    ("source", "scheduler", "remedy"),
    [
        ("/logs/a b`id`.log", "Slurm", "Try `ls -l '/logs/a b`id`.log'`"),
        ("the daemon", "the daemon", "Try `python -m launcher list`"),
    ],
)
def test_how_to_look_at_what_cannot_be_read(source: str, scheduler: str, remedy: str) -> None:
    state = training()
    state.scheduler = scheduler
    (finding,) = judge(at(state, blind={source: "Permission denied"}))
    assert "(Permission denied)" in finding.message
    assert remedy in finding.message


def test_several_of_one_kind_are_told_apart() -> None:
    """By what they are of: a second one is news, whatever is known of the first."""
    blind = {"a.log": "gone", "b.log": "gone"}
    strange = dict.fromkeys(blind, (STRANGE_LINES, 0))
    hot, bad = {"celsius": 90, "slowed": ["heat"]}, [*BAD, *((9, "n-2", ago) for *_, ago in BAD)]
    state = sampled(
        {**WARM, "w_7": hot, "w_8": hot, "v_7": {"slowed": ["heat"]}, "w_3": {"celsius": 60}}
    )
    tell(state, NOW - 1, "gpu", 0, gpu=3, host="w", ecc=9)
    tell(state, NOW - 1, "gpu", 0, gpu=7, host="v", ecc=9, slowed=["heat"])
    found = judge(at(lost(state, *bad), blind=blind, lines=strange))
    keys = [finding.key for finding in found if finding.kind != "restart_storm"]
    assert len(keys) == len(set(keys)) == 2 + 2 + 3 + 2 + 2 + 2
    assert {"gpu_throttled:0:w/7", "gpu_throttled:0:v/7", "monitor_blind::a.log"} < set(keys)
    one = Finding(kind="k", severity=judge(queued("BeginTime"))[0].severity, message="", replica=3)
    assert (one.key, replace(one, replica=None).key) == ("k:3", "k:"), "as ever, of one thing"


def test_a_hot_gpu_is_measured_by_its_own_node() -> None:
    """A node in a warmer place is not hot as a whole, and hides no hot one among cooler ones."""
    cool = {f"w_{gpu}": {"celsius": 40} for gpu in range(3)}
    warm = {f"v_{gpu}": {"celsius": 60} for gpu in range(5)}
    assert of("gpu_hot", at(sampled({**cool, **warm}))) == []
    state = sampled({**cool, **warm, "w_3": {"celsius": 55}})
    (finding,) = of("gpu_hot", at(state))
    assert finding.message.startswith("GPU 3 of w (replica 0) has 55 degrees, its peers 40: ")


@pytest.mark.parametrize("junk", ["90", None, [90], float("nan")])
def test_a_temperature_that_is_none(junk: object) -> None:
    state = sampled({**WARM, "w_4": {"celsius": junk}})
    assert [finding.what for finding in of("gpu_hot", at(state))] == ["w/2"]


def test_the_queue_knows_tasks_and_not_replica_groups() -> None:
    """A spare's task that has become group 1, and one of an array that was added later."""
    (finding,) = judge(queued("JobHeldAdmin", task=4))
    assert "replica 1 is held (JobHeldAdmin): `scontrol release 77_4`" in finding.message
    later = replace(queued("BeginTime", task=4), tasks={4: "88_4"})
    assert "`scontrol update JobId=88_4 StartTime=now`" in judge(later)[0].message
    state = lost(training(), *STORM)
    state.group(1).task = 4
    assert "`tft-77_4.err`" in of("restart_storm", at(state))[0].message


def test_a_group_that_hangs_at_its_start_is_named() -> None:
    state = training(3)
    quorum(state, NOW - 60, 0, 1)
    tell(state, NOW - 50, "launch", 2, attempt=2, host="worker-2")
    (finding,) = of(
        "quorum_stalled", waits(state, 9.0, 0, 1, status="not participating stragglers")
    )
    assert finding.message.startswith("no new quorum for 9 s: not participating stragglers. ")
    assert "if replica 2 hangs while it starts (`tft-77_2.err`)" in finding.message
    assert finding.message.endswith("`python -m launcher requeue tft-77 2`")


def test_only_who_is_there_can_be_silent() -> None:
    state = training(4)
    tell(state, NOW - 20, "exit", 2, code=1, reason="killed")
    (finding,) = of("survivor_blocked", waits(state, 9.0, 0, status=HALF))
    assert "join; replica 1, 3 must end" in finding.message
    assert finding.message.endswith("tft-77 1` and `python -m launcher requeue tft-77 3`")


def test_a_node_of_several_that_is_not_known_is_not_named() -> None:
    (finding,) = of("straggler", slow(["w-1", "w-2"]))
    assert "replica 1 on w-1 +1 works 2 s" in finding.message
    assert "NodeName=<node>" in finding.message


def test_the_name_of_a_node_is_no_command() -> None:
    evil = "n`reboot`;x"
    (finding,) = judge(at(lost(training(), *[(1, evil, 700.0), (0, evil, 2.0), (0, evil, 1.0)])))
    assert f"--exclude='{evil}'`" in finding.message
    assert f"NodeName='{evil}' " in finding.message


def test_a_share_of_this_machine_is_no_node_of_slurms() -> None:
    state = lost(training(), *BAD)
    tell(state, NOW - 1, "xid", 1, gpu=3, xid=79)
    state.scheduler = "the daemon"
    xid, bad_node = judge(at(state))
    assert "scontrol" not in xid.message + bad_node.message
    assert "`python -m launcher report tft-77`" in bad_node.message
