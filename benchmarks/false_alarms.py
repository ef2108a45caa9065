"""Is a busy machine ever taken for a failing one? Trains under CPU pressure and counts alarms.

    python benchmarks/false_alarms.py [--minutes 10] [--burners-per-core 2] [--keep MACHINE]

Two replica groups train in a sandbox with the default timeouts while other processes keep every
core busy several times over. Nothing fails, so whatever is noticed is a false alarm: a group left
out of a quorum, a failed commit, an order or a requeue of the guardian, a restart. Root.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.arena import REPOSITORY, Arena, Training


def soak(training: Training, seconds: float, burners: int) -> dict[str, float]:
    """Train for so long beside so many busy processes; what was noticed."""
    training.full(2)
    before = training.state.step
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(burners)]
    started, worst = time.time(), 0.0
    try:
        while time.time() - started < seconds:
            time.sleep(1.0)
            load = os.getloadavg()[0]
            worst = max(worst, load)
            assert training.state.groups, "there is a run"
    finally:
        for process in busy:
            process.kill()
            process.wait()
    state = training.state
    actions = training.dir.guardian_events
    return {
        "minutes": round(seconds / 60, 1),
        "busy processes per core": burners / (os.cpu_count() or 1),
        "load, worst": round(worst, 1),
        "steps": state.step - before,
        "groups lost": len(state.incidents),
        "failed commits": sum(g.failed_commits for g in state.groups.values()),
        "restarts": sum(g.attempt - 1 for g in state.groups.values()),
        "actions of the guardian": len(actions.read_text().splitlines()) if actions.exists() else 0,
        "longest pause between two commits, s": round(
            max(g.longest_pause for g in state.groups.values()), 2
        ),
        "weights that differ": state.weights.differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--burners-per-core", type=int, default=2)
    parser.add_argument("--keep", metavar="MACHINE", default="", help="keep the results")
    options = parser.parse_args()
    burners = options.burners_per_core * (os.cpu_count() or 1)
    with (
        Arena(nodes=2) as arena,
        arena.lighthouse(),
        arena.run(2, {"TFT_RANKS_PER_NODE": "2"}) as training,
    ):
        result = soak(training, 60 * options.minutes, burners)
    rows = ["| what | measured |", "|---|---|", *(f"| {k} | {v:g} |" for k, v in result.items())]
    print("\n".join(rows))
    if options.keep:
        made = f"{time.strftime('%Y-%m-%d')}, {options.keep}"
        folder = REPOSITORY / "benchmarks" / "results"
        (folder / "false_alarms.json").write_text(json.dumps({"made": made, **result}) + "\n")
        text = f"# False alarms\n\n{made}; `python benchmarks/false_alarms.py`.\n\n"
        (folder / "false_alarms.md").write_text(text + "\n".join(rows) + "\n")
    alarms = ("groups lost", "failed commits", "restarts", "actions of the guardian")
    sys.exit(1 if any(result[name] for name in alarms) else 0)


if __name__ == "__main__":
    main()
