"""From Slurm's variables to torchrun: the command, the environment, the refusals."""

import http.server
import json
import os
import re
import signal
import socket
import string
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import lighthouse, nodecheck, reach
from launcher.config import Site
from launcher.environment import Task, replica_environment
from launcher.leader import Spread
from launcher.lighthouse import LighthouseDir
from launcher.model import BlindError, UsageError
from launcher.payload import Payload, why
from launcher.replica import run_replica
from launcher.rundir import Manifest, Outputs
from launcher.slurm import Slurm
from tests.conftest import FakeRun

SLURM = {
    "SLURM_ARRAY_JOB_ID": "50",
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "3",
    "SLURMD_NODENAME": "worker-1",
    "SLURM_GPUS_ON_NODE": "8",
}
CONFIG = """
[model]
hf_assets_path = "tokenizer"
[training]
dataset = "jsonl"
dataset_path = "corpus"
steps = 77
"""


@pytest.fixture
def listening() -> Iterator[str]:
    """Something that accepts connections where a lighthouse should be."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def env(hostile: Path, listening: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A complete place to start a replica group in, at a hostile path."""
    monkeypatch.chdir(hostile)
    monkeypatch.setattr(reach, "STATUS_SECONDS", 0.05)  # nothing answers in these tests
    monkeypatch.setattr(nodecheck, "check", lambda *args, **kwargs: None)  # there are no GPUs
    Path("config.toml").write_text(CONFIG)
    Path("tokenizer").mkdir()
    Path("tokenizer/tokenizer.json").write_text("{}")
    Path("corpus").mkdir()
    Path("corpus/train.jsonl").write_text("{}")
    return {**SLURM, "PATH": os.environ["PATH"], "TFT_CONFIG": "config.toml"} | {
        "TORCHFT_LIGHTHOUSE": listening
    }


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> list[Payload]:
    """Keeps torchrun from starting; collects what would have been started."""
    started: list[Payload] = []

    def run(self: Payload) -> int:
        started.append(self)
        return 0

    monkeypatch.setattr(Payload, "run", run)
    return started


def flags_of(payload: Payload, entry: str) -> list[str]:
    """What the ranks get: torchrun puts their arguments through ``string.Template``."""
    words = payload._argv[payload._argv.index(entry) + 1 :]
    return [string.Template(word).safe_substitute(local_rank="7") for word in words]


def test_a_replica_group_is_started_as_its_array_task_says(
    env: dict[str, str],
    torchrun: list[Payload],
    fake_run: FakeRun,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_replica(env, Slurm(fake_run)) == 0
    (payload,) = torchrun
    flags = flags_of(payload, "launcher.train")
    run = Outputs(Path("outputs").absolute()).find("50")
    assert flags == [
        "--job.config_file=config.toml",
        f"--job.dump_folder={run.path}",
        "--fault_tolerance.enable",
        "--fault_tolerance.replica_id=1",
        "--fault_tolerance.group_size=4",
    ]
    assert "--nproc-per-node=8" in payload._argv
    got = payload._env
    # Its manager talks to a relay in the launcher, which knows where the lighthouse is.
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", got["TORCHFT_LIGHTHOUSE"])
    assert got["TORCHFT_LIGHTHOUSE"] != env["TORCHFT_LIGHTHOUSE"]
    assert (got["REPLICA_GROUP_ID"], got["NUM_REPLICA_GROUPS"]) == ("1", "4")
    assert (got["JOB_ID"], got["TFT_ATTEMPT"]) == ("tft-50", "1")
    assert (got["TORCHFT_QUORUM_TIMEOUT_SEC"], got["TORCHFT_QUORUM_RETRIES"]) == ("600", "1200")
    out = capsys.readouterr().out.splitlines()[0]
    assert out.endswith("launching replica 1 (attempt 1) on worker-1")
    assert time.strptime(out[:21], "[%Y-%m-%d %H:%M:%S]")
    manifest = run.manifest()
    assert (manifest.group_size, manifest.ranks_per_group, manifest.steps) == (4, 8, 77)
    assert set(manifest.versions) == {"torch", "torchft-nightly", "torchtitan"}
    kinds = [json.loads(line)["kind"] for line in run.events(1).read_text().splitlines()]
    assert kinds == ["launch", "exit"]
    assert not fake_run.calls


def test_a_method_reaches_the_trainer_its_timeouts_the_manifest_and_the_log(
    env: dict[str, str],
    torchrun: list[Payload],
    fake_run: FakeRun,
    capsys: pytest.CaptureFixture[str],
) -> None:
    env |= {"TFT_METHOD": "diloco", "SLURM_ARRAY_TASK_ID": "0"}
    env["TFT_EXTRA_ARGS"] = "--fault_tolerance.sync_steps=11"
    url = env["TORCHFT_LIGHTHOUSE"]
    outputs = Outputs(Path("outputs").absolute())
    address = lighthouse.Address(
        url=url, host="h", port=1, pid=1, process_started=0.0, user="u", started=0.0
    )
    for waits, refused in ((10_000, True), (600_000, False)):
        folder = LighthouseDir.of(outputs, url)
        folder.publish(replace(address, join_timeout_ms=waits))
        if refused:
            with pytest.raises(UsageError, match=r"waits 10 s for .* TFT_METHOD=diloco set"):
                run_replica(env, Slurm(fake_run))
            assert torchrun == []
        else:
            assert run_replica(env, Slurm(fake_run)) == 0
    (payload,) = torchrun
    flags = payload._argv[payload._argv.index("launcher.train") + 6 :]
    assert flags == [
        "--fault_tolerance.semi_sync_method=diloco",
        "--fault_tolerance.sync_steps=100",
        "--job.custom_config_module=torchtitan.components.ft.config",
        "--fault_tolerance.sync_steps=11",
    ], "those of the user are the last"
    assert payload._env["TORCHFT_QUORUM_TIMEOUT_SEC"] == "3600"
    manifest = outputs.find("50").manifest()
    assert (manifest.method, manifest.sync_every) == ("diloco", 11)
    said = capsys.readouterr().out.splitlines()
    assert "] method diloco: a sync every 11 steps;" in said[0]
    assert "] batch: 8 a rank, once a step; 64 a replica group" in said[1]


def test_the_group_size_is_the_manifests_after_a_single_index_is_resubmitted(
    env: dict[str, str], torchrun: list[Payload], fake_run: FakeRun
) -> None:
    run_replica(env, Slurm(fake_run))
    Outputs(Path("outputs").absolute()).find("50").finished.unlink()
    env |= {"SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_ID": "2"}
    run_replica(env, Slurm(fake_run))
    assert torchrun[1]._env["NUM_REPLICA_GROUPS"] == "4"
    env["SLURM_ARRAY_TASK_ID"] = "5"
    with pytest.raises(UsageError, match="outside run tft-50, which has 4"):
        run_replica(env, Slurm(fake_run))


def test_a_task_requeued_after_the_run_has_finished_does_not_train_again_alone(
    env: dict[str, str],
    torchrun: list[Payload],
    fake_run: FakeRun,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_replica(env, Slurm(fake_run)) == 0
    assert run_replica(env, Slurm(fake_run)) == 0
    assert len(torchrun) == 1
    assert "run tft-50 has finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"TFT_CONFIG": "gone.toml"}, "config file gone.toml does not exist"),
        (
            {"TFT_EXTRA_ARGS": "--model.hf_assets_path=gone"},
            "no tokenizer in gone.*launcher assets",
        ),
        ({"TFT_EXTRA_ARGS": "--training.dataset_path gone"}, r"no \*\.jsonl.* in gone"),
        ({"TORCHFT_LIGHTHOUSE": "http://127.0.0.1:9"}, "cannot be reached.*lighthouse status"),
        ({"TORCHFT_LIGHTHOUSE": ""}, "(?s)no lighthouse is published.*lighthouse up"),
        ({"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4"}, "must be 0 to N-1"),
        ({"TFT_EXTRA_ARGS": "--fault_tolerance.no-enable"}, "must not set"),
        ({"TORCHFT_TIMEOUT_SEC": "9" * 20}, "below a million"),
        ({"TFT_MIN_STEP_SECONDS": "inf"}, "TFT_MIN_STEP_SECONDS"),
        ({"TFT_EXTRA_ARGS": "--training.steps=many"}, "training.steps must be a whole number"),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_started(
    env: dict[str, str],
    torchrun: list[Payload],
    fake_run: FakeRun,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str],
    says: str,
) -> None:
    monkeypatch.setattr("launcher.opening.LIGHTHOUSE_PATIENCE", 0.0)
    with pytest.raises(UsageError, match=says):
        run_replica(env | change, Slurm(fake_run))
    assert not torchrun
    assert not list(Path().glob("outputs/torchft/tft-*"))


TWO_NODES = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "worker-[0-1]"}


def test_a_group_of_several_nodes_is_led_from_the_first(
    env: dict[str, str],
    torchrun: list[Payload],
    fake_run: FakeRun,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake_run.on("scontrol", "show", "hostnames", "worker-[0-1]", out="worker-0\nworker-1\n")
    assert run_replica(env | TWO_NODES, Slurm(fake_run)) == 0
    (payload,) = torchrun
    run = Outputs(Path("outputs").absolute()).find("50")
    words = payload._argv
    spread = Spread.of_argv(words[words.index("leader") + 1 :])
    assert spread.nodes == ("worker-1", "worker-0"), "the launcher's own node is the first"
    assert (spread.ranks_per_node, spread.log_dir) == (8, run.ranks(1, 1))
    assert spread.flags[-1] == "--fault_tolerance.group_size=4"
    manifest = run.manifest()
    assert (manifest.nodes_per_group, manifest.ranks_per_group) == (2, 16)
    assert manifest.ranks_per_node == 8
    launch = json.loads(run.events(1).read_text().splitlines()[0])
    assert (launch["host"], launch["nodes"]) == ("worker-1", ["worker-1", "worker-0"])
    assert "launching replica 1 (attempt 1) on worker-1, worker-0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"SLURM_JOB_NUM_NODES": "1"}, "has 1 nodes of 8 ranks.* have 2 of 8.*--nodes=2"),
        ({"SLURM_GPUS_ON_NODE": "4"}, "has 2 nodes of 4 ranks.*--gpus-per-node=8"),
        ({"SLURMD_NODENAME": "login"}, "seen from login: submit the script with sbatch"),
    ],
)
def test_groups_of_another_shape_are_refused(
    env: dict[str, str],
    torchrun: list[Payload],
    fake_run: FakeRun,
    change: dict[str, str],
    says: str,
) -> None:
    fake_run.on("scontrol", "show", "hostnames", "worker-[0-1]", out="worker-0\nworker-1\n")
    run_replica(env | TWO_NODES, Slurm(fake_run))
    Outputs(Path("outputs").absolute()).find("50").finished.unlink()
    with pytest.raises(UsageError, match=says):
        run_replica(env | TWO_NODES | change | {"SLURM_ARRAY_TASK_ID": "2"}, Slurm(fake_run))
    assert len(torchrun) == 1


def test_outside_an_array_it_says_how_to_submit(fake_run: FakeRun) -> None:
    with pytest.raises(UsageError, match="sbatch --array=0-3"):
        run_replica({}, Slurm(fake_run))


def test_settings_by_hand_win_and_the_interface_reaches_both_backends() -> None:
    site = Site.from_environment({"TFT_INTERFACE": "eth0"})
    manifest = Manifest(
        run="tft-5",
        array_job_id=5,
        group_size=2,
        ranks_per_group=8,
        config="c",
        lighthouse="http://l:1",
    )
    run = Outputs(Path("/o")).run_of_array(5)
    base = {"TORCHFT_TIMEOUT_SEC": "7", "NCCL_SOCKET_IFNAME": "ib0"}
    env = replica_environment(base, site, manifest, run, Task(replica=1, attempt=1, node="w"))
    assert env["TORCHFT_TIMEOUT_SEC"] == "7"
    assert (env["NCCL_SOCKET_IFNAME"], env["GLOO_SOCKET_IFNAME"]) == ("ib0", "eth0")
    again = replica_environment(base, site, manifest, run, Task(replica=1, attempt=2, node="x"))
    assert env["WANDB_RUN_ID"] == again["WANDB_RUN_ID"]
    assert {name: value for name, value in env.items() if name.startswith("WANDB_")} == {
        "WANDB_RUN_GROUP": "tft-5",
        "WANDB_RUN_ID": "tft-5-1-0",
        "WANDB_NAME": "tft-5 replica 1",
        "WANDB_RESUME": "allow",
        "WANDB_JOB_TYPE": "replica",
        "WANDB_TAGS": "torchft,tft-5",
        "WANDB_DIR": "/o/torchft/tft-5",
        "WANDB_INIT_TIMEOUT": "30",
        "WANDB_FINISH_TIMEOUT": "10",
        "WANDB_ERROR_REPORTING": "false",
    }


SCRIPT = "my train.py"
ARGUMENTS = [
    "--n",
    "",
    "two words",
    'it\'s a "test"',
    "new\nline",
    "$(touch oops) `id` $HOME ${local_rank} $$",
    "ünï→",
    "--",
    "*",
    "-h",
]


def test_a_script_of_the_users_own_is_started_with_its_arguments_unchanged(
    env: dict[str, str], torchrun: list[Payload], fake_run: FakeRun
) -> None:
    Path(SCRIPT).write_text("print('ü')\n")
    env.pop("TFT_CONFIG")
    assert run_replica(env, Slurm(fake_run), script=[SCRIPT, *ARGUMENTS]) == 0
    (payload,) = torchrun
    assert flags_of(payload, "launcher.train.script") == ["--", SCRIPT, *ARGUMENTS]
    assert "launcher.train" not in payload._argv
    got = payload._env
    assert (got["REPLICA_GROUP_ID"], got["NUM_REPLICA_GROUPS"]) == ("1", "4")
    assert (got["TORCHFT_MANAGER_PORT"], got["TORCHFT_TIMEOUT_SEC"]) == ("0", "120")
    assert (got["TORCHFT_QUORUM_TIMEOUT_SEC"], got["TORCHFT_CONNECT_TIMEOUT_SEC"]) == ("600", "10")
    manifest = Outputs(Path("outputs").absolute()).find("50").manifest()
    assert (manifest.script, manifest.script_args) == (SCRIPT, tuple(ARGUMENTS))
    assert (manifest.config, manifest.steps) == ("", None)


def test_a_script_that_cannot_be_run_is_told_of_before_anything_is_started(
    env: dict[str, str], torchrun: list[Payload], fake_run: FakeRun
) -> None:
    with pytest.raises(UsageError, match=r"'gone.py' cannot be read here.*No such file"):
        run_replica(env, Slurm(fake_run), script=["gone.py"])
    with pytest.raises(UsageError, match=r"'\.' cannot be read here.*Is a directory"):
        run_replica(env, Slurm(fake_run), script=["."])
    Path("broken.py").write_text("import (\n")
    both = r"'broken.py' is not Python: .*line 1.*; TFT_EXTRA_ARGS is for torchtitan"
    with pytest.raises(UsageError, match=both):
        run_replica(env | {"TFT_EXTRA_ARGS": "--x"}, Slurm(fake_run), script=["broken.py"])
    with pytest.raises(UsageError, match=r"sbatch --array=0-3 slurm/replica-group.sbatch my_tr"):
        run_replica({}, Slurm(fake_run), script=[SCRIPT])
    assert not torchrun
    assert not list(Path().glob("outputs/torchft/tft-*"))


def test_wandb_is_on_where_there_is_a_key(
    env: dict[str, str], torchrun: list[Payload], fake_run: FakeRun
) -> None:
    assert run_replica(env | {"WANDB_API_KEY": "k"}, Slurm(fake_run)) == 0
    fake_run.on("squeue", out="")  # the first run has left the queue
    told = env | {"WANDB_API_KEY": "k", "TFT_EXTRA_ARGS": "--metrics.no-enable-wandb"}
    assert run_replica(told | {"SLURM_ARRAY_JOB_ID": "51"}, Slurm(fake_run)) == 0
    first, second = torchrun
    assert first._argv[-1] == "--metrics.enable_wandb"
    assert second._argv[-1] == "--metrics.no-enable-wandb"
    assert "--metrics.enable_wandb" not in second._argv


# -- one lighthouse, one run ----------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_is_in_the_queue(
    tmp_path: Path, fake_run: FakeRun
) -> None:
    folder = LighthouseDir.of(Outputs(tmp_path), "http://login:29510")
    folder.claim(50, Slurm(fake_run))
    folder.claim(50, Slurm(fake_run))
    assert not fake_run.calls
    fake_run.on("squeue", out="50|50|0|PENDING||2026-11-20T15:00:00|BeginTime\n")
    with pytest.raises(UsageError, match="already serves run tft-50"):
        folder.claim(60, Slurm(fake_run))
    assert folder.claimed_by() == 50
    fake_run.on("squeue", code=1, err="Unable to contact slurm controller")
    with pytest.raises(BlindError):
        folder.claim(60, Slurm(fake_run))
    assert folder.claimed_by() == 50
    fake_run.on("squeue", out="50|50|0|COMPLETED||2026-11-20T15:00:00|None\n")
    folder.claim(60, Slurm(fake_run))
    assert folder.claimed_by() == 60


STATUS = """
Current quorum_id: 3 <br>
<h2>Heartbeats</h2>
  <li class="heartbeat
  ">
    torchtitan_ft_0:abc-uuid: seen {age}s ago
  </li>
"""


@pytest.mark.parametrize(("age", "refused"), [("0.029254662", True), ("3.042383287", False)])
def test_a_run_of_another_clone_on_the_same_lighthouse_is_seen_by_its_heartbeats(
    age: str, refused: bool
) -> None:
    """The page as torchft-nightly 2026.10.26 serves it."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(STATUS.format(age=age).encode())

        def log_message(self, *details: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.handle_request).start()
        url = f"http://127.0.0.1:{server.server_port}"
        if refused:
            with pytest.raises(UsageError, match="torchtitan_ft_0 send heartbeats"):
                reach.refuse_strangers(url)
        else:
            reach.refuse_strangers(url)


def test_several_published_lighthouses_need_a_choice(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    for port in (1, 2):
        url = f"http://login:{port}"
        LighthouseDir.of(outputs, url).publish(
            lighthouse.Address(
                url=url, host="login", port=port, pid=1, process_started=0.0, user="u", started=0.0
            )
        )
    with pytest.raises(UsageError, match="several lighthouses"):
        lighthouse.discover(outputs, "")
    url, folder = lighthouse.discover(outputs, "http://login:2")
    assert (url, folder.path.name) == ("http://login:2", "login-2")
    LighthouseDir.of(outputs, "http://login:2").unpublish(1)
    assert lighthouse.discover(outputs, "")[0] == "http://login:1"


# -- the payload ------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(0)", 0),
        ("import sys; sys.exit(7)", 7),
        ("import os; os.kill(os.getpid(), 9)", 137),
    ],
)
def test_exit_codes_are_kept(code: str, expected: int) -> None:
    assert Payload(python(code), os.environ).run() == expected


def test_a_signal_reaches_the_payload_and_names_the_end(tmp_path: Path) -> None:
    """In a process of its own, as signals go to the whole of one."""
    mark = tmp_path / "mark"
    child = (
        "import pathlib,signal,sys,time\n"
        f"signal.signal(signal.SIGTERM, lambda *a: (pathlib.Path({str(mark)!r}).touch(), sys.exit(3)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    launcher = (
        "import os,sys\nfrom launcher.payload import Payload\n"
        f"p = Payload({[sys.executable, '-c', child]!r}, os.environ)\ncode = p.run()\n"
        "print(p.stopped_by.name)\nsys.exit(code)"
    )
    process = subprocess.Popen(python(launcher), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out, mark.exists()) == (143, "SIGTERM\n", True)


def failure(rank: int, code: int, when: int, message: str = "") -> dict[str, object]:
    return {"rank": rank, "local_rank": rank, "pid": 100 + rank, "exit_code": code} | {
        "time": when,
        "message": message,
    }


def test_the_rank_that_was_killed_is_named_and_not_the_ones_it_took_along(tmp_path: Path) -> None:
    path = tmp_path / "failures.json"
    broken = failure(0, -15, 10, "RuntimeError: connection reset")
    path.write_text(json.dumps([broken, failure(1, -9, 10, "Signal 9 (SIGKILL) received")]))
    assert why(path) == "rank 1 (pid 101) was killed by SIGKILL (1 more ended with it)"
    path.write_text(json.dumps([failure(0, 1, 12), failure(3, 1, 10, "ValueError: no")]))
    assert why(path) == "rank 3 (pid 103) exited with code 1: ValueError: no (1 more ended with it)"
    assert why(tmp_path / "none") == "torchrun itself failed; see the lines above"
