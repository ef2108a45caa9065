"""Every check of the doctor: what passes it, what does not, and that each says what to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher import checks_here, checks_node, checks_slurm, checks_training, cluster
from launcher.checks import Grade, Result, blind, exit_code, failed, passed, warning
from launcher.doctor_job import Found
from launcher.model import UsageError
from launcher.target import Target, target_of
from tests.conftest import FIXTURES, REPOSITORY

CONFIG = cluster.configuration((FIXTURES / "slurm-config.txt").read_text())
PARTITIONS = cluster.partitions((FIXTURES / "slurm-partitions.txt").read_text())
#: What 25.11 shows of the same settings on a site that sets none of them.
NEWER = {
    "SLURM_VERSION": "25.11.4",
    "AccountingStorageEnforce": "none",
    "AccountingStorageType": "accounting_storage/slurmdbd",
    "AuthInfo": "(null)",
    "JobRequeue": "1",
    "KillWait": "30 sec",
    "MaxArraySize": "1001",
    "MaxBatchRequeue": "5",
    "PreemptMode": "OFF",
    "ProctrackType": "proctrack/cgroup",
    "RequeueExit": "(null)",
    "RequeueExitHold": "(null)",
    "ReturnToService": "1",
    "SchedulerParameters": "(null)",
    "SlurmctldParameters": "(null)",
    "SlurmdTimeout": "300 sec",
    "TaskPlugin": "task/affinity",
}
TARGET, _ = target_of("", {"TFT_OUTPUTS": "/shared/outputs"})


def told(results: Iterable[Result], check: str = "") -> str:
    """Grades and words of the results (of one check), one a line; all that are not fine say what
    to do."""
    chosen = [result for result in results if check in ("", result.check)]
    assert chosen, f"nothing is said of {check}"
    for result in chosen:
        assert result.remedy or result.grade in (Grade.PASSED, Grade.BLIND), result
    return "\n".join(f"{result.grade.value} {result.found} -> {result.remedy}" for result in chosen)


def having(**settings: Any) -> Target:
    return dataclasses.replace(TARGET, **settings)


# -- the exit code ----------------------------------------------------------------


def test_the_exit_code() -> None:
    fine = [passed("a", "x"), warning("b", "x", "y"), blind("c", "x", needed=False)]
    assert exit_code(fine) == 0
    assert exit_code([*fine, blind("d", "x")]) == 4
    assert exit_code([*fine, blind("d", "x"), failed("e", "x", "y")]) == 1


# -- Slurm ------------------------------------------------------------------------


def test_the_sandbox_passes_with_one_warning() -> None:
    results = list(checks_slurm.settings(CONFIG))
    assert [r.check for r in results if r.grade is not Grade.PASSED] == ["KillWait"]
    assert "6 s (AuthInfo cred_expire=5" in told(results, "requeue delay")
    assert "1000 replica groups" in told(results, "MaxArraySize")


def test_a_newer_version_with_slurms_own_defaults_passes() -> None:
    results = list(checks_slurm.settings(NEWER))
    assert {r.grade for r in results} == {Grade.PASSED}, told(results)
    assert "121 s" in told(results, "requeue delay")
    assert "MaxBatchRequeue 5" in told(results, "how tasks are held")


@pytest.mark.parametrize(
    ("settings", "check", "grade", "words"),
    [
        ({"JobRequeue": "0"}, "JobRequeue", "warning", "--requeue"),
        ({"KillWait": "20 sec"}, "KillWait", "warning", "KillWait=30"),
        ({"SlurmdTimeout": "0 sec"}, "SlurmdTimeout", "failed", "never requeued"),
        ({"SlurmdTimeout": "600 sec"}, "SlurmdTimeout", "warning", "TFT_SPARES"),
        ({"MaxArraySize": "0"}, "MaxArraySize", "failed", "arrays are off"),
        ({"ReturnToService": "0"}, "ReturnToService", "warning", "operator"),
        ({"PreemptMode": "CANCEL"}, "PreemptMode", "warning", "cancelled for good"),
        ({"PreemptMode": "GANG,SUSPEND"}, "PreemptMode", "warning", "stops in place"),
        ({"RequeueExit": "1-3,99"}, "RequeueExit", "warning", "RequeueExit=1-3,99"),
        ({"RequeueExitHold": "2"}, "RequeueExit", "warning", "ended for good"),
        ({"SLURM_VERSION": "20.11.9"}, "version", "warning", "22.05"),
        (
            {"SchedulerParameters": "bf_interval=1,requeue_delay=3"},
            "requeue delay",
            "passed",
            "3 s (requeue_delay)",
        ),
    ],
)
def test_each_setting(settings: dict[str, str], check: str, grade: str, words: str) -> None:
    text = told(checks_slurm.settings({**NEWER, **settings}), check)
    assert text.startswith(grade)
    assert words in text


def test_a_setting_that_is_not_shown_is_not_taken_to_be_fine() -> None:
    hidden = {key: value for key, value in NEWER.items() if key != "KillWait"}
    text = told(checks_slurm.settings(hidden), "KillWait")
    assert text.startswith("could not look")
    odd = told(checks_slurm.settings({**NEWER, "SlurmdTimeout": "soon"}), "SlurmdTimeout")
    assert odd.startswith("could not look scontrol shows SlurmdTimeout as 'soon'")


def part(state: str = "UP", max_time: str = "1-0", **settings: str) -> cluster.Partition:
    """The recorded partition, with some of it changed."""
    (main, _) = PARTITIONS
    shown = {**main.settings, **settings}
    return dataclasses.replace(main, settings=shown, state=state, max_time=max_time)


@pytest.mark.parametrize(
    ("target", "partitions", "says"),
    [
        (having(), PARTITIONS, "passed main (Slurm's default) is UP"),
        (having(partition="urgent"), PARTITIONS, "passed urgent is UP"),
        (having(partition="mian"), PARTITIONS, "-> did you mean main?"),
        (having(partition="h100"), PARTITIONS, "-> there are main, urgent"),
        (having(), PARTITIONS[1:], "failed none is named"),
        (having(), [part(state="DRAIN")], "failed main is DRAIN"),
        (having(account="me"), [part(AllowAccounts="a,b")], "failed main takes the accounts a,b"),
        (having(account="a"), [part(AllowAccounts="a,b")], "passed main"),
    ],
)
def test_the_partition(target: Target, partitions: list[cluster.Partition], says: str) -> None:
    assert says in told(checks_slurm.partition(target, partitions), "partition")


def test_a_partition_that_costs_something() -> None:
    found = list(
        checks_slurm.partition(having(), [part(max_time="04:00:00", PreemptMode="CANCEL")])
    )
    assert told(found, "time limit").startswith("warning main ends every job after 04:00:00")
    assert told(found, "PreemptMode").startswith("warning CANCEL")


def machine(name: str, state: str = "idle", gpus: int = 8) -> cluster.Resources:
    return cluster.Resources(name=name, state=state, reason="", cpus=128, memory_mb=1, gpus=gpus)


def test_nodes_and_their_gpus() -> None:
    def say(*nodes: cluster.Resources, check: str, **settings: Any) -> str:
        return told(checks_slurm.nodes(having(**settings), nodes), check)

    assert say(machine("a"), machine("b"), check="nodes").startswith("passed 2 of 2")
    assert "not b (drain)" in say(machine("a"), machine("b", "drain"), check="nodes")
    assert say(machine("a"), check="nodes").startswith("warning 1 of 1")
    assert say(machine("a", "down*"), check="nodes").startswith("failed 0 of 1")
    assert say(machine("a"), machine("b", gpus=4), check="GPUs").startswith("passed 1 nodes")
    assert "TFT_RANKS_PER_NODE=4" in say(machine("a", gpus=4), check="GPUs")
    assert "no GRES" in say(machine("a", gpus=0), check="GPUs")
    assert "not needed" in say(machine("a", gpus=0), check="GPUs", device="cpu")


LAB = cluster.Association(account="lab", partition="", qos=("normal",))
GPU = cluster.Association(account="gpu", partition="h100", qos=())
ENFORCED = {**NEWER, "AccountingStorageEnforce": "associations,limits,qos"}


@pytest.mark.parametrize(
    ("target", "config", "known", "says"),
    [
        (having(account="x"), CONFIG, "no", "passed Slurm does not enforce"),
        (having(account="x"), NEWER, "no", "passed Slurm does not enforce"),
        (having(), ENFORCED, "sacctmgr is not on PATH", "could not look sacctmgr"),
        (having(), ENFORCED, [], "failed you may charge none"),
        (having(account="lab"), ENFORCED, [LAB, GPU], "passed lab, of gpu, lab"),
        (having(account="lba"), ENFORCED, [LAB, GPU], "-> you may charge gpu, lab"),
        (
            having(account="gpu", partition="a100"),
            ENFORCED,
            [LAB, GPU],
            "failed you may not charge",
        ),
        (having(account="lab", qos="high"), ENFORCED, [LAB], "failed QOS high is not among yours"),
    ],
)
def test_the_account(
    target: Target,
    config: Mapping[str, str],
    known: list[cluster.Association] | str,
    says: str,
) -> None:
    result = checks_slurm.account(target, config, known)
    assert says in told([result])
    if result.grade is Grade.BLIND:  # it matters only where one is asked for
        assert not result.needed
        assert checks_slurm.account(having(account="x"), config, known).needed


# -- training ---------------------------------------------------------------------


def healing(settings: dict[str, Any], *flags: str, device: str = "cuda") -> str:
    settings = {"fault_tolerance": {"process_group": "nccl"}, **settings}
    return told(checks_training.healing(settings, flags, device, lambda path: path == "/there"))


ON = {"enable": True, "async_mode": "async", "last_save_model_only": False}


def test_the_shipped_configurations_heal() -> None:
    import tomllib

    for path in Path("configs").glob("*.toml"):
        settings = tomllib.loads(path.read_text())
        device = "cpu" if "cpu" in path.name else "cuda"
        found = list(checks_training.healing(settings, (), device))
        assert [one.grade for one in found] == [Grade.PASSED], (path, told(found))
        order = checks_training.timeouts_order(settings, (), 600)
        assert told(order).startswith("passed process_group_timeout_ms")


def test_checkpoints_by_a_flag_are_seen() -> None:
    assert "checkpoints are off" in healing({})
    assert "checkpoints are on" in healing(
        {"checkpoint": {**ON, "enable": False}}, "--checkpoint.enable"
    )
    assert "checkpoints are off" in healing({"checkpoint": ON}, "--checkpoint.no-enable")
    assert "checkpoints are off" in healing({"checkpoint": ON}, "--checkpoint.no_enable")


@pytest.mark.parametrize(
    ("checkpoint", "flags", "says"),
    [
        (ON, ["--checkpoint.load_step", "500"], "failed checkpoint.load_step is 500"),
        (ON, ["--checkpoint.load-step=-1"], "passed"),
        ({**ON, "exclude_from_loading": ["dataloader"]}, [], "failed checkpoint.exclude_from"),
        (ON, ["--checkpoint.exclude_from_loading", "optimizer,dataloader"], "failed"),
        ({**ON, "exclude_from_loading": ["optimizer"]}, [], "passed"),
        ({**ON, "keep_latest_k": 1}, [], "failed checkpoint.keep_latest_k is 1"),
        ({"keep_latest_k": 1}, [], "failed checkpoint.keep_latest_k is 1"),
        ({**ON, "enable_ft_dataloader_checkpoints": False}, [], "failed checkpoint.enable_ft"),
        ({"enable_ft_dataloader_checkpoints": False}, [], "warning checkpoint.enable_ft"),
        ({"initial_load_path": "/there"}, [], "failed checkpoint.initial_load_path is set and"),
        ({**ON, "initial_load_path": "/there"}, [], "passed"),
        ({**ON, "initial_load_path": "/gone"}, [], "failed checkpoint.initial_load_path /gone"),
        ({"initial_load_in_hf": True}, [], "failed checkpoint.initial_load_in_hf is set and"),
        (
            {**ON, "initial_load_in_hf": True, "initial_load_model_only": False},
            [],
            "torchtitan refuses it",
        ),
        ({**ON, "load_only": True}, [], "warning checkpoint.load_only"),
        ({**ON, "last_save_model_only": True}, [], "warning checkpoint.last_save_model_only"),
        ({**ON, "async_mode": "disabled"}, [], "warning checkpoint.async_mode"),
        ({}, ["--checkpoint.create_seed_checkpoint"], "failed checkpoint.create_seed"),
    ],
)
def test_settings_that_spoil_healing(
    checkpoint: dict[str, Any], flags: list[str], says: str
) -> None:
    assert says in healing({"checkpoint": checkpoint}, *flags)


def test_settings_between_groups() -> None:
    assert "failed fault_tolerance.process_group is nccl" in healing({}, device="cpu")
    gloo = {"fault_tolerance": {"process_group": "gloo", "min_replica_size": 2}}
    assert "warning fault_tolerance.process_group is gloo" in healing(gloo)
    assert "warning fault_tolerance.min_replica_size is 2" in healing(gloo)
    replicate = {"parallelism": {"data_parallel_replicate_degree": 2}}
    assert "warning parallelism.data_parallel_replicate_degree is 2" in healing(replicate)


def test_timeouts_out_of_order() -> None:
    settings = {"comm": {"train_timeout_seconds": 20}}
    flags = ["--fault_tolerance.process_group_timeout_ms", "30000"]
    assert told(checks_training.timeouts_order(settings, flags, 600)).startswith("failed")
    flags = ["--comm.train_timeout_seconds=soon"]
    assert "not a number" in told(checks_training.timeouts_order(settings, flags, 600))


# -- this machine -----------------------------------------------------------------


def test_the_interpreter() -> None:
    here, other = Path("/shared/env"), Path("/usr")
    assert told([checks_here.python((3, 12, 1), here, here)]).startswith("passed Python 3.12.1")
    assert told([checks_here.python((3, 14, 0), here, here)]).startswith("failed")
    assert told([checks_here.python((3, 10, 9), here, here)]).startswith("failed")
    assert told([checks_here.python((3, 11, 2), other, here)]).startswith("warning")
    assert "TFT_ENV" in told([checks_here.python((3, 11, 2), here, None)])


PINS = "# why\ntorch==2.13.0\ntorchft-nightly==2026.10.26\ntorchtitan==0.2.2\nrich==15.0.0\n"


def test_packages_against_the_pins() -> None:
    pinned = checks_here.pins(PINS)
    assert pinned["torchft-nightly"] == "2026.10.26"
    fine = {**pinned, "torch": "2.13.0+cu130"}
    assert told(checks_here.packages(pinned, fine)).startswith(
        "passed 4 of 4 as pinned (torch 2.13.0+"
    )
    old = told(checks_here.packages(pinned, {**fine, "torchft-nightly": "2025.7.16"}))
    assert "failed torchft-nightly 2025.7.16" in old
    assert "restart of the lighthouse" in old
    newer = told(checks_here.packages(pinned, {**fine, "torchft-nightly": "2026.12.1"}))
    assert "failed torchft-nightly 2026.12.1" in newer
    assert "restart of the lighthouse" not in newer
    assert "warning rich 14.0" in told(checks_here.packages(pinned, {**fine, "rich": "14.0"}))
    assert told(checks_here.packages(pinned, {})).count("is missing") == 4
    assert told(checks_here.packages({}, {})).startswith("could not look")


def test_ports() -> None:
    busy = {29510: "pid 7 of somebody"}
    assert told([checks_here.ports(29510, {}, [])]).startswith("passed 9 of 29510 to 29518")
    assert "failed 29510 cannot be opened: pid 7" in told([checks_here.ports(29510, busy, [])])
    ours = told([checks_here.ports(29510, busy, [29510])])
    assert ours.startswith("passed 8 of 29510 to 29518 are free, 1 by our lighthouse")
    after = dict.fromkeys(range(29511, 29519), "x")
    assert told([checks_here.ports(29510, after, [])]).startswith("warning all eight")


def test_room_for_what_runs_write() -> None:
    def say(problem: str = "", free: float = 200e9, checkpoints: bool = False) -> str:
        return told([checks_here.outputs(Path("/o"), problem, int(free), checkpoints)])

    assert say().startswith("passed /o can be written; 200.0 GB")
    assert say("Read-only file system").startswith("failed /o cannot be written: Read-only")
    assert say(free=5e8).startswith("failed")
    assert say(free=50e9).startswith("passed")
    assert say(free=50e9, checkpoints=True).startswith("warning")
    assert told([checks_here.limits(256)]).startswith("warning 256")
    assert told([checks_here.limits(-1)]) == "passed no limit -> "


def test_leftovers() -> None:
    one = ["http://a:1 (its process 7 is gone)"]
    assert told([checks_here.leftovers([], [], [])]).startswith("passed")
    assert told([checks_here.leftovers(one, ["http://a:1"], [])]).startswith("warning published")
    several = told([checks_here.leftovers([], ["http://a:1", "http://b:1"], [])])
    assert "-> set TORCHFT_LIGHTHOUSE" in several
    assert told([checks_here.leftovers([], [], [Path("/x")])]).startswith("warning 1 folders")


def test_tokens() -> None:
    def say(*have: bool) -> str:
        return told(checks_here.tokens(*have))

    assert say(False, False, False).startswith("warning absent, and the tokenizer")
    assert say(False, False, True).startswith("passed absent; the tokenizer is here")
    assert say(True, True, True) == "passed present -> \npassed present: training logs there -> "


# -- a node -----------------------------------------------------------------------

NODE: dict[str, Any] = {
    "python": "3.11.7",
    "versions": {"torch": "2.13.0"},
    "imports": {"torch": "2.13.0", "cuda": "13.0", "seconds": 4.2},
    "interfaces": {"lo": ["127.0.0.1"], "ib0": ["10.0.0.7"], "usb0": []},
    "reached": [{"host": "login", "port": 29510, "error": "", "seconds": 0.001}],
    "driver": "580.65.06",
    "limits": {"nofile": 4096, "nproc": -1, "memlock": -1},
    "shm_bytes": 64 << 30,
}


def seen(target: Target = TARGET, found: Found | None = None, **node: Any) -> list[Result]:
    found = found or Found(host="w-3", round_trip=0.05, clock=(-0.05, 0.01), node={**NODE, **node})
    return list(checks_node.node(target, found, {"torch": "2.13.0+cu130"}))


def test_a_node_that_is_fine() -> None:
    results = seen()
    assert {result.grade for result in results} == {Grade.PASSED}, told(results)
    assert "differ by at most 50 ms" in told(results, "clocks")
    assert "after 50 ms" in told(results, "shared file system")


@pytest.mark.parametrize(
    ("node", "check", "says"),
    [
        ({"versions": {"torch": "2.9"}}, "environment on a node", "torch 2.9 there, 2.13.0+cu130"),
        ({"versions": {}}, "environment on a node", "failed w-3: torch missing there"),
        ({"imports": {"error": "No module named 'x'"}}, "environment on a node", "named 'x'"),
        (
            {"reached": [{"host": "login", "port": 29510, "error": "timed out", "seconds": 3}]},
            "lighthouse from a node",
            "failed w-3 cannot reach login:29510: timed out -> publish an address",
        ),
        (
            {"reached": [{"url": "http://l:1", "error": "refused", "seconds": 3}]},
            "lighthouse from a node",
            "failed w-3 cannot reach http://l:1: refused",
        ),
        ({"reached": []}, "lighthouse from a node", "could not look no port"),
        ({"driver": "550.10"}, "driver and CUDA", "failed driver 550.10 of w-3 is too old"),
        ({"driver": ""}, "driver and CUDA", "could not look w-3 shows no NVIDIA driver"),
        (
            {"imports": {"torch": "2.13.0+cpu", "cuda": None, "seconds": 1}},
            "driver and CUDA",
            "built without CUDA",
        ),
        (
            {"limits": {"nofile": 256, "nproc": 1, "memlock": 65536}, "shm_bytes": 64 << 20},
            "limits of a job",
            "warning w-3: 256 open files",
        ),
    ],
)
def test_a_node_that_is_not(node: dict[str, Any], check: str, says: str) -> None:
    assert says in told(seen(**node), check)


def test_a_driver_that_is_seen_later_is_not_missed_now() -> None:
    found = Found(host="w-3", round_trip=0.1, clock=(0, 0), node={**NODE, "driver": ""})
    here = {"torch": "2.13.0"}
    assert exit_code(checks_node.node(TARGET, found, here)) == 4
    assert exit_code(checks_node.node(TARGET, found, here, deep=True)) == 0


def test_the_interface_on_a_node() -> None:
    assert "TFT_INTERFACE is not set; w-3 has lo (127.0.0.1), ib0" in told(seen(), "interface")
    assert told(seen(having(interface="ib0")), "interface").startswith(
        "passed ib0 of w-3: 10.0.0.7"
    )
    missing = told(seen(having(interface="ib0,eth7")), "interface")
    assert missing.startswith("failed w-3 has no eth7 that is up; it has lo")
    assert "has no address" in told(seen(having(interface="usb0")), "interface")


@pytest.mark.parametrize(
    ("clock", "says"),
    [
        ((-0.2, 0.3), "passed w-3 and this machine differ by at most 300 ms"),
        ((2.0, 2.1), "warning w-3 and this machine are at least 2.0 s apart"),
        ((9.0, 9.1), "failed w-3 is at least 9.0 s ahead of"),
        ((-9.1, -9.0), "failed w-3 is at least 9.0 s behind"),
        # A slow file system is no proof of anything.
        ((-40.0, 1.0), "passed"),
    ],
)
def test_clocks(clock: tuple[float, float], says: str) -> None:
    found = Found(host="w-3", round_trip=0.1, clock=clock, node=NODE)
    assert says in told(seen(found=found), "clocks")


def test_a_file_system_that_is_slow_or_not_shared() -> None:
    slow = Found(host="w-3", round_trip=31.0, clock=(-31, 0), node=NODE)
    assert told(seen(found=slow), "shared file system").startswith("warning w-3 answered")
    stale = Found(host="w-3", node=NODE)
    assert told(seen(found=stale), "shared file system").startswith("failed w-3 reads")
    died = Found(host="w-3", problem="the job on w-3 is NODE_FAIL")
    assert told(seen(found=died), "shared file system").startswith("could not look the job on w-3")
    assert exit_code(seen(found=died)) == 4
    lost = Found(ran_on="w-3", problem="the job on w-3 is FAILED")
    assert "file system that this machine" in told(seen(found=lost))
    assert exit_code(seen(found=lost)) == 1
    mute = Found(ran_on="w-3", wrote=True, problem="the job on w-3 is FAILED: no python")
    assert "failed the job on w-3 is FAILED: no python" in told(
        seen(found=mute), "environment on a node"
    )
    assert told(seen(found=mute), "shared file system").startswith("passed w-3 writes")
    busy = Found(problem="no node came free in time: the job waits (Resources)")
    assert told(seen(found=busy)).startswith("could not look no node came free")
    assert exit_code(seen(found=busy)) == 4
    refused = Found(host="w-3", refused="error: no virtual environment at .env: run 'make setup'")
    assert "failed w-3: no virtual environment" in told(seen(found=refused))


SUM = {
    "ranks": 16,
    "backend": "nccl",
    "bytes": 512 << 20,
    "right": True,
    "met_seconds": 2.0,
    "seconds": 0.004,
    "bus_bytes_per_second": 2.5e11,
}
CARDS = ["0, NVIDIA H100 80GB HBM3, 580.65.06, 81559 MiB, 31"] * 8


def test_between_nodes() -> None:
    def say(target: Target = TARGET, **found: Any) -> str:
        return told(checks_node.between(target, Found(**found), 2))

    parts = [{"host": f"w-{n}", "gpus": CARDS, "failure": ""} for n in range(2)]
    fine = say(parts=parts, allreduce=SUM)
    assert (
        "passed 16 ranks on 2 nodes by nccl: 250.00 GB/s (512 MiB in 4 ms; they met in 2.0 s)"
        in fine
    )
    assert "passed w-1: 8, the first is NVIDIA H100" in fine
    assert "failed a wrong sum" in say(parts=parts, allreduce={**SUM, "right": False})
    assert "could not look no node" in say(having(device="cpu"), problem="no node came free")
    stuck = say(parts=parts[:1], problem="w-0: rank 0: timed out")
    assert stuck.startswith("failed w-0: rank 0: timed out -> nodes must reach each other")
    few = [{**parts[0], "gpus": CARDS[:7]}, {**parts[1], "gpus": "No devices were found"}]
    lost = say(parts=few, allreduce=SUM)
    assert "failed w-0: 7 GPUs, and 8 ranks -> leave it out (sbatch --exclude=w-0)" in lost
    assert "failed w-1: nvidia-smi says: No devices" in lost


# -- the target -------------------------------------------------------------------


def test_the_target_comes_from_the_environment() -> None:
    env = {"TFT_INTERFACE": "ib0", "SBATCH_PARTITION": "h100", "SBATCH_QOS": "high"}
    target, _ = target_of("", env, account="lab")
    assert target.flags() == ["--partition=h100", "--account=lab", "--qos=high"]
    assert target_of("", env, partition="a100")[0].flags()[0] == "--partition=a100"
    assert target.interface == "ib0"
    assert target.quorum_timeout == 600


def test_the_target_comes_from_a_profile_and_jobs_get_its_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(REPOSITORY)
    target, env = target_of("h100", {"SBATCH_QOS": "high", "TFT_METHOD": "diloco"})
    assert target.flags() == ["--partition=h100", "--qos=high"]
    assert (target.interface, env["TFT_INTERFACE"]) == ("eth0", "eth0")
    assert target.quorum_timeout == 3600
    with pytest.raises(UsageError, match="did you mean h100"):
        target_of("h10", {})
