"""Runs of one machine: the daemon with small programs for tasks, and who asks it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from launcher import local_run, stages
from launcher.care import View, needed
from launcher.demo import Demo
from launcher.events import ReplicaLogReader
from launcher.findings import Snapshot
from launcher.lighthouse import Address, LighthouseDir, discover
from launcher.local import Array, Local, LocalError, LocalFiles, LocalNode, LocalTask, State
from launcher.model import BlindError, KitError, UsageError
from launcher.process import start_time, still_runs
from launcher.rundir import Outputs, RunDir
from launcher.scheduler import cluster_of, scheduler_of
from launcher.slurm import Job, Slurm
from launcher.state import RunState
from launcher.watcher import Watcher
from tests.conftest import REPOSITORY, FakeRun, apply_all
from tests.unit.conftest import MANIFEST

#: The daemon, with something that stands in for the lighthouse, and in less of a hurry to wait.
DAEMON = """
import sys
from launcher import local_daemon
class Lighthouse:
    url = "http://127.0.0.1:1"
    def __init__(self, *given): pass
    def come_up(self, stopping): pass
    def keep(self): pass
    def end(self): pass
local_daemon.OwnLighthouse = Lighthouse
local_daemon.START_EVERY = 0.3
local_daemon.KILL_SECONDS = 1.0
local_daemon.LINGER_SECONDS = 1.0
sys.exit(local_daemon.main(sys.argv[1:]))
"""
Start = Callable[..., Local]


@pytest.fixture
def run(hostile: Path) -> RunDir:
    return Outputs(hostile).run_of_array(50)


@pytest.fixture
def start(run: RunDir, hostile: Path) -> Iterator[Start]:
    """Starts a daemon whose tasks run a text of the shell."""
    started: list[subprocess.Popen[bytes]] = []

    def start(text: str, tasks: int = 1, nodes: int | None = None) -> Local:
        files = LocalFiles(run)
        files.requests.mkdir(parents=True)
        array = Array(
            array_job_id=50,
            tasks=tasks,
            nodes=tuple(
                LocalNode(name=f"local-{i}", gpus=(str(i),)) for i in range(nodes or tasks)
            ),
            command=("/bin/sh", "-c", text),
        )
        files.array_path.write_text(json.dumps(asdict(array)))
        env = {
            "PATH": os.environ["PATH"],
            "OUT": str(hostile),
            "TFT_OUTPUTS": str(hostile),
            "PYTHONPATH": str(REPOSITORY),
        }
        with files.log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", DAEMON, str(run.path)], env=env, stdout=log, stderr=log
            )
        started.append(process)
        eventually(files.state_path.exists, "the daemon runs")
        return Local(run)

    yield start
    for process in started:
        process.kill()
        process.wait()


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def states(local: Local) -> list[str]:
    return [job.state for job in local.jobs(50)]


def daemon_pid(run: RunDir) -> int:
    return LocalFiles(run).state().pid


#: Seconds that nobody else sleeps for: it tells the sleepers of this very test run.
LONG = f"8{os.getpid():07}"


def sleepers() -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline() == ["sleep", LONG]:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_tasks_get_what_slurm_would_give_them_and_end_as_there(
    start: Start, run: RunDir, hostile: Path
) -> None:
    local = start(
        'echo "$SLURM_ARRAY_TASK_ID started"\n'
        "case $SLURM_ARRAY_TASK_ID in\n"
        '0) env > "$OUT/first"; exit 0 ;;\n'
        '1) [ -n "$SLURM_RESTART_COUNT" ] || exit 75; env > "$OUT/again"; exit 0 ;;\n'
        "2) exit 3 ;;\n"
        "esac",
        tasks=3,
    )
    eventually(lambda: states(local) == ["COMPLETED", "COMPLETED", "FAILED"], "all have ended")
    env = dict(
        line.split("=", 1) for line in (hostile / "first").read_text().split("\n") if "=" in line
    )
    given = {k: v for k, v in env.items() if k.startswith(("SLURM", "TORCHFT", "CUDA"))}
    assert given == {
        "SLURM_ARRAY_JOB_ID": "50",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_ARRAY_TASK_COUNT": "3",
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_MAX": "2",
        "SLURM_JOB_ID": "50",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURMD_NODENAME": "local-0",
        "TORCHFT_LIGHTHOUSE": "http://127.0.0.1:1",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    assert "SLURM_RESTART_COUNT=1\n" in (hostile / "again").read_text()
    assert run.log(1, "out").read_text() == "1 started\n1 started\n", "appended over a requeue"
    # A failed task may be put back, until nobody is expected to do that any more.
    local.requeue("50_2")
    eventually(lambda: run.log(2, "out").read_text().count("started") == 2, "it starts again")
    eventually(lambda: LocalFiles(run).state().ended, "the daemon ends")
    assert states(local) == ["COMPLETED", "COMPLETED", "FAILED"], "known afterwards, too"
    with pytest.raises(LocalError, match="has ended"):
        local.requeue("50_2")


def test_a_requeued_task_is_ended_whole_and_started_again(start: Start, run: RunDir) -> None:
    # Its children are in sessions of their own, as ranks are; one ignores SIGTERM.
    local = start(
        f"setsid sleep {LONG} & (trap '' TERM; exec setsid sleep {LONG}) &\nwait", tasks=2
    )
    eventually(lambda: states(local) == ["RUNNING", "RUNNING"], "they run")
    eventually(lambda: len(sleepers()) == 4, "with their children")
    before = set(sleepers())
    (kept, lost) = LocalFiles(run).state().tasks
    local.requeue("50_1")
    eventually(lambda: LocalFiles(run).state().tasks[1].restarts == 1, "it is requeued")
    eventually(lambda: states(local) == ["RUNNING", "RUNNING"], "it runs again")
    eventually(lambda: len(sleepers()) == 4, "with its children")
    assert len(before & set(sleepers())) == 2, "the other task's go on"
    after = LocalFiles(run).state().tasks
    assert (after[0].pid, after[0].restarts) == (kept.pid, 0)
    assert after[1].pid != lost.pid
    # Why it ended is in its log, in words that the monitor knows.
    (event,) = ReplicaLogReader("x.err", 1).read(0, run.log(1, "err").read_bytes())
    assert (event.kind, event.get("host"), event.get("due")) == (
        "slurm_cancelled", "local-1", "JOB REQUEUE",
    )  # fmt: skip
    local.cancel(50)
    eventually(lambda: states(local) == ["CANCELLED", "CANCELLED"], "both end")
    assert not sleepers()


def test_who_does_not_heed_sigterm_is_killed_and_the_daemon_ends(
    start: Start, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_run, "STOP_SECONDS", 15.0)
    local = start("trap '' TERM; while :; do sleep 0.05; done", tasks=2)
    eventually(lambda: states(local) == ["RUNNING", "RUNNING"], "they run")
    pids, daemon = [task.pid for task in LocalFiles(run).state().tasks], daemon_pid(run)
    created = {pid: start_time(pid) for pid in (*pids, daemon)}
    said: list[str] = []
    local_run.down(run, said.append)
    assert said == ["run tft-50 is ended"]
    assert states(local) == ["CANCELLED", "CANCELLED"]
    assert LocalFiles(run).log.read_text().count("ended (SIGKILL): CANCELLED") == 2
    assert not [pid for pid in (*pids, daemon) if still_runs(pid, created[pid])]
    with pytest.raises(LocalError, match="has ended"):
        local.cancel(50)
    local_run.down(run, said.append)
    assert said[1:] == ["run tft-50 has ended already"]


def test_tasks_end_with_a_daemon_that_is_killed_and_that_is_noticed(
    start: Start, run: RunDir
) -> None:
    # (Ranks end with their launcher; another program may not.)
    local = start(f"setsid sleep {LONG} & exec sleep {LONG}", tasks=2)
    eventually(lambda: len(sleepers()) == 4, "they run")
    os.kill(daemon_pid(run), signal.SIGKILL)
    eventually(lambda: len(sleepers()) == 2, "they end with it")
    for ask in (
        lambda: local.jobs(50), local.nodes, lambda: local.requeue("50_0"),
        lambda: local.arrays_on("local-0"), lambda: local.excluded_nodes("50_0"),
    ):  # fmt: skip
        with pytest.raises(
            BlindError, match=r"daemon of tft-50 \(pid \d+\) is gone.*launcher cancel"
        ):
            ask()
    said: list[str] = []
    local_run.down(run, said.append)
    assert "2 processes of tft-50 were left behind, and are killed" in said
    eventually(lambda: not sleepers(), "nothing is left")
    assert states(local) == ["CANCELLED", "CANCELLED"]


def test_a_daemon_that_hangs_is_not_believed(start: Start, run: RunDir) -> None:
    local = start(f"exec sleep {LONG}")
    eventually(lambda: states(local) == ["RUNNING"], "it runs")
    daemon = psutil.Process(daemon_pid(run))
    daemon.suspend()
    eventually(lambda: daemon.status() == "stopped", "it is stopped")
    with pytest.raises(BlindError, match=r"did not answer within 0\.2 s"):
        Local(run, patience=0.2).requeue("50_0")
    assert not list(LocalFiles(run).requests.iterdir()), "nor is it done when nobody expects it"
    os.utime(LocalFiles(run).state_path, (1, 1))
    with pytest.raises(BlindError, match="no sign"):
        local.jobs(50)
    daemon.resume()
    eventually(lambda: LocalFiles(run).state_path.stat().st_mtime > 1, "it goes on")
    assert states(local) == ["RUNNING"]


def test_nodes_are_left_out_and_nonsense_is_refused(start: Start, run: RunDir) -> None:
    local = start(f"exec sleep {LONG}", tasks=2, nodes=3)
    eventually(lambda: states(local) == ["RUNNING", "RUNNING"], "they run")
    assert [(n.name, n.state) for n in local.nodes()] == [
        ("local-0", "alloc"), ("local-1", "alloc"), ("local-2", "idle"),
    ]  # fmt: skip
    local.start_now("50_1", ["local-1"])
    local.requeue("50_1")
    eventually(lambda: local.jobs(50)[1].node == "local-2", "it runs elsewhere")
    assert local.excluded_nodes("50_1") == ["local-1"]
    assert local.arrays_on("local-2") == [50]
    assert local.arrays_on("local-1") == []
    assert local.time_limit("50_1") == "UNLIMITED"
    # With nowhere to go, it waits.
    local.start_now("50_1", ["local-1", "local-2"])
    local.requeue("50_1")
    eventually(lambda: local.jobs(50)[1].reason == "Resources", "it waits for a node")
    with pytest.raises(LocalError, match="task 1 is pending already"):
        local.requeue("50_1")
    local.start_now("50_1", [])
    eventually(lambda: local.jobs(50)[1].node == "local-1", "it starts")
    local.release("50_1")
    with pytest.raises(LocalError, match="tasks 0 to 1, not 7"):
        local.requeue("50_7")
    with pytest.raises(LocalError, match="no node 'w0'"):
        local.start_now("50_1", ["w0"])
    with pytest.raises(LocalError, match="only the whole of tft-50 can be cancelled, and not 51"):
        local.cancel(51)
    with pytest.raises(ValueError, match="51_0"):
        local.requeue("51_0")
    assert local.jobs(51) == []
    requests = LocalFiles(run).requests
    for name, text in (("a", "{"), ("b", "{}"), ("c", '{"do": "shutdown", "task": 0}')):
        (requests / f"{name}.json").write_text(text)
        eventually((requests / f"{name}.answer").exists, "it is answered")
        assert json.loads((requests / f"{name}.answer").read_text())["error"]
    assert states(local) == ["RUNNING", "RUNNING"], "and nobody is harmed"


def test_who_runs_a_run_is_in_its_manifest(run: RunDir, fake_run: FakeRun) -> None:
    slurm = Slurm(fake_run)
    assert scheduler_of(run, slurm) is slurm
    run.local.mkdir(parents=True)
    assert cluster_of(run) == "local", "its first task has not started yet"
    manifest = asdict(MANIFEST)
    run.manifest_path.write_text(json.dumps({**manifest, "cluster": "local"}))
    assert isinstance(scheduler_of(run, slurm), Local)
    del manifest["cluster"]
    run.manifest_path.write_text(json.dumps(manifest))
    assert cluster_of(run) == "slurm", "as older manifests, which do not say it"
    run.manifest_path.write_text("{")
    assert cluster_of(run) == "local", "it cannot be read, and a daemon is there"
    run.manifest_path.write_text(json.dumps({**manifest, "cluster": "cloud"}))
    with pytest.raises(UsageError, match="cloud"):
        scheduler_of(run, slurm)


def test_what_cannot_be_read_is_blindness(run: RunDir) -> None:
    files = LocalFiles(run)
    with pytest.raises(BlindError, match=r"no state\.json"):
        Local(run).jobs(50)
    run.local.mkdir(parents=True)
    files.state_path.write_text('{"tasks": 3}')
    with pytest.raises(BlindError, match="not understood"):
        Local(run).jobs(50)
    task = LocalTask(task=0, state="RUNNING", node="local-0", start=1000.0)
    files.write(
        State(
            host="elsewhere", pid=os.getpid(), process_started=start_time(os.getpid()),
            lighthouse="", ended=False, tasks=(task,),
        )
    )  # fmt: skip
    with pytest.raises(BlindError, match="runs on elsewhere"):
        Local(run).jobs(50)
    with pytest.raises(BlindError, match="runs on elsewhere"):
        local_run.down(run, lambda line: None)


@pytest.fixture
def place(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything is there that training needs, but torch."""
    monkeypatch.chdir(hostile)
    (hostile / "tokenizer").mkdir()
    (hostile / "tokenizer" / "tokenizer.json").write_text("{}")
    (hostile / "c.toml").write_text('[model]\nhf_assets_path = "tokenizer"\n')
    return hostile


def test_a_run_that_cannot_be_is_not_started(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = Outputs(place / "outputs")

    def up(replicas: int, config: str = "c.toml", **env: str) -> None:
        local_run.up(outputs, Path(config), replicas=replicas, env=env)

    with pytest.raises(UsageError, match="3 tasks of 2 ranks need 6 GPUs, and 4 are seen"):
        up(3, CUDA_VISIBLE_DEVICES="0,1,2,3", TFT_RANKS_PER_NODE="2")
    with pytest.raises(UsageError, match="need 2 GPUs, and 0 are seen"):
        up(2, CUDA_VISIBLE_DEVICES="")
    with pytest.raises(UsageError, match=r"nothing\.toml does not exist"):
        up(2, "nothing.toml", TFT_DEVICE="cpu")
    with pytest.raises(UsageError, match="TFT_DEVICE"):
        up(2, TFT_DEVICE="tpu", CUDA_VISIBLE_DEVICES="0")
    assert not outputs.root.exists()
    # Nor is anything left of one whose daemon does not come up.
    monkeypatch.setattr(local_run, "START_SECONDS", 20.0)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(KitError, match="did not come up: it said nothing"):
        up(2, TFT_DEVICE="cpu")
    assert list(outputs.torchft.iterdir()) == []


def test_a_machine_is_shared_out(place: Path) -> None:
    shares = local_run._shares(2, 2, ["0", "2", "4", "6", "GPU-x"])
    assert [(share.name, share.gpus) for share in shares] == [
        ("local-0", ("0", "2")),
        ("local-1", ("4", "6")),
    ]
    assert len(local_run._shares(1, 2, ["0", "1", "2", "3"])) == 2, "a lost task may go to another"
    assert [s.gpus for s in local_run._shares(2, 8, None)] == [(), ()]
    env = local_run._environment(
        {"SLURM_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "TFT_INTERFACE": "eth9",
         "TFT_EXTRA_ARGS": "--a 'b c'", "SECRET": "x", "USER": "me"},
        Outputs(place), Path("c.toml"), 1, ["--training.steps", "5 $(x)"],
    )  # fmt: skip
    assert "SLURM_JOB_ID" not in env
    assert "SLURM_ARRAY_TASK_ID" not in env
    assert env["TFT_EXTRA_ARGS"] == "--a 'b c' --training.steps '5 $(x)'"
    assert (env["TFT_INTERFACE"], env["TFT_NODE_ADDRESS"]) == ("eth9", "127.0.0.1")
    assert (env["TFT_SPARES"], env["SECRET"], env["SLURM_JOB_USER"]) == ("1", "x", "me")


def test_two_runs_of_one_second_have_two_numbers_beyond_slurms(hostile: Path) -> None:
    names = [local_run._new_run(Outputs(hostile)).name for _ in range(3)]
    numbers = [int(name.removeprefix("tft-")) for name in names]
    assert len(set(numbers)) == 3
    assert min(numbers) > 0x03FFFFFF, "Slurm's highest job id"


def test_a_runs_own_lighthouse_serves_no_other(hostile: Path) -> None:
    outputs = Outputs(hostile)
    for name, port in (("tft-1795000000", 1), ("login-29510", 2)):
        folder = LighthouseDir(outputs.lighthouses / name)
        folder.path.mkdir(parents=True)
        folder.publish(
            Address(url=f"http://127.0.0.1:{port}", host="h", port=port, pid=1,
                    process_started=0.0, user="u", started=0.0)
        )  # fmt: skip
    assert discover(outputs, "")[0] == "http://127.0.0.1:2"
    assert discover(outputs, "http://127.0.0.1:1")[1].path.name == "tft-1795000000"


def test_the_demo_says_why_it_plays_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    why = stages.no_slurm()
    assert why == "a Slurm of this machine's own needs root"
    title = stages.LocalStage(Outputs(Path("o")), 100, why).title
    assert title.startswith("No Slurm here (a Slurm of this machine's own needs root)")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    assert stages.no_slurm().startswith("Slurm cannot be installed: no apt-get here")


def test_the_demo_plays_elsewhere_where_a_sandbox_does_not_come_up(tmp_path: Path) -> None:
    class Nowhere(stages.LocalStage):
        def set_up(self, tell: Callable[[str], None]) -> None:
            raise KitError("mknod was refused")

        def clean_up(self) -> None:
            cleaned.append(self.title)

    outputs, said, cleaned = Outputs(tmp_path), list[str](), list[str]()

    def otherwise(why: str) -> stages.Stage:
        return Nowhere(outputs, 60, why)

    with pytest.raises(KitError, match="mknod"):
        Demo(outputs, Nowhere(outputs, 60, "first"), said.append, otherwise).run()
    told = [line for line in said if line]
    assert [title.partition(")")[0] for title in told] == [
        "== No Slurm here (first",
        "== No Slurm here (it does not come up: mknod was refused",
    ]
    assert len(cleaned) == 2


def test_what_is_told_names_who_runs_the_tasks(run: RunDir) -> None:
    state = RunState(2, 100)
    with Watcher(list, lambda: state, slurm=Local(run)):
        assert state.scheduler == "the daemon"
    state.group(1).attempt = 1
    failed = Job(job_id=50, array_job_id=50, task=1, state="FAILED", node="", reason="None")
    (action,) = needed(View(state=state, now=100.0, jobs=[failed]))
    assert (action.kind, action.why) == ("requeue", "the daemon says FAILED")
    waits = dataclasses.replace(failed, state="PENDING", reason="Resources")
    (notice,) = apply_all(state, state.observe([waits], 101.0))
    assert notice.text == "replica 1 requeued by the daemon, waiting (Resources)"
    here = Snapshot(state=state, now=100.0, job="50")
    assert here.requeue(1) == "`python -m launcher requeue tft-50 1`"
    there = Snapshot(state=RunState(2, 100), now=100.0, job="50")
    assert there.requeue(1) == here.requeue(1), "one command, whoever runs the tasks"
