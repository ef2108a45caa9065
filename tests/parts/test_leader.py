"""A replica group over several nodes, without Slurm and torch: programs stand in for srun and torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launcher import wire
from launcher.leader import Spread
from launcher.payload import node_of, why
from launcher.slurm import over_nodes
from tests.conftest import REPOSITORY

#: Starts its command once for each of the nodes in FAKE_NODES, and waits for all of them.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for name in $FAKE_NODES; do SLURMD_NODENAME=$name "$@" & done
[ -z "$FAKE_REFUSAL" ] || { sleep 1; exit "$FAKE_REFUSAL"; }
wait
"""
#: Read by every Python of these tests: a node's torchrun is the text among the trainer's flags.
TORCHRUN = """
import os, sys
if "launcher.task" in sys.orig_argv:
    from launcher import command, leader
    def argv(self, trainer):
        return [sys.executable, "-c", (trainer or [os.environ.get("FAKE_WAITING", "")])[0],
                str(self.node_rank), self.master]
    command.Torchrun.argv = argv
    leader.START_SECONDS = 3.0
"""
#: What every rank writes down, and what fails on the second node.
SAY = (
    "import json, os, sys, time\n"
    "from launcher.parentage import die_with_parent\n"
    "die_with_parent(parent=int(os.environ['TFT_LAUNCHER']))\n"  # as the real torchrun does
    "node, master = sys.argv[1:3]\n"
    "name, out = os.environ['SLURMD_NODENAME'], os.environ['OUT']\n"
    "text = json.dumps({'pid': os.getpid(), 'events': os.environ.get('TFT_EVENTS'),"
    " 'master': master, 'name': name, 'key': 'TFT_LEADER_KEY' in os.environ})\n"
    "open(f'{out}/new.{node}', 'w').write(text)\n"
    "os.rename(f'{out}/new.{node}', f'{out}/node.{node}')\n"
)
WAIT = SAY + "time.sleep(60)\n"
FAIL = SAY + (
    "while not os.path.exists(f'{out}/fail'): time.sleep(0.02)\n"
    "if node != '1': time.sleep(60)\n"
    "failure = {'rank': 1, 'local_rank': 0, 'pid': 7, 'exit_code': -9, 'time': 1, 'message': ''}\n"
    "json.dump([failure], open(os.environ['TFT_FAILURES'], 'w'))\n"
    "sys.exit(1)\n"
)
#: Ranks that wait, as the real ones do.
WAITING = (
    "import os, sys\n"
    "from launcher.train.rank import await_assignment\n"
    "os.environ['RANK'] = sys.argv[1]\n"
    "was = sys.argv[1:]\n"
    "await_assignment(os.environ['TFT_STANDBY'])\n"
    "text, sys.argv[1:] = sys.argv[1], was\n"
    "exec(text)\n"
)


#: Stands in for the launcher.
LAUNCHER = (
    "import os, subprocess, sys\n"
    "env = {**os.environ, 'TFT_LAUNCHER': str(os.getpid())}\n"
    "subprocess.run(sys.argv[1:], env=env, start_new_session=True)\n"
)


class Led:
    """A leader that runs."""

    def __init__(self, folder: Path, process: subprocess.Popen[str]) -> None:
        self.folder, self.process = folder, process
        self.failures = folder / "failures.json"

    def ranks(self, count: int = 2) -> list[dict[str, object]]:
        """What the nodes' ranks wrote down, once all have."""
        eventually(lambda: len(list(self.folder.glob("node.*"))) >= count)
        return [json.loads((self.folder / f"node.{n}").read_text()) for n in range(count)]

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(int(str(rank["pid"]))) for rank in self.ranks()]

    def end(self) -> int:
        return self.process.wait(20)


def eventually(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(processes: list[psutil.Process]) -> bool:
    return not any(
        p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes if p.pid
    )


@pytest.fixture
def lead(tmp_path: Path) -> Iterator[Callable[..., Led]]:
    """Starts the leader of two nodes, n0 and n1."""
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    (tmp_path / "sitecustomize.py").write_text(TORCHRUN)
    started: list[subprocess.Popen[str]] = []

    def start(text: str, nodes: str = "n0 n1", *, launcher: bool = False, **more: str) -> Led:
        spread = Spread(
            nodes=("n0", "n1"), ranks_per_node=1, address="127.0.0.1", log_dir=tmp_path / "logs",
            flags=(text,) if text else (),
        )  # fmt: skip
        env = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{tmp_path}:{REPOSITORY}",
            "FAKE_NODES": nodes,
            "OUT": str(tmp_path),
            "TFT_DEVICE": "cpu",
            "TFT_EVENTS": str(tmp_path / "x.events.jsonl"),
            "TFT_FAILURES": str(tmp_path / "failures.json"),
            "TFT_LAUNCHER": str(os.getpid()),
            "SLURM_JOB_ID": str(os.getpid()),
        }
        (tmp_path / "logs").mkdir()
        argv = [sys.executable, "-c", LAUNCHER, *spread.argv()] if launcher else spread.argv()
        process = subprocess.Popen(
            argv, env=env | more, cwd=tmp_path, text=True, stdout=subprocess.DEVNULL
        )
        started.append(process)
        return Led(tmp_path, process)

    yield start
    for process in started:
        process.kill()
        process.wait(10)


def test_the_command_of_a_step_says_all_that_a_job_could_say_otherwise() -> None:
    command = over_nodes(2, ["python"], cpus="128", gpus="8")
    assert command[0] == "srun"
    assert command[-1] == "python"
    for flag in ("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--overlap", "--export=ALL"):
        assert flag in command
    assert {"--cpus-per-task=128", "--gpus-per-node=8"} <= set(command)
    assert not any("pus-per" in word for word in over_nodes(2, ["python"]))


def test_what_a_leader_is_told_is_what_it_reads() -> None:
    spread = Spread(
        nodes=("a", "b"), ranks_per_node=8, address="h", log_dir=Path("/o/it's a log"),
        flags=("--x=y z", "--", "--nodes=9"),
    )  # fmt: skip
    words = spread.argv()
    assert Spread.of_argv(words[words.index("leader") + 1 :]) == spread


def test_every_node_runs_its_part_and_all_end_well(lead: Callable[..., Led]) -> None:
    led = lead(SAY)
    assert led.end() == 0
    one, other = led.ranks()
    assert (one["name"], other["name"]) == ("n0", "n1")
    assert one["master"] == other["master"]
    assert str(one["events"]).endswith("/x.events.jsonl")
    assert str(other["events"]).endswith("/x.node-1.events.jsonl")
    assert not one["key"]
    assert not led.failures.exists()


def test_a_part_that_fails_ends_the_others_and_is_named(lead: Callable[..., Led]) -> None:
    led = lead(FAIL)
    ranks = led.processes()
    (led.folder / "fail").touch()
    before = time.monotonic()
    assert led.end() == 1
    assert time.monotonic() - before < 8
    assert gone(ranks)
    assert why(led.failures) == "rank 1 (pid 7) on n1 was killed by SIGKILL"
    assert node_of(led.failures) == "n1"


def test_nothing_outlives_a_leader_that_is_killed(lead: Callable[..., Led]) -> None:
    led = lead(WAIT)
    ranks = led.processes()
    led.process.kill()
    eventually(lambda: gone(ranks), 8)


def test_nothing_outlives_a_launcher_that_is_killed(
    lead: Callable[..., Led], tmp_path: Path
) -> None:
    led = lead(WAIT, launcher=True)
    ranks = led.processes()
    led.process.kill()
    eventually(lambda: gone(ranks), 8)


def test_nothing_outlives_srun(lead: Callable[..., Led]) -> None:
    led = lead(WAIT)
    ranks = led.processes()
    (srun,) = psutil.Process(led.process.pid).children()
    srun.kill()
    assert led.end() != 0
    assert gone(ranks)
    assert why(led.failures).startswith("srun ended with code -9")


def test_a_node_whose_part_is_killed_is_not_called_unfit(lead: Callable[..., Led]) -> None:
    led = lead(WAIT)
    ranks = led.processes()
    parent = ranks[1].parent()
    assert parent is not None
    parent.kill()
    assert led.end() == 1
    eventually(lambda: gone(ranks), 8)
    assert why(led.failures) == "n1 has ended its part without a word"


def test_a_node_that_does_not_start_its_part_is_unfit(lead: Callable[..., Led]) -> None:
    led = lead(WAIT, nodes="n0")
    assert led.end() == 1
    assert why(led.failures).startswith("unfit node: n1 has not started its part within")
    assert node_of(led.failures) == "n1"
    assert gone([psutil.Process(pid) for pid in psutil.pids() if pid == led.ranks(1)[0]["pid"]])


@pytest.mark.parametrize(
    ("nodes", "says"),
    [
        ("n0", "unfit node: n1 could not be given its part by Slurm"),
        ("", "n0 could not be given its part by Slurm"),
    ],
)
def test_a_node_that_slurm_cannot_reach_is_unfit_and_not_all_of_them(
    lead: Callable[..., Led], nodes: str, says: str
) -> None:
    led = lead(WAIT, nodes=nodes, FAKE_REFUSAL="1")
    assert led.end() == 1
    assert why(led.failures) == says


def test_an_unfit_node_says_so(lead: Callable[..., Led], tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    check = '[ "$SLURMD_NODENAME" != n1 ] || { echo "the fan is off"; exit 1; }\n'
    (tmp_path / "slurm" / "node-check.sh").write_text(check)
    led = lead(WAIT)
    assert led.end() == 1
    assert why(led.failures) == "unfit node: n1: slurm/node-check.sh says: the fan is off"


#: Stands in for NVIDIA's library: one GPU, which has an Xid error.
NVML = """
import types
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = nvmlEventTypeXidCriticalError = 0
NVML_TEMPERATURE_GPU = 0
told = []
def nothing(*args): return 0
nvmlInit = nvmlShutdown = nvmlDeviceGetHandleByIndex = nvmlDeviceGetMemoryInfo = nothing
nvmlDeviceGetTotalEccErrors = nvmlDeviceRegisterEvents = nvmlEventSetCreate = nothing
nvmlDeviceGetRetiredPagesPendingStatus = nvmlDeviceGetCurrentClocksEventReasons = nothing
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetTemperature(*args): return 61
def nvmlEventSetWait_v2(*args):
    if told: raise TimeoutError
    told.append(1)
    return types.SimpleNamespace(device=0, eventData=79)
"""


def test_the_gpus_of_every_further_node_are_watched(
    lead: Callable[..., Led], tmp_path: Path
) -> None:
    (tmp_path / "pynvml.py").write_text(NVML)
    run = tmp_path / "tft-5"
    run.mkdir()
    who = {"REPLICA_GROUP_ID": "3", "TFT_ATTEMPT": "2", "TFT_DEVICE": "cuda"}
    led = lead(WAIT, TFT_EVENTS=str(run / "tft-5_3.events.jsonl"), **who)
    led.ranks()
    events = run / "tft-5_3.node-1.events.jsonl"
    eventually(lambda: events.is_file() and len(events.read_text().splitlines()) == 2)
    gpu, xid = map(json.loads, events.read_text().splitlines())
    assert (gpu["kind"], gpu["host"], gpu["replica"], gpu["celsius"]) == ("gpu", "n1", 3, 61)
    assert (xid["kind"], xid["attempt"], xid["gpu"], xid["xid"]) == ("xid", 2, 0, 79)
    assert [path.name for path in run.iterdir()] == [events.name], "the launcher has the first's"


def test_a_signal_reaches_every_node(lead: Callable[..., Led]) -> None:
    mark = "import signal\nsignal.signal(15, lambda *a: (open(f'{out}/{node}.term', 'w'), sys.exit(1)))\n"
    led = lead(mark + WAIT)
    led.ranks()
    led.process.send_signal(signal.SIGTERM)
    assert led.end() == 128 + signal.SIGTERM
    assert sorted(path.name for path in led.folder.glob("*.term")) == ["0.term", "1.term"]


def test_ranks_that_wait_on_all_nodes_are_told_what_to_be(
    lead: Callable[..., Led], tmp_path: Path
) -> None:
    own = tmp_path / "launchers"
    own.mkdir()
    assignment = own / "assignment.json"
    assignment.touch()
    led = lead("", TFT_STANDBY=str(assignment), FAKE_WAITING=WAITING)
    eventually(lambda: len(list(own.glob("ready.*"))) == 2)
    assert not list(tmp_path.glob("node.*"))
    env = {"TFT_EVENTS": str(tmp_path / "y.events.jsonl"), "TFT_FAILURES": "elsewhere"}
    assignment.write_text(json.dumps({"flags": [SAY], "env": env}))
    assert led.end() == 0
    events = [Path(str(rank["events"])).name for rank in led.ranks()]
    assert events == ["y.events.jsonl", "y.node-1.events.jsonl"]


@pytest.mark.parametrize("key", ["right", "wrong"])
def test_only_who_knows_the_key_is_heard(key: str) -> None:
    heard: list[wire.Channel | None] = []
    with wire.listen() as listener:

        def accept() -> None:
            sock, _ = listener.accept()
            heard.append(wire.accept(sock, "right"))

        thread = threading.Thread(target=accept)
        thread.start()
        channel = wire.connect("127.0.0.1", listener.getsockname()[1], key)
        thread.join(10)
    (other,) = heard
    assert (channel is not None, other is not None) == (key == "right", key == "right")
    if channel is not None and other is not None:
        assert channel.send("hello", name="ü\n")
        assert other.receive(5) == {"do": "hello", "name": "ü\n"}
        assert other.receive(0.01) is None
        channel.close()
        assert other.receive(5) is None
        assert not other.silent
