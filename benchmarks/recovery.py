"""How long failures cost: this kit beside the plain recipe, in a sandbox on this machine.

    python benchmarks/recovery.py [--runs 5] [--plain-runs 2] [--only kill,node] [--keep MACHINE]

The plain recipe is the same job with this kit's recovery off and torchft's own defaults. Every
failure is a real one; the times are read from the replica groups' commits. Root; the whole takes
about half an hour. With ``--keep`` the results go to ``benchmarks/results/recovery.*``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))


import psutil

from benchmarks.arena import REPOSITORY, Arena, Training, until

LIGHTHOUSE = REPOSITORY / "launcher" / "lighthouse_process.py"
#: The kit's recovery switched off.
PLAIN = {
    "TFT_RESTARTS": "0",
    "TFT_REQUEUES": "0",
    "TFT_RELAY": "0",
    "TORCHFT_QUORUM_RETRIES": "0",
    "TORCHFT_QUORUM_TIMEOUT_SEC": "60",
    "TORCHFT_TIMEOUT_SEC": "60",
    "TORCHFT_CONNECT_TIMEOUT_SEC": "60",
}
#: torchft's own defaults of the lighthouse.
PLAIN_LIGHTHOUSE = ("--min_replicas=1", "--heartbeat_timeout_ms=5000", "--join_timeout_ms=60000",
                    "--quorum_tick_ms=100")  # fmt: skip
#: As many failures as a benchmark likes to make.
KIT = {"TFT_RESTARTS": "1000", "TFT_REQUEUES": "1000"}
#: Steps of about this length, as on a GPU: the survivors' pauses stand out.
PACE = {"TFT_MIN_STEP_SECONDS": "0.2"}


@dataclass
class Result:
    """What one kind of failure cost."""

    stall: list[float] = field(default_factory=list)
    """Longest time between two commits of the survivor, seconds."""
    full: list[float] = field(default_factory=list)
    """From the failure to the first commit of the group that was lost, seconds."""
    failed_commits: list[int] = field(default_factory=list)
    """Of the survivor."""
    died: int = 0
    """Runs in which a healthy group died, or none came back in time."""
    weights: list[int] = field(default_factory=list)
    """Weight comparisons, all equal (a difference ends the benchmark)."""


#: Seconds of training between two failures: the ranks for the next start wait by then.
REST = 10.0

Inject = Callable[[Training], None]


def kill(training: Training) -> None:
    training.rank(1).kill()


def hang(training: Training) -> None:
    import signal

    training.rank(1).send_signal(signal.SIGUSR1)


def node_down(training: Training) -> None:
    node = training.state.groups[1].host
    control = ("scontrol", "update", f"NodeName={node}")
    training.arena.sh(*control, "State=DOWN", "Reason=benchmark")
    # It is given back when the group has left it.
    training.arena.sh(*control, "State=RESUME")


def cut(training: Training) -> None:
    training.arena.sandbox.cut(training.state.groups[1].host)


def measure(training: Training, inject: Inject, result: Result, *, comes_back: bool,
            heal: Callable[[], None] = lambda: None) -> None:  # fmt: skip
    """One failure of replica group 1, and what it cost."""
    training.full(2)
    attempt = training.state.groups[1].attempt
    t = time.time()
    inject(training)
    if comes_back:
        until(
            lambda: (
                any(when > t and ok for when, ok in training.commits(0)[-5:])
                and training.state.groups[1].attempt > attempt
                and (training.state.groups[1].last_commit or 0) > t
            ),
            "the lost group commits again",
        )
        result.full.append(next(w for w, ok in training.commits(1) if ok and w > t + 0.5) - t)
    else:
        survivor = training.rank(0)
        until(
            lambda: (
                len([1 for w, ok in training.commits(0) if ok and w > t + 0.5]) > 10
                or not survivor.is_running()
            ),
            "it goes on, or dies",
        )
        if not survivor.is_running():
            raise TimeoutError("the healthy group died")
    heal()
    commits = training.commits(0)
    times = [when for when, ok in commits if ok]
    around = [b - a for a, b in itertools.pairwise(times) if b > t]
    result.stall.append(max(around))
    result.failed_commits.append(sum(1 for when, ok in commits if when > t and not ok))
    check_weights(training, result)


def check_weights(training: Training, result: Result) -> None:
    ledger = training.state.weights
    if ledger.differences:
        raise SystemExit(f"weights differ: {ledger.different[:3]}")
    result.weights.append(ledger.compared)


@contextmanager
def plain_lighthouse(arena: Arena) -> Iterator[list[subprocess.Popen[bytes]]]:
    """torchft's lighthouse as it is; the caller may end it and start another."""
    host, port = arena.url.removeprefix("http://").rsplit(":", 1)
    running: list[subprocess.Popen[bytes]] = []

    def start() -> None:
        running.append(
            subprocess.Popen(
                [sys.executable, str(LIGHTHOUSE), f"--bind={host}:{port}", *PLAIN_LIGHTHOUSE],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )

    start()
    time.sleep(0.5)
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def restart_plain(arena: Arena, running: list[subprocess.Popen[bytes]], seconds: float) -> None:
    host, port = arena.url.removeprefix("http://").rsplit(":", 1)
    running[-1].kill()
    running[-1].wait()
    time.sleep(seconds)
    running.append(
        subprocess.Popen(
            [sys.executable, str(LIGHTHOUSE), f"--bind={host}:{port}", *PLAIN_LIGHTHOUSE],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    )


def bare_start(arena: Arena) -> float:
    """Seconds from a launch to the first commit of a group that nobody waits for."""
    with arena.lighthouse("--no-act"), arena.run(1, {**PLAIN, **PACE}) as training:
        training.full(1, 1)
        lines = [json.loads(x) for x in training.dir.events(0).read_text().splitlines()]
        launch = next(e["t"] for e in lines if e["kind"] == "launch")
        first = next(e["t"] for e in lines if e["kind"] == "commit" and e["committed"])
        return float(first - launch)


def with_kit(arena: Arena, inject: Inject, runs: int, *flags: str, spares: int = 0,
             warm: bool = True, comes_back: bool = True) -> Result:  # fmt: skip
    """``runs`` failures of one run under this kit."""
    result = Result()
    settings = {**KIT, **PACE, "TFT_SPARES": str(spares), "TFT_WARM": str(int(warm))}
    with arena.lighthouse(*flags), arena.run(2 + spares, settings) as training:
        for _ in range(runs):
            if spares:
                from launcher import spares as standing

                until(lambda: standing.ready(training.dir.groups), "a spare stands ready")
            elif warm:
                training.full(2)
                time.sleep(REST)
            measure(training, inject, result, comes_back=comes_back)
    return result


def plain(arena: Arena, inject: Inject, runs: int, *, comes_back: bool) -> Result:
    """``runs`` runs with one failure each, with the kit's recovery off."""
    result = Result()
    for _ in range(runs):
        with plain_lighthouse(arena), arena.run(2, {**PLAIN, **PACE}) as training:
            try:
                measure(training, inject, result, comes_back=comes_back)
            except TimeoutError:
                result.died += 1
            else:
                result.died += not training.rank(0).is_running()
    return result


def outage(arena: Arena, seconds: float, runs: int) -> Result:
    """The lighthouse is killed and kept away."""
    result = Result()
    with arena.lighthouse(), arena.run(2, {**KIT, **PACE}) as training:
        for _ in range(runs):
            one_outage(training, seconds, result)
    return result


def one_outage(training: Training, seconds: float, result: Result) -> None:
    training.full(2)
    attempts = [g.attempt for g in training.state.groups.values()]
    t = time.time()
    training.hold_lighthouse(seconds)
    until(lambda: training.commits(0)[-1][0] > t + seconds + 1, "it goes on")
    training.full(2, 4)
    commits = training.commits(0)
    times = [when for when, ok in commits if ok]
    result.stall.append(max(b - a for a, b in itertools.pairwise(times) if b > t))
    result.failed_commits.append(sum(1 for when, ok in commits if when > t and not ok))
    result.died += attempts != [g.attempt for g in training.state.groups.values()]
    check_weights(training, result)


def plain_outage(arena: Arena, seconds: float, runs: int) -> Result:
    result = Result()
    for _ in range(runs):
        with plain_lighthouse(arena) as running, arena.run(2, {**PLAIN, **PACE}) as training:
            training.full(2)
            ranks = [training.rank(replica) for replica in (0, 1)]
            t = time.time()
            restart_plain(arena, running, seconds)
            result.died += not goes_on(training, ranks, t + seconds + 1)
    return result


def goes_on(training: Training, ranks: list[psutil.Process], after: float) -> bool:
    """Whether the groups commit again ``after``, and none has died within 100 s."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and any(rank.is_running() for rank in ranks):
        if training.commits(0)[-1][0] > after:
            break
        time.sleep(0.5)
    return all(rank.is_running() for rank in ranks) and training.commits(0)[-1][0] > after


def network_cut(runs: int) -> Result:
    """A node is cut off; its task starts elsewhere; the network is healed with the old copy alive."""
    result = Result()
    for _ in range(runs):
        with (
            Arena(nodes=3, network=True) as arena,
            arena.lighthouse(),
            arena.run(2, {**KIT, **PACE}) as training,
        ):
            training.full(2)
            node = training.state.groups[1].host
            measure(training, cut, result, comes_back=True)
            arena.sandbox.heal(node)
            twice = 0
            deadline = time.monotonic() + 25
            while time.monotonic() < deadline:
                twice += bool(training.state.second_copies)
                time.sleep(0.1)
            result.died += twice > 0
            training.full(2)
            check_weights(training, result)
    return result


def scenes(arena: Arena, runs: int, plain_runs: int) -> dict[str, Callable[[], Result]]:
    fast = ("--timeouts", "fast")
    return {
        "kill: plain": lambda: plain(arena, kill, plain_runs, comes_back=False),
        "kill": lambda: with_kit(arena, kill, runs),
        "kill, TFT_WARM=0": lambda: with_kit(arena, kill, runs, warm=False),
        "kill, fast": lambda: with_kit(arena, kill, runs, *fast),
        "hang: plain": lambda: plain(arena, hang, min(1, plain_runs), comes_back=False),
        "hang": lambda: with_kit(arena, hang, runs),
        "lighthouse 2 s: plain": lambda: plain_outage(arena, 2, plain_runs),
        "lighthouse 2 s": lambda: outage(arena, 2, runs),
        "lighthouse 10 s: plain": lambda: plain_outage(arena, 10, plain_runs),
        "lighthouse 10 s": lambda: outage(arena, 10, runs),
        "lighthouse 60 s": lambda: outage(arena, 60, min(1, runs)),
        "node: plain": lambda: plain(arena, node_down, plain_runs, comes_back=True),
        "node": lambda: with_kit(arena, node_down, runs),
        "node, standby": lambda: with_kit(arena, node_down, runs, spares=1),
    }


def row(name: str, result: Result) -> str:
    def both(values: list[float]) -> str:
        return f"{statistics.median(values):.1f} ({max(values):.1f})" if values else "-"

    failed = f"{max(result.failed_commits)}" if result.failed_commits else "-"
    return (
        f"| {name} | {both(result.stall)} | {both(result.full)} | {failed} | {result.died} | "
        f"{len(result.stall)} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--plain-runs", type=int, default=2)
    parser.add_argument("--only", default="", help="scenes whose names begin so, comma-separated")
    parser.add_argument("--keep", metavar="MACHINE", default="", help="keep the results")
    options = parser.parse_args()
    wanted = tuple(options.only.split(",")) if options.only else ("",)
    columns = ["failure", "survivor's stall, s: median (worst)", "to full strength, s"]
    columns += ["failed commits", "died", "n"]
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows, data = [], {}
    print("\n".join(head), flush=True)
    with ExitStack() as stack:
        arena = stack.enter_context(Arena())
        if "bare start".startswith(wanted):
            starts = Result(full=[bare_start(arena) for _ in range(options.runs)])
            rows.append(row("bare start", starts))
            data["bare start"] = vars(starts)
            print(rows[-1], flush=True)
        for name, scene in scenes(arena, options.runs, options.plain_runs).items():
            if name.startswith(wanted):
                result = scene()
                rows.append(row(name, result))
                data[name] = vars(result)
                print(rows[-1], flush=True)
    if "network cut".startswith(wanted):
        result = network_cut(min(3, options.runs))
        rows.append(row("network cut, healed", result))
        data["network cut"] = vars(result)
        print(rows[-1], flush=True)
    if options.keep:
        folder = REPOSITORY / "benchmarks" / "results"
        made = f"{time.strftime('%Y-%m-%d')}, {options.keep}"
        (folder / "recovery.json").write_text(json.dumps({"made": made, **data}, indent=1) + "\n")
        text = f"# Recovery\n\n{made}; `python benchmarks/recovery.py`.\n\n"
        (folder / "recovery.md").write_text(text + "\n".join([*head, *rows]) + "\n")


if __name__ == "__main__":
    main()
