"""Weights & Biases in training: beside upstream, over a requeue, and with a server that is not there."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from launcher.config import Site
from launcher.environment import Task, replica_environment
from launcher.rundir import Manifest, RunDir
from tests.conftest import REPOSITORY
from tests.wandb_file import config_of, records

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]

#: Trains nothing for some steps without a logger, then with the one that torchtitan builds.
PROGRAM = """
import json, sys, time
begin, steps = int(sys.argv[1]), 60
from launcher.train import device
device.prepare("cpu")
import torch.distributed as dist
from torchtitan.components import metrics
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from launcher.train import tracking
tracking.PROBE_SECONDS = 1.0
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
config = JobConfig()
config.job.dump_folder, config.metrics.enable_wandb = sys.argv[2], True

def train(logger):
    seconds = []
    for step in range(begin, begin + steps):
        t = time.perf_counter()
        time.sleep(0.005)
        logger.log({"loss_metrics/global_avg_loss": 5.0}, step)
        seconds.append(time.perf_counter() - t)
    return sorted(seconds)[steps // 2]

without = train(metrics.BaseLogger())
tracking.adapt()
t = time.perf_counter()
logger = metrics._build_metric_logger(config, ParallelDims(1, 1, 1, 1, 1, 1, 1, 1))
start = time.perf_counter() - t
with_it = train(logger)
if len(sys.argv) > 3:
    logger._loggers[0]._thread.join(0.0)
    while not logger._loggers[0]._rows.empty():
        time.sleep(0.01)
    open(sys.argv[3], "w").close()
    time.sleep(0.1)
t = time.perf_counter()
logger.close()
print(json.dumps({"without": without, "with": with_it, "start": start,
                  "close": time.perf_counter() - t}))
"""


@pytest.fixture(scope="module", autouse=True)
def _cpu() -> None:
    from launcher.train import device

    device.prepare("cpu")


class Broken:
    """W&B whose service has died."""

    run = None

    def log(self, *args: Any, **more: Any) -> None:
        raise BrokenPipeError("the service is gone, and so is key " + "k" * 40)


def broken() -> Any:
    from torchtitan.components.metrics import WandBLogger

    inner = WandBLogger.__new__(WandBLogger)
    inner.wandb, inner.tag = Broken(), None
    return inner


def test_upstream_ends_the_rank_when_wandbs_service_dies() -> None:
    with pytest.raises(BrokenPipeError):
        broken().log({"loss": 1.0}, 1)


def test_an_error_of_wandb_is_told_once_and_without_the_key(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchtitan.tools.logging import logger

    from launcher.train.tracking import BackgroundLogger

    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr(BackgroundLogger, "_begin", lambda self: broken())
    logger.addHandler(caplog.handler)
    ours = BackgroundLogger("unused", None)
    ours.log({"loss": 1.0}, 1)
    ours.log({"loss": 1.0}, 2)
    ours.close()
    logger.removeHandler(caplog.handler)
    assert caplog.text.count("W&B lacks data from here on") == 1
    assert "kkk" not in caplog.text


def test_wandb_that_is_stuck_takes_neither_time_nor_memory_without_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchtitan.tools.logging import logger

    from launcher.train import tracking

    stuck = threading.Event()

    def begin(self: tracking.BackgroundLogger) -> Any:
        stuck.wait()
        raise OSError

    monkeypatch.setattr(tracking, "MOST_ROWS", 2)
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(tracking.BackgroundLogger, "_begin", begin)
    logger.addHandler(caplog.handler)
    ours = tracking.BackgroundLogger("unused", None)
    began = time.monotonic()
    for step in range(5):
        ours.log({"loss": 1.0}, step)
    ours.close()
    assert time.monotonic() - began < 2
    stuck.set()
    logger.removeHandler(caplog.handler)
    assert caplog.text.count("W&B lacks data from here on (it does not keep up)") == 1


MANIFEST = Manifest(
    run="tft-5",
    array_job_id=5,
    group_size=2,
    ranks_per_group=1,
    config="configs/debug-cpu.toml",
    lighthouse="http://127.0.0.1:1",
    created=77.5,
)


def environment(run: RunDir, attempt: int = 1, **more: str) -> dict[str, str]:
    """What the ranks of replica group 1 get, in Slurm, from the functions that give it."""
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURMD_NODENAME": f"worker-{attempt}",
        "TFT_CONFIG": MANIFEST.config,
        "TFT_DEVICE": "cpu",
    }
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    base = keep | slurm | more
    task = Task(replica=1, node=slurm["SLURMD_NODENAME"], index=1, attempt=attempt)
    return replica_environment(base, Site.from_environment(base), MANIFEST, run, task)


def train(
    env: Mapping[str, str], folder: Path, begin: int = 0, mark: Path | None = None
) -> tuple[dict[str, float], str]:
    """What the program measured, and its log."""
    argv = [sys.executable, "-c", PROGRAM, str(begin), str(folder)]
    argv += [str(mark)] if mark is not None else []
    began = time.monotonic()
    done = subprocess.run(
        argv, env=env, cwd=REPOSITORY, timeout=100, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(next(x for x in done.stdout.splitlines() if x.startswith('{"without')))
    return measured | {"all": time.monotonic() - began}, done.stdout + done.stderr


def losses(path: Path) -> dict[int, float]:
    """By step, from a file of W&B's."""
    found = {}
    for record in records(path):
        if record.HasField("history"):
            row = {(*i.nested_key, i.key)[0]: json.loads(i.value_json) for i in record.history.item}
            if "loss_metrics/global_avg_loss" in row:
                found[row["_step"]] = row["loss_metrics/global_avg_loss"]
    return found


def test_a_requeued_replica_group_goes_on_in_its_run(tmp_path: Path) -> None:
    """Two attempts, one after the other, on two nodes; W&B offline, read back from its files."""
    run = RunDir(tmp_path / "tft-5")
    run.path.mkdir()
    told = []
    for attempt in (1, 2):
        env = environment(run, attempt, WANDB_MODE="offline", WANDB_SILENT="true")
        assert env["WANDB_RESUME"] == "allow"
        folder = tmp_path / f"attempt {attempt}"
        train(env, folder, begin=attempt * 100)
        (path,) = folder.glob("**/offline-run-*/*.wandb")
        found = list(records(path))
        start = next(r.run for r in found if r.HasField("run"))
        told.append((start.run_id, start.run_group, start.job_type, start.display_name))
        assert list(start.tags) == ["torchft", "tft-5"]
        config = config_of(found)
        assert config["slurm"] == {
            "job": "7",
            "array_job": "5",
            "array_task": "1",
            "node": f"worker-{attempt}",
            "attempt": str(attempt),
            "config": "configs/debug-cpu.toml",
        }
        assert config["model"]["name"] == "llama3"
        assert losses(path) == dict.fromkeys(range(attempt * 100, attempt * 100 + 60), 5.0)
    assert told == [("tft-5-1-77", "tft-5", "replica", "tft-5 replica 1")] * 2


@pytest.mark.parametrize("kind", ["refuses", "is silent"])
def test_a_server_that_is_not_there_delays_neither_the_start_nor_a_step(
    kind: str, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "tft-5")
    run.path.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        if kind == "refuses":
            server.close()
        env = environment(run, WANDB_BASE_URL=url, WANDB_API_KEY="k" * 40)
        took, log = train(env, tmp_path / "logs")
    assert took["start"] < 5, "the import of W&B, and no wait"
    assert took["with"] < took["without"] + 0.002
    assert took["close"] < 8, "a second of the probe is left, and W&B's own start on disk"
    (path,) = tmp_path.glob("**/offline-run-*/*.wandb")
    assert losses(path) == dict.fromkeys(range(60), 5.0), "no row is lost"
    why = "ConnectionError" if kind == "refuses" else "no answer within 1 s"
    assert f"W&B cannot be reached ({why}): this start is kept on disk" in log
    assert f"`wandb sync {path.parent}`" in log
    assert "kkk" not in log


@pytest.fixture
def fading(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server that stops to answer once a file is there."""
    mark, over = tmp_path / "mark", threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if mark.exists():
                over.wait()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data":{}}')

        do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", mark
    over.set()
    server.shutdown()
    server.server_close()


def test_a_server_that_falls_silent_costs_a_limited_time_at_the_end(
    fading: tuple[str, Path], tmp_path: Path
) -> None:
    url, mark = fading
    run = RunDir(tmp_path / "tft-5")
    run.path.mkdir()
    env = environment(run, WANDB_BASE_URL=url, WANDB_API_KEY="k" * 40, WANDB_FINISH_TIMEOUT="1")
    took, log = train(env, tmp_path / "logs", mark=mark)
    assert took["with"] < took["without"] + 0.002
    assert took["close"] < 4
    (path,) = tmp_path.glob("**/run-*/*.wandb")
    assert losses(path) == dict.fromkeys(range(60), 5.0), "all of it is on disk"
    assert "kkk" not in log
