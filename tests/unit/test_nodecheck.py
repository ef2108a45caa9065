"""Unfit nodes are named, and the stacks of hung ranks are kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import nodecheck, stacks
from launcher.config import Site


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
        "from launcher.train.rank import write_stacks_when_asked\n"
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


def test_stacks_are_those_of_a_spare_that_became_the_group(tmp_path: Path) -> None:
    """Its environment, as the kernel shows it, is the spare's for ever."""
    code = "import time; print('up', flush=True); time.sleep(60)"
    for mark, ours in (
        (f"TFT_FAILURES={tmp_path}/ranks/standby-2.1/failures.json", True),
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
