"""How fast the monitor is: on a long past, on a fresh line, and beside ``grep -c 'Quorum!'``.

    python benchmarks/monitor_speed.py [--machine "2 cores, Debian 12"]

Writes logs as a steady run makes them (requests, statuses and one quorum a step; a loss and a
return every thousand steps), in the format of torchft-nightly 2026.10.26, into a temporary folder
(2 GB), and measures how long a monitor that is started then needs for them, how long after a line
was written `launcher monitor` reports it, and the fold beside grep at several numbers of replica
groups (at least one eighth of its speed). With ``--machine`` the results are kept in
``benchmarks/results/``; seconds are that machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
#: Limits: of catching up with the log of a long run, and of reporting a loss.
CATCH_UP_SECONDS, CATCH_UP_MB, LATENCY_SECONDS = 10.0, 300.0, 1.0
#: Losses whose report is timed.
LOSSES = 10

#: Runs of each, alternating; medians are printed.
RUNS = 3
LOSS_EVERY = 1000


def stamp(seconds: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds))
    return f"{whole}.{int(seconds % 1 * 1000):03d} [INFO] [torchft::lighthouse] - "


def member(replica: int, step: int) -> str:
    uuid = f"{replica:08x}-c44d-433e-8c94-5e8f1c3c86cb"
    handle = '"{\\"id\\": \\"7a9522e6a71e4024b5ce4f14b2191c56\\", \\"store\\": \\"w:38455\\"}"'
    return (
        f'QuorumMember {{ replica_id: "torchtitan_ft_{replica}:{uuid}", address: '
        f'"http://worker-{replica}:39749", store_address: "worker-{replica}:45865", step: {step}, '
        f'world_size: 8, shrink_only: false, commit_failures: 0, data: "", '
        f"reconfigure_handles: [{', '.join([handle] * 8)}] }}"
    )


def log_lines(groups: int) -> Iterator[str]:
    """An endless run of ``groups`` replica groups."""
    quorum_id, now, step = 1, 1_795_180_000.0, 0
    yield f"{stamp(now)}Lighthouse listening on: http://login-0:29510\n"
    while True:
        lost = step % LOSS_EVERY in range(900, 950)
        present = [r for r in range(groups) if not (lost and r == groups - 1)]
        if step and step % LOSS_EVERY in (900, 950):
            quorum_id += 1
            yield f"{stamp(now)}Detected quorum change, bumping quorum_id to {quorum_id}\n"
        for replica in present:
            uuid = f"{replica:08x}-c44d-433e-8c94-5e8f1c3c86cb"
            text = f"Received quorum request for replica torchtitan_ft_{replica}:{uuid}"
            yield f"{stamp(now)}{text}\n"
        yield f"{stamp(now)}Quorum status: Fast quorum found! [{len(present)}/{len(present)}]\n"
        members = ", ".join(member(replica, step) for replica in present)
        yield (
            f"{stamp(now)}Quorum! Quorum {{ quorum_id: {quorum_id}, participants: [{members}], "
            f"created: Some(Timestamp {{ seconds: {int(now)}, nanos: 1 }}) }}\n"
        )
        step, now = step + 1, now + 5.0


def write_log(path: Path, groups: int, megabytes: int) -> None:
    size = 0
    with path.open("w", encoding="ascii") as file:
        for line in log_lines(groups):
            size += file.write(line)
            if size >= megabytes << 20:
                return


FOLD = """
import resource, sys, time
from pathlib import Path
from launcher.watcher import Watcher
started = time.perf_counter()
with Watcher.of_files(Path(sys.argv[1]), []) as watcher:
    watcher.look(final=True)
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
      watcher.state.quorum_id, len(watcher.state.incidents))
"""


def fold_speed(groups: int, megabytes: int) -> dict[str, float]:
    """One row of the first table."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lighthouse.log")
        write_log(path, groups, megabytes)
        size = path.stat().st_size / 1e6
        greps, folds, memory = [], [], 0
        for _ in range(RUNS):
            started = time.perf_counter()
            subprocess.run(
                ["grep", "-c", "Quorum!", str(path)],
                check=True,
                capture_output=True,  # into /dev/null grep stops at the first match
            )
            greps.append(time.perf_counter() - started)
            seconds, rss = fold(path)
            folds.append(seconds)
            memory = max(memory, rss)
    grep, median = statistics.median(greps), statistics.median(folds)
    return {
        "groups": groups,
        "megabytes": round(size),
        "grep_s": round(grep, 3),
        "fold_s": round(median, 3),
        "fold_over_grep": round(median / grep, 1),
        "megabytes_per_s": round(size / median),
        "peak_rss_mb": memory,
    }


def fold(path: Path) -> tuple[float, int]:
    """Seconds and peak memory (MB) of a monitor that reads ``path`` for the first time."""
    done = subprocess.run(
        [sys.executable, "-c", FOLD, str(path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    seconds, megabytes, *_ = done.stdout.split()
    return float(seconds), int(megabytes)


def catch_up(megabytes: int) -> dict[str, float]:
    """A monitor that is started when four groups have written a log of this size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lighthouse.log")
        write_log(path, 4, megabytes)
        results = [fold(path) for _ in range(RUNS)]
        return {
            "groups": 4,
            "bytes": path.stat().st_size,
            "median_s": round(statistics.median(seconds for seconds, _ in results), 2),
            "worst_s": round(max(seconds for seconds, _ in results), 2),
            "limit_s": CATCH_UP_SECONDS,
            "peak_rss_mb": max(rss for _, rss in results),
            "limit_rss_mb": CATCH_UP_MB,
        }


def latency() -> dict[str, float]:
    """From a line in the lighthouse's log to the monitor's line about it.

    `launcher monitor` follows a recorded run; time and again a quorum without replica 1 is
    written, with the present time, and later one with it again.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "outputs", "torchft", "tft-5183502")
        shutil.copytree(REPOSITORY / "tests" / "fixtures" / "node-down", folder)
        log = folder / "lighthouse.log"
        lines = log.read_text().splitlines(keepends=True)
        number = next(i for i, line in enumerate(lines) if "quorum_id: 2," in line)
        both, alone = lines[number - 8], lines[number]
        both = next(line for line in reversed(lines[:number]) if "Quorum! " in line)
        log.write_text("".join(lines[:number]).rpartition("\n")[0] + "\n")
        for path in folder.glob("*.events.jsonl"):  # of before the loss
            text = path.read_text().splitlines(keepends=True)
            path.write_text("".join(text[:40]))
        squeue = Path(place, "squeue")
        squeue.write_text('#!/bin/sh\necho "1|5183502|0|RUNNING|w|2026-01-01T00:00:00|None"\n')
        squeue.chmod(0o755)
        shutil.copy(squeue, squeue.with_name("sinfo"))
        env = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", "TZ": "UTC"}
        env |= {"TFT_OUTPUTS": str(Path(place, "outputs"))}
        monitor = subprocess.Popen(
            [sys.executable, "-m", "launcher", "monitor", "5183502"],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=REPOSITORY,
        )
        assert monitor.stdout is not None
        seconds = []
        try:
            for quorum_id in range(2, 2 + 2 * LOSSES):
                time.sleep(1.0 + quorum_id * 0.37 % 1)  # at any moment between two looks
                line = (both if quorum_id % 2 else alone).partition(" ")[2]
                now = time.time()
                whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
                line = re.sub(r"quorum_id: \d+", f"quorum_id: {quorum_id}", line, count=1)
                started = time.perf_counter()
                with log.open("a") as file:
                    file.write(f"{whole}.{int(now % 1 * 1000):03d} {line}")
                while f"quorum {quorum_id} " not in (told := monitor.stdout.readline()):
                    if not told:
                        raise SystemExit("the monitor ended")
                if "replica 1 LOST" in told:
                    seconds.append(time.perf_counter() - started)
        finally:
            monitor.kill()
            monitor.wait()
    assert len(seconds) == LOSSES
    return {
        "losses": LOSSES,
        "median_s": round(statistics.median(seconds), 2),
        "worst_s": round(max(seconds), 2),
        "limit_s": LATENCY_SECONDS,
    }


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    caught, told = result["catch_up"], result["latency"]
    rows = [
        (
            f"catch up with a lighthouse log of {caught['bytes'] / 1e9:.1f} GB, 4 groups",
            f"{caught['median_s']} s (worst {caught['worst_s']})",
            f"{caught['limit_s']:g} s",
        ),
        ("its peak memory", f"{caught['peak_rss_mb']} MB", f"{caught['limit_rss_mb']:g} MB"),
        (
            f"from a line in the log to the monitor's line, {told['losses']} losses",
            f"{told['median_s']} s (worst {told['worst_s']})",
            f"{told['limit_s']:g} s",
        ),
        *(
            (
                f"fold {row['megabytes']} MB of {row['groups']} groups",
                f"{row['fold_s']} s, {row['fold_over_grep']} times `grep -c`",
                "8 times",
            )
            for row in result["fold"]
        ),
    ]
    head = (
        f"Monitor's speed, {result['date']}, {result['machine']}; medians of {RUNS} runs, logs on a "
        "local disk and in the page cache."
    )
    lines = [head, "", "| what | measured | limit |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 64, 1024])
    parser.add_argument("--catch-up-megabytes", type=int, default=2048)
    parser.add_argument("--machine", help="the machine in words: results are kept")
    options = parser.parse_args()
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": options.machine or "this machine",
        "catch_up": catch_up(options.catch_up_megabytes),
        "latency": latency(),
        "fold": [fold_speed(groups, options.megabytes) for groups in options.groups],
    }
    print(table(result), end="")
    if options.machine:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "monitor_speed.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "monitor_speed.md").write_text(table(result))


if __name__ == "__main__":
    main()
