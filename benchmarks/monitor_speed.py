"""How fast the monitor folds a lighthouse log, beside ``grep -c 'Quorum!'`` on the same file.

    python benchmarks/monitor_speed.py [--megabytes 200] [--groups 4 64 1024]

Writes logs as a steady run makes them (requests, statuses and one quorum a step; a loss and a
return every thousand steps), in the format of torchft-nightly 2026.10.26, and prints a row a size:
seconds of grep, seconds of the fold, their ratio, megabytes a second, peak memory of the fold.
The ratio is the claim (at least one eighth); seconds are this machine's.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 64, 1024])
    options = parser.parse_args()
    print(
        f"{'groups':>6} {'MB':>6} {'grep s':>7} {'fold s':>7} {'fold/grep':>9} {'MB/s':>6} {'RSS MB':>6}"
    )
    for groups in options.groups:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "lighthouse.log")
            write_log(path, groups, options.megabytes)
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
                done = subprocess.run(
                    [sys.executable, "-c", FOLD, str(path)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                seconds, megabytes, *_ = done.stdout.split()
                folds.append(float(seconds))
                memory = max(memory, int(megabytes))
            grep, fold = statistics.median(greps), statistics.median(folds)
            print(
                f"{groups:>6} {size:>6.0f} {grep:>7.3f} {fold:>7.3f} {fold / grep:>9.1f} "
                f"{size / fold:>6.0f} {memory:>6}"
            )


if __name__ == "__main__":
    main()
