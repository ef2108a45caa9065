"""What this kit costs while nothing fails: torchtitan, torchtitan with torchft, and this kit.

    python benchmarks/overhead.py [--rounds 60] [--steps 10] [--keep MACHINE]

The debug model on CPU, one rank, the metrics settings of the production config. All trainings are up
at once and take turns of a few steps (``benchmarks/baton.py``): what is compared is neighbours in
time, so that a noisy machine disturbs both. Twice: as they are, and with saves of the data loader's
place off, which torchft's trainer makes at every step and the kit at every tenth. Also: from the
start of an array task to its torchrun. Root; a sandbox.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil

from benchmarks.arena import REPOSITORY, Arena, until
from benchmarks.recovery import KIT, plain_lighthouse

RESULTS = REPOSITORY / "benchmarks" / "results"
#: Seconds for every training to come up, and for a turn.
PATIENCE = 120.0
FLAGS = (
    "--training.steps=1000000 --metrics.log_freq=10 --experimental.custom_import=benchmarks.baton"
)
NO_SAVES = "--checkpoint.no-enable-ft-dataloader-checkpoints"
CONFIG = "configs/debug-cpu.toml"
TITAN, FT, OURS = "torchtitan", "torchtitan + torchft", "this kit"
#: Of the interval around a median ratio.
RESAMPLES = 10_000
#: Turns of each that are thrown away: first steps, caches.
WARM_ROUNDS = 3

Turn = dict[str, float]


class Turns:
    """The trainings that have come up, and whose turn it is."""

    def __init__(self, place: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(place))
        self._listener.listen()
        self._listener.settimeout(PATIENCE)
        self._files: dict[str, IO[str]] = {}

    def await_all(self, number: int) -> None:
        while len(self._files) < number:
            connection, _ = self._listener.accept()
            connection.settimeout(PATIENCE)
            file = connection.makefile("rw")
            self._files[json.loads(file.readline())["name"]] = file

    def take(self, name: str, steps: int) -> Turn:
        """Let it take so many steps; what each of them took."""
        file = self._files[name]
        file.write(f"{steps}\n")
        file.flush()
        return dict(json.loads(file.readline()))

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._listener.close()


@contextmanager
def bare(mode: str, folder: Path, env: Mapping[str, str], extra: list[str]) -> Iterator[None]:
    """torchrun and one rank, without a launcher."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1"]
    argv += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--local-addr=127.0.0.1"]
    argv += ["-m", "benchmarks.bare_rank", mode, f"--job.config_file={CONFIG}"]
    argv += [f"--job.dump_folder={folder}", *FLAGS.split(), *extra]
    with (folder / f"{mode}.log").open("wb") as log:
        process = subprocess.Popen(
            argv,
            env={**env, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def compare(arena: Arena, rounds: int, steps: int, seed: int, extra: str) -> list[dict[str, Turn]]:
    """Turns of all three, round after round, in an order that changes."""
    order = random.Random(seed)  # noqa: S311
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tft-overhead-")))
        env = {**arena.env, "BENCH_BATON": str(folder / "baton")}
        turns = Turns(folder / "baton")
        stack.callback(turns.close)
        port = _free_port()
        stack.enter_context(_lighthouse(port))
        ft = {**env, "BENCH_NAME": FT, "TORCHFT_LIGHTHOUSE": f"http://127.0.0.1:{port}"}
        ft |= {"RUST_LOG": "warn"}
        flags = ["--fault_tolerance.enable", "--fault_tolerance.replica_id=0"]
        flags += ["--fault_tolerance.group_size=1", *extra.split()]
        stack.enter_context(bare("titan", folder, {**env, "BENCH_NAME": TITAN}, []))
        stack.enter_context(bare("ft", folder, ft, flags))
        stack.enter_context(arena.lighthouse("--no-act"))
        settings = {
            **KIT,
            "BENCH_BATON": env["BENCH_BATON"],
            "BENCH_NAME": OURS,
            "TFT_EXTRA_ARGS": f"{FLAGS} {extra}",
            "TFT_WEIGHT_HASH_EVERY": "10",
        }
        stack.enter_context(arena.run(1, settings))
        turns.await_all(3)
        found = []
        for number in range(-WARM_ROUNDS, rounds):
            names = [TITAN, FT, OURS]
            order.shuffle(names)
            taken = {name: turns.take(name, steps) for name in names}
            if number >= 0:
                found.append(taken)
        return found


@contextmanager
def _lighthouse(port: int) -> Iterator[None]:
    class At:
        url = f"http://127.0.0.1:{port}"

    with plain_lighthouse(At):  # type: ignore[arg-type]
        yield


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ratio(rounds: list[dict[str, Turn]], ours: str, theirs: str, what: str) -> dict[str, float]:
    """Median of the paired ratios, with a 95 % bootstrap interval."""
    ratios = [each[ours][what] / each[theirs][what] for each in rounds]
    chance = random.Random(1)  # noqa: S311
    medians = sorted(
        statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)
    )
    return {
        "median": statistics.median(ratios),
        "low": medians[int(RESAMPLES * 0.025)],
        "high": medians[int(RESAMPLES * 0.975)],
    }


def summary(rounds: list[dict[str, Turn]]) -> dict[str, Any]:
    per_step = {
        name: {
            f"{what}_ms": 1000 * statistics.median(each[name][what] for each in rounds)
            for what in ("wall", "cpu")
        }
        for name in (TITAN, FT, OURS)
    }
    ratios = {
        f"{ours} / {theirs}, {what}": ratio(rounds, ours, theirs, what)
        for ours, theirs in ((FT, TITAN), (OURS, FT))
        for what in ("wall", "cpu")
    }
    return {"rounds": len(rounds), "per_step": per_step, "ratios": ratios}


def starts(arena: Arena, number: int) -> dict[str, list[float]]:
    """Seconds from the start of an array task to that of its torchrun, and of CPU in it."""
    wall, cpu = [], []
    for _ in range(number):
        with arena.lighthouse("--no-act"), arena.run(1, KIT) as training:
            until(lambda: _torchrun(training.dir.path.name) is not None, "torchrun starts")
            torchrun = _torchrun(training.dir.path.name)
            assert torchrun is not None
            # The job script ends with exec: its shell's start is the launcher's.
            launcher = psutil.Process(torchrun.ppid())
            times = launcher.cpu_times()
            wall.append(torchrun.create_time() - launcher.create_time())
            cpu.append(times.user + times.system)
    return {"wall": wall, "cpu": cpu}


def _torchrun(run: str) -> psutil.Process | None:
    for process in psutil.process_iter():
        try:
            if "launcher.train.torchrun" in process.cmdline() and run == process.environ().get(
                "JOB_ID"
            ):
                return process
        except (psutil.Error, OSError):
            continue
    return None


def report(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    columns = ["", "step, ms", "CPU of the rank, ms"]
    lines = [f"# Overhead\n\n{result['made']}; `python benchmarks/overhead.py`.", ""]
    for name, part in result["comparisons"].items():
        lines += [
            f"{name}: {part['rounds']} rounds of {result['steps']} steps each, medians.",
            "",
            f"| {' | '.join(columns)} |",
            "|---" * len(columns) + "|",
        ]
        for who, figures in part["per_step"].items():
            lines.append(f"| {who} | {figures['wall_ms']:.1f} | {figures['cpu_ms']:.1f} |")
        lines += ["", "| paired ratio | median | 95 % interval |", "|---|---|---|"]
        for who, found in part["ratios"].items():
            lines.append(
                f"| {who} | {found['median']:.4f} | {found['low']:.4f} to {found['high']:.4f} |"
            )
        lines.append("")
    wall, cpu = result["starts"]["wall"], result["starts"]["cpu"]
    if wall:
        lines.append(
            f"Start of an array task to its torchrun: median {statistics.median(wall):.2f} s, fastest "
            f"{min(wall):.2f} s, worst {max(wall):.2f} s of {len(wall)} (limit 0.5 s); CPU of the job "
            f"script and the launcher in it: median {statistics.median(cpu):.2f} s."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=10, help="of a turn")
    parser.add_argument("--starts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", metavar="MACHINE", default="", help="keep the results")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "made": f"{time.strftime('%Y-%m-%d')}, {options.keep or 'this machine'}",
        "steps": options.steps,
        "comparisons": {},
    }
    with Arena(nodes=1) as arena:
        result["starts"] = starts(arena, options.starts)
        print(json.dumps(result["starts"]), flush=True)
        for name, extra in (("As they are", ""), ("Without saves of the data loader", NO_SAVES)):
            rounds = compare(arena, options.rounds, options.steps, options.seed, extra)
            result["comparisons"][name] = summary(rounds)
            result["comparisons"][name]["turns"] = rounds
            print(json.dumps(summary(rounds)), flush=True)
            if options.keep:
                (RESULTS / "overhead.json").write_text(json.dumps(result, indent=1) + "\n")
                (RESULTS / "overhead.md").write_text(report(result))
    print(report(result))


if __name__ == "__main__":
    main()
