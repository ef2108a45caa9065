"""How much training gets done while things fail: this kit, and what a user would pick instead.

    python benchmarks/goodput.py [--window 180] [--seeds 1 2 3] [--schedules kill20,kill60,node,outage]
        [--systems kit,plain,classic,relaunch] [--keep MACHINE]

The same training, the same failures at the same moments, in the same sandbox, one after the other;
compared with the same without any failure. Every run's figures are appended to ``--runs`` and are not
measured again, so that a benchmark can be continued. Root; a run takes its window and about half
a minute more.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.arena import REPOSITORY, Arena
from benchmarks.goodput_account import Failure, schedule
from benchmarks.goodput_report import picture, report
from benchmarks.goodput_systems import Contest, System, classic, kit, plain, relaunch
from benchmarks.recovery import PLAIN

RESULTS = REPOSITORY / "benchmarks" / "results"
SYSTEMS: dict[str, System] = {"kit": kit, "plain": plain, "classic": classic, "relaunch": relaunch}
#: Mean seconds between two failures; of an outage there is one.
MEANS = {"kill60": 60.0, "kill20": 20.0, "node": 60.0, "outage": math.inf}
#: What a classic job assumes where no failure of its own is to be expected, seconds.
RARE = 3600.0
#: Steps between two checkpoints of the run that measures what one costs.
PROBE_INTERVAL = 10


def settings_of(options: argparse.Namespace) -> tuple[dict[str, str], str]:
    """Environment and trainer's flags of every system."""
    flags = f"--training.steps=1000000 --training.seq_len={options.seq_len}"
    flags += f" --training.local_batch_size={options.batch}"
    return {"TFT_MIN_STEP_SECONDS": str(options.pace)}, flags


def checkpointing(interval: int) -> str:
    return (
        f" --checkpoint.enable --checkpoint.interval={interval} --checkpoint.keep_latest_k=2"
        " --checkpoint.no-last-save-model-only"
    )


def failures_of(name: str, seed: int, options: argparse.Namespace) -> list[Failure]:
    if name == "none":
        return []
    if name == "outage":
        return [Failure(options.window / 3, 0)]
    return schedule(seed, MEANS[name], options.window, options.groups)


def strike(contest: Contest, name: str, failure: Failure) -> bool:
    """One failure; whether there was anything to hit."""
    if name == "outage":
        if contest.outage is None:
            return False
        threading.Thread(target=contest.outage, daemon=True).start()
        return True
    return (contest.lose_node if name == "node" else contest.kill)(failure.victim)


def race(contest: Contest, name: str, failures: Sequence[Failure], window: float) -> dict[str, Any]:
    """One window of one training."""
    begin = time.time()
    hits = []
    for failure in failures:
        time.sleep(max(0.0, begin + failure.at - time.time()))
        hits.append(strike(contest, name, failure))
    time.sleep(max(0.0, begin + window - time.time()))
    commits = [c for c in contest.commits() if c.t <= begin + window]
    done = contest.done(begin, begin + window)
    return {
        "useful_group_steps": done,
        "hits": hits,
        "failures": [[f.at, f.victim] for f in failures],
        "commits": [[round(c.t - begin, 3), c.step, c.replica] for c in sorted(commits)],
    }


def checkpoint_cost(arena: Arena, options: argparse.Namespace) -> tuple[float, float]:
    """(seconds of a checkpoint, seconds of a step) of the classic job."""
    settings, flags = settings_of(options)
    with classic(arena, options.groups, settings, flags + checkpointing(PROBE_INTERVAL)) as contest:
        time.sleep(8 * PROBE_INTERVAL * max(options.pace, 0.2))
        times = {c.step: c.t for c in contest.commits()}
    gaps = {a: times[b] - times[a] for a, b in itertools.pairwise(sorted(times)) if b == a + 1}
    usual = statistics.median(gap for step, gap in gaps.items() if step % PROBE_INTERVAL)
    saving = [gap for step, gap in gaps.items() if step % PROBE_INTERVAL == 0]
    return max(0.001, statistics.median(saving) - usual), usual


def best_interval(cost: float, step: float, mean: float) -> int:
    """Young and Daly: the square root of twice the cost of a checkpoint times the time between
    failures, in steps."""
    return max(1, round(math.sqrt(2 * cost * min(mean, RARE)) / step))


def bare_start(arena: Arena, options: argparse.Namespace) -> float:
    """Seconds from a launch to the first commit of a group that nobody waits for."""
    settings, flags = settings_of(options)
    env = {**PLAIN, **settings, "TFT_EXTRA_ARGS": flags}
    with arena.lighthouse("--no-act"), arena.run(1, env) as training:
        training.full(1, 1)
        lines = [json.loads(x) for x in training.dir.events(0).read_text().splitlines()]
        launch = next(e["t"] for e in lines if e["kind"] == "launch")
        first = next(e["t"] for e in lines if e["kind"] == "commit" and e["committed"])
        return float(first - launch)


class Ledger:
    """Runs that have been made, in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def find(self, **what: Any) -> dict[str, Any] | None:
        return next((r for r in self.rows if what.items() <= r.items()), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def measure(arena: Arena, ledger: Ledger, options: argparse.Namespace) -> None:
    """Everything that the ledger does not have yet."""
    common = {"window": options.window, "groups": options.groups, "pace": options.pace}
    if not (probe := ledger.find(kind="probe", **common)):
        cost, step = checkpoint_cost(arena, options)
        starts = [bare_start(arena, options) for _ in range(options.starts)]
        probe = {"kind": "probe", **common, "checkpoint_s": cost, "step_s": step, "starts": starts}
        ledger.add(probe)
        print(json.dumps(probe), flush=True)
    for seed in options.seeds:
        contests = [("kit", "none")]
        contests += [(s, n) for n in options.schedules for s in options.systems]
        for system, name in contests:
            key = {"kind": "run", "system": system, "schedule": name, "seed": seed, **common}
            if ledger.find(**key):
                continue
            settings, flags = settings_of(options)
            extra: dict[str, Any] = {}
            if system == "classic":
                interval = best_interval(probe["checkpoint_s"], probe["step_s"], MEANS[name])
                flags += checkpointing(interval)
                extra = {"interval": interval}
            try:
                with SYSTEMS[system](arena, options.groups, settings, flags) as contest:
                    failures = failures_of(name, seed, options)
                    row = race(contest, name, failures, options.window)
            except (TimeoutError, StopIteration) as error:
                print(f"{system}, {name}, seed {seed}: not measured: {error}", flush=True)
                continue
            row = {**key, **extra, "t": round(time.time()), **row}
            ledger.add(row)
            hits = f"{sum(row['hits'])} of {len(row['hits'])}"
            print(
                f"{system}, {name}, seed {seed}: {row['useful_group_steps']} group steps, {hits} hit",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--window", type=float, default=180.0, help="seconds of a run that count")
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--schedules", default="kill20,kill60,node,outage")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--pace", type=float, default=0.4, help="seconds of a step, at least")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--starts", type=int, default=3, help="bare starts that are measured")
    parser.add_argument("--requeue-delay", type=int, default=121, help="Slurm's own, seconds")
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "outputs" / "goodput.jsonl")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--keep", metavar="MACHINE", default="", help="keep the results")
    options = parser.parse_args()
    options.schedules = options.schedules.split(",")
    options.systems = options.systems.split(",")
    ledger = Ledger(options.runs)
    if not options.report_only:
        with Arena(nodes=options.groups + 1, requeue_delay=options.requeue_delay) as arena:
            measure(arena, ledger, options)
    made = f"{time.strftime('%Y-%m-%d')}, {options.keep or 'this machine'}"
    rows = [
        r
        for r in ledger.rows
        if (r["window"], r["groups"], r["pace"]) == (options.window, options.groups, options.pace)
    ]
    data, text = report(rows, made, tokens=options.seq_len * options.batch)
    print(text)
    if options.keep:
        (RESULTS / "goodput.json").write_text(json.dumps(data, indent=1) + "\n")
        (RESULTS / "goodput.md").write_text(text)
        picture(data, RESULTS / "goodput.svg")


if __name__ == "__main__":
    main()
