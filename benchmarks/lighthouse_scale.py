"""How many replica groups one lighthouse serves, and what the relay in a group's launcher costs.

    python benchmarks/lighthouse_scale.py [--groups 2 16 128 512 1024] [--keep MACHINE]

A real lighthouse, started and read as the supervisor does it, and as many simulated managers, in
one process: ten heartbeats a second each, and a quorum request a step, all at once, as after a
collective. The first group goes through a launcher's relay. CPU is each process's own, from the
kernel's counters; the simulator runs on the same machine, so latencies on few cores are upper bounds.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil

from benchmarks.lighthouse_traffic import RANKS, Crowd

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
#: Timeouts of the lighthouse here; a step waits for the last quorum for so many seconds.
GENEROUS_MS, PATIENCE = 120_000, 60.0
#: Steps that are not counted: connections are fresh.
WARM_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One number of replica groups."""

    groups: int
    steps: int
    quorum_median_ms: float
    quorum_p99_ms: float
    left_out: int
    """Groups, over all steps, that the others' quorum did not wait for: their request or their
    heartbeats came too late."""
    fastest_step_ms: float
    """Until the last group had its quorum, in the step in which that was fastest: on a machine
    that others use too, the least disturbed one."""
    heartbeats_per_second: float
    heartbeat_most_late_ms: float
    """By the simulator's own fault."""
    lighthouse_cpu_heartbeats: float
    """Of one core, with heartbeats alone."""
    lighthouse_cpu_step_s: float
    """CPU seconds that a step adds."""
    lighthouse_rss_mb: float
    log_bytes_step: int
    answer_bytes_step: int
    """What the lighthouse sends in answers to one step's requests, to all groups together."""
    reader_cpu_step_s: float
    """CPU seconds of the process that reads and writes the log, a step."""
    relay_cpu_heartbeats: float
    relay_cpu_step_s: float
    simulator_cpu: float
    """Of one core, during the steps."""


def keep_lighthouse(answer: Connection) -> None:
    """In a process of its own: the lighthouse, and what the supervisor does with its log."""
    from launcher.capped_log import CappedLog
    from launcher.lighthouse_child import LighthouseChild, LighthouseSettings

    with tempfile.TemporaryDirectory() as folder:
        log = CappedLog(lambda: Path(folder, "lighthouse.log"))
        written = 0
        write = log.write

        def count(line: bytes) -> None:
            nonlocal written
            written += len(line)
            write(line)

        log.write = count  # type: ignore[method-assign]
        settings = LighthouseSettings(
            host="127.0.0.1",
            bind="127.0.0.1",
            port=os.getpid() % 20000 + 30000,
            # A simulator that is too slow for its machine must not cost anybody his place.
            heartbeat_timeout_ms=GENEROUS_MS,
            join_timeout_ms=GENEROUS_MS,
        )
        child = LighthouseChild(settings, log, os.environ, 0)
        try:
            if not child.come_up(threading.Event()):
                raise SystemExit("the lighthouse does not come up")
            answer.send((child.pid, child.place))
            while answer.recv():
                answer.send(written)
        finally:
            child.end()


def keep_relay(answer: Connection, place: tuple[str, int]) -> None:
    """In a process of its own: a launcher's relay."""
    from launcher.relay import Relay

    with Relay(lambda: place, silence=2 * PATIENCE) as relay:
        answer.send(relay.port)
        answer.recv()


@contextmanager
def process(target: Any, *args: object) -> Iterator[tuple[psutil.Process, Connection]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    running = context.Process(target=target, args=(theirs, *args))
    running.start()
    try:
        yield psutil.Process(running.pid), ours
    finally:
        ours.send(False)
        running.join(10)
        running.kill()


def cpu(of: psutil.Process) -> float:
    """CPU seconds so far, to the nanosecond (the usual counters have ticks of 10 ms)."""
    total = 0
    for path in Path(f"/proc/{of.pid}/task").glob("*/schedstat"):
        with suppress(OSError):
            total += int(path.read_text().split()[0])
    return total / 1e9


def measure(groups: int, steps: int, seconds: float, step_seconds: float) -> Measured:
    """One lighthouse with so many replica groups."""
    with process(keep_lighthouse) as (reader, told):
        pid, place = told.recv()
        with process(keep_relay, place) as (relay, relay_told):
            port = relay_told.recv()
            watched = [psutil.Process(pid), reader, relay, psutil.Process()]
            crowd = Crowd(place, groups, first=("127.0.0.1", port))

            def log_bytes() -> int:
                told.send(True)
                return int(told.recv())

            fastest = math.inf
            left_out: list[int] = []

            def step(number: int) -> None:
                nonlocal fastest
                began = time.perf_counter()
                crowd.ask(number)
                crowd.live(PATIENCE, until_answered=True)
                left_out.append(crowd.waiting)
                fastest = min(fastest, time.perf_counter() - began)
                crowd.live(max(0.0, began + step_seconds - time.perf_counter()))

            crowd.live(2.0)
            for number in range(WARM_STEPS):
                step(number)
            crowd.answered.clear()
            left_out.clear()
            fastest = math.inf
            crowd.late, beats = 0.0, crowd.heartbeats
            before, began = [cpu(p) for p in watched], time.perf_counter()
            crowd.live(seconds)
            between, middle = [cpu(p) for p in watched], time.perf_counter()
            idle = [(b - a) / (middle - began) for a, b in zip(before, between, strict=True)]
            beats = crowd.heartbeats - beats
            logged, sent = log_bytes(), crowd.answer_bytes
            for number in range(steps):
                step(WARM_STEPS + number)
            after, end = [cpu(p) for p in watched], time.perf_counter()
            busy = [b - a for a, b in zip(between, after, strict=True)]
            extra = [(b - i * (end - middle)) / steps for b, i in zip(busy, idle, strict=True)]
            # What heartbeats are answered with is little, and not a step's.
            quorum_bytes = crowd.answer_bytes - sent
            result = Measured(
                groups=groups,
                steps=steps,
                quorum_median_ms=1000 * statistics.median(crowd.answered),
                quorum_p99_ms=1000 * sorted(crowd.answered)[int(len(crowd.answered) * 0.99)],
                left_out=sum(left_out),
                fastest_step_ms=1000 * fastest,
                heartbeats_per_second=beats / (middle - began),
                heartbeat_most_late_ms=1000 * crowd.late,
                lighthouse_cpu_heartbeats=idle[0],
                lighthouse_cpu_step_s=extra[0],
                lighthouse_rss_mb=watched[0].memory_info().rss / 1e6,
                log_bytes_step=(log_bytes() - logged) // steps,
                answer_bytes_step=quorum_bytes // steps,
                reader_cpu_step_s=extra[1],
                relay_cpu_heartbeats=idle[2],
                relay_cpu_step_s=extra[2],
                simulator_cpu=busy[3] / (end - middle),
            )
            crowd.close()
    return result


def report(rows: Sequence[Measured], made: str, step_seconds: float, paper: int) -> str:
    """The results as Markdown."""
    head = ["groups", "quorum, ms: median", "p99", "all, in the fastest step", "left out", "lighthouse: heartbeats, of a core",
            "a step, CPU ms", "memory, MB", "log a step, kB", "answers a step, MB",
            "reading the log, CPU ms a step", "simulator, of a core"]  # fmt: skip
    lines = [
        (
            f"# One lighthouse and many replica groups\n\n{made}; "
            "`python benchmarks/lighthouse_scale.py`.\n\n"
            f"A step every {step_seconds:g} s (at most as fast as quorums come); members of {RANKS} ranks.\n"
        ),
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    lines += [
        f"| {r.groups} | {r.quorum_median_ms:.1f} | {r.quorum_p99_ms:.1f} | {r.fastest_step_ms:.1f} | {r.left_out} | "
        f"{100 * r.lighthouse_cpu_heartbeats:.1f} % | {1000 * r.lighthouse_cpu_step_s:.1f} | "
        f"{r.lighthouse_rss_mb:.0f} | {r.log_bytes_step / 1e3:.1f} | {r.answer_bytes_step / 1e6:.2f} | "
        f"{1000 * r.reader_cpu_step_s:.1f} | {100 * r.simulator_cpu:.0f} % |"
        for r in rows
    ]
    last = rows[-1]
    beat = last.lighthouse_cpu_heartbeats / last.heartbeats_per_second
    more = paper / last.groups
    relay = max(row.relay_cpu_heartbeats for row in rows)
    lines += [
        "",
        (
            f"A heartbeat costs the lighthouse {1e6 * beat:.0f} µs of CPU. Every group is told every "
            f"member, {last.answer_bytes_step / last.groups**2:.0f} bytes each: answers grow with the "
            "square of the number of groups."
        ),
        "",
        (
            f"On paper, {paper} groups (calculated from {last.groups}, not measured; heartbeats and log "
            f"grow with the number of groups, the rest with its square): heartbeats "
            f"{10 * beat * paper:.1f} cores, a step {last.lighthouse_cpu_step_s * more**2:.0f} s of CPU, "
            f"{last.answer_bytes_step * more**2 / 1e9:.0f} GB of answers and "
            f"{last.log_bytes_step * more / 1e6:.0f} MB of log."
        ),
        "",
        (
            f"The relay of one launcher: at most {100 * relay:.2f} % of a core for ten heartbeats a "
            f"second, and {1000 * max(row.relay_cpu_step_s for row in rows):.1f} ms of CPU a step."
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=int, nargs="+", default=[2, 16, 128, 512, 1024])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=10.0, help="of heartbeats alone")
    parser.add_argument("--step-seconds", type=float, default=1.0)
    parser.add_argument("--paper", type=int, default=10_000)
    parser.add_argument("--keep", metavar="MACHINE", default="", help="keep the results")
    options = parser.parse_args()
    made = f"{time.strftime('%Y-%m-%d')}, {options.keep or 'this machine'}"
    rows: list[Measured] = []
    for groups in options.groups:
        rows.append(measure(groups, options.steps, options.seconds, options.step_seconds))
        print(json.dumps(asdict(rows[-1])), flush=True)
        if options.keep:
            keep(rows, made, options)
    print(report(rows, made, options.step_seconds, options.paper))


def keep(rows: Sequence[Measured], made: str, options: argparse.Namespace) -> None:
    data = {"made": made, "ranks": RANKS, "rows": [asdict(row) for row in rows]}
    (RESULTS / "lighthouse_scale.json").write_text(json.dumps(data, indent=1) + "\n")
    text = report(rows, made, options.step_seconds, options.paper)
    (RESULTS / "lighthouse_scale.md").write_text(text)


if __name__ == "__main__":
    main()
