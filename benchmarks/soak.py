"""Failure after failure of every kind, with three replica groups, and nobody who helps.

    python benchmarks/soak.py [--count 100] [--seed 1] [--mtbf 10s] [--keep MACHINE]

`launcher drill loop` on a run of its own in a sandbox. With ``--keep`` its report goes to
``benchmarks/results/soak.*``. Root; a hundred failures take about an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.arena import REPOSITORY, Arena
from benchmarks.recovery import KIT
from launcher.drills import KINDS

RESULTS = REPOSITORY / "benchmarks" / "results"
GROUPS = 3
#: Kinds that a sandbox without networks of its own cannot have, and one that waits for minutes of
#: Slurm's and is then helped by a person.
LEFT_OUT = ("network-cut", "time-limit")
#: A soak fails more often than budgets are meant for. Steps of about this length, as on a GPU.
SETTINGS = {**KIT, "TFT_DRILLS": "1", "TFT_MIN_STEP_SECONDS": "0.3"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mtbf", default="10s")
    parser.add_argument("--patience", type=float, default=1.0, help="stretches every deadline")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long some kinds last")
    parser.add_argument("--kinds", default=",".join(k for k in KINDS if k not in LEFT_OUT))
    parser.add_argument("--keep", metavar="MACHINE", default="", help="keep the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "soak.json"
        argv = [sys.executable, "-m", "launcher", "drill", "loop", "--yes", f"--json={result}"]
        argv += [
            f"--{name}={getattr(options, name)}"
            for name in ("kinds", "count", "mtbf", "seed", "patience", "seconds")
        ]
        with (
            Arena(nodes=GROUPS + 2) as arena,
            arena.lighthouse(),
            arena.run(GROUPS, SETTINGS) as training,
        ):
            training.full(GROUPS)
            with subprocess.Popen(
                argv, env=arena.env, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
            ) as drills:
                assert drills.stdout is not None
                lines = []
                for line in drills.stdout:
                    print(line, end="", flush=True)
                    lines.append(line)
        if options.keep and result.exists():
            keep(json.loads(result.read_text()), lines, options)
    return drills.returncode


def keep(data: dict[str, object], lines: list[str], options: argparse.Namespace) -> None:
    """Write the record down: the data, and the report that the drills ended with."""
    made = f"{time.strftime('%Y-%m-%d')}, {options.keep}"
    (RESULTS / "soak.json").write_text(json.dumps({"made": made, **data}) + "\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("soak: "))
    text = f"# Soak\n\n{made}; `python benchmarks/soak.py --count {options.count} --seed {options.seed}`.\n"
    (RESULTS / "soak.md").write_text(f"{text}\n```\n{''.join(lines[start:]).rstrip()}\n```\n")


if __name__ == "__main__":
    sys.exit(main())
