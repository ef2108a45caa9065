"""What a monitor costs that follows a run: processor time and memory, as lines and on a terminal.

    python benchmarks/monitor_load.py [--groups 64] [--seconds 60] [--machine "2 cores, Debian 12"]

Replica groups write their events and the lighthouse its log, a step a second, as they do (a run
of an 8B model takes several seconds a step); a stand-in for ``squeue`` answers for all tasks. The limits
are 5 % of one core in steady state, and memory that does not grow. With ``--machine`` the results are
kept in ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.monitor_speed import REPOSITORY, RESULTS, member
from launcher.rundir import Manifest, Outputs, RunDir

#: Limits: part of one core, and MB by which memory may grow from the first third to the end.
MOST_CPU, MOST_GROWTH_MB = 0.05, 3.0
#: Seconds that a monitor gets to start and read what is there.
WARM_UP = 8.0
STEP_SECONDS = 1.0


class Training(threading.Thread):
    """Writes what replica groups and a lighthouse write, a step a second."""

    def __init__(self, run: RunDir, groups: int) -> None:
        super().__init__(daemon=True)
        self._run, self._groups = run, groups
        self._ended = threading.Event()
        self._step = 0
        for replica in range(groups):
            self._tell(replica, {"kind": "launch", "attempt": 1, "host": f"worker-{replica}"})

    def _tell(self, replica: int, *events: dict[str, Any]) -> None:
        lines = [
            json.dumps({"t": round(time.time(), 3), "replica": replica, **event}) + "\n"
            for event in events
        ]
        with self._run.events(replica).open("a") as file:
            file.write("".join(lines))

    def run(self) -> None:
        while not self._ended.wait(STEP_SECONDS):
            self._quorum()
            step, rank = self._step, {"rank": 0, "attempt": 1}
            for replica in range(self._groups):
                self._tell(
                    replica,
                    {"kind": "commit", "step": step, "committed": True, **rank},
                    {
                        "kind": "metrics",
                        "titan_step": step,
                        "loss": 5.0,
                        "tokens_per_second": 900.0,
                    },
                    *({"kind": "weights", "step": step, "rank": r, "hash": "ab"} for r in range(8)),
                )
            self._step += 1

    def _quorum(self) -> None:
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now))
        head = f"{stamp}.{int(now % 1 * 1000):03d} [INFO] [torchft::lighthouse] - "
        uuid = "c44d-433e-8c94-5e8f1c3c86cb"
        lines = [
            f"{head}Received quorum request for replica torchtitan_ft_{r}:{r:08x}-{uuid}\n"
            for r in range(self._groups)
        ]
        members = ", ".join(member(replica, self._step) for replica in range(self._groups))
        lines.append(f"{head}Quorum! Quorum {{ quorum_id: 1, participants: [{members}] }}\n")
        with self._run.lighthouse_log.open("a") as file:
            file.write("".join(lines))

    def end(self) -> None:
        self._ended.set()
        self.join(10)


def follow(groups: int, seconds: float, *, terminal: bool) -> dict[str, Any]:
    """One monitor, beside a run that goes on."""
    with tempfile.TemporaryDirectory() as place:
        run = Outputs(Path(place, "outputs")).run_of_array(1)
        run.create(
            Manifest(
                run=run.name, array_job_id=1, group_size=groups, ranks_per_group=8, config="x.toml"
            )
        )
        queue = "\n".join(f"{i + 2}|1|{i}|RUNNING|worker-{i}|N/A|None" for i in range(groups))
        squeue = Path(place, "squeue")
        squeue.write_text(f"#!/bin/sh\ncat <<'E'\n{queue}\nE\n")
        squeue.chmod(0o755)
        sinfo = Path(place, "sinfo")
        sinfo.write_text("#!/bin/sh\n")
        sinfo.chmod(0o755)
        env = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}", "TERM": "xterm"}
        env |= {"TFT_OUTPUTS": str(Path(place, "outputs")), "LINES": "60", "COLUMNS": "160"}
        training = Training(run, groups)
        training.start()
        ours, theirs = pty.openpty()
        monitor = subprocess.Popen(
            [sys.executable, "-m", "launcher", "monitor", run.name],
            stdin=subprocess.DEVNULL,
            stdout=theirs if terminal else subprocess.DEVNULL,
            env=env,
            cwd=REPOSITORY,
        )
        threading.Thread(target=_drain, args=(ours,), daemon=True).start()
        try:
            process = psutil.Process(monitor.pid)
            time.sleep(WARM_UP)
            begun, started = _spent(process), time.monotonic()
            time.sleep(seconds / 3)
            early = process.memory_info().rss
            time.sleep(seconds * 2 / 3)
            used = (_spent(process) - begun) / (time.monotonic() - started)
            late = process.memory_info().rss
        finally:
            monitor.kill()
            monitor.wait()
            training.end()
            os.close(theirs)
    return {
        "groups": groups,
        "terminal": terminal,
        "seconds": seconds,
        "of_one_core": round(used, 4),
        "limit_of_one_core": MOST_CPU,
        "rss_mb": round(late / 1e6, 1),
        "growth_mb": round((late - early) / 1e6, 1),
        "limit_growth_mb": MOST_GROWTH_MB,
    }


def _drain(terminal: int) -> None:
    try:
        while os.read(terminal, 1 << 16):
            pass
    except OSError:
        return


def _spent(process: psutil.Process) -> float:
    """Processor seconds of a monitor, with those of the commands that it has run."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = (
        f"A monitor beside a run, {result['date']}, {result['machine']}; a step a second, "
        f"{result['rows'][0]['seconds']:g} s each; with the commands that it runs."
    )
    lines = [
        head,
        "",
        "| replica groups | shown | of one core | limit | memory | growth |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['groups']} | {'on a terminal' if row['terminal'] else 'as lines'} "
            f"| {row['of_one_core']:.1%} | {row['limit_of_one_core']:.0%} | {row['rss_mb']} MB "
            f"| {row['growth_mb']} MB |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 16, 64])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--machine", help="the machine in words: results are kept")
    options = parser.parse_args()
    rows = [
        follow(groups, options.seconds, terminal=terminal)
        for groups in options.groups
        for terminal in (False, True)
    ]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": options.machine or "this machine",
        "rows": rows,
    }
    print(table(result), end="")
    if options.machine:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "monitor_load.json").write_text(json.dumps(result, indent=2) + "\n")
        (RESULTS / "monitor_load.md").write_text(table(result))


if __name__ == "__main__":
    main()
