"""The table and the picture of ``goodput.py``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from benchmarks.goodput_account import (
    Commit,
    Failure,
    Losses,
    ideal,
    interval,
    losses,
    total_losses,
)

NAMES = {
    "kit": "this kit",
    "relaunch": "torchft, relaunch loop",
    "plain": "torchft, array with --requeue",
    "classic": "classic job, checkpoints",
}
SCHEDULES = {
    "kill60": "a kill every 60 s",
    "kill20": "a kill every 20 s",
    "node": "a node lost every 60 s",
    "outage": "lighthouse away for 10 s, once",
}
COLOURS = {"kit": "#1b6e3c", "relaunch": "#3b6fb6", "plain": "#8a8a8a", "classic": "#c2802f"}


def report(rows: Sequence[dict[str, Any]], made: str, tokens: int) -> tuple[dict[str, Any], str]:
    """The results as data and as Markdown."""
    probe = next(r for r in rows if r["kind"] == "probe")
    runs = [r for r in rows if r["kind"] == "run"]
    window, groups = probe["window"], probe["groups"]
    start = statistics.median(probe["starts"])
    free = [r["useful_group_steps"] for r in runs if r["schedule"] == "none"]
    ceiling = statistics.fmean(free)
    step = groups * window / ceiling
    data: dict[str, Any] = {
        "made": made,
        **{k: probe[k] for k in ("window", "groups", "pace", "checkpoint_s", "step_s", "starts")},
        "ceiling_tokens_per_second": ceiling * tokens / window,
        "ceiling_runs": free,
        "schedules": {},
    }
    for name in SCHEDULES:
        if found := _of_schedule([r for r in runs if r["schedule"] == name], data, step, ceiling):
            data["schedules"][name] = found
    head = ["", *(f"{SCHEDULES[name]}" for name in data["schedules"])]
    lines = [
        (
            f"# Goodput\n\n{made}; `python benchmarks/goodput.py --window {window:g} --groups {groups} "
            f"--pace {probe['pace']:g}`.\n"
        ),
        (
            f"Useful tokens per second, as a share of the same training without failures ("
            f"{data['ceiling_tokens_per_second']:.0f} tokens/s with {groups} groups, mean of {len(free)} "
            f"windows of {window:g} s). Mean of the seeds ± half the 95 % interval (t).\n"
        ),
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for system, words in NAMES.items():
        cells = [_cell(part["systems"].get(system)) for part in data["schedules"].values()]
        if any(cell != "-" for cell in cells):
            lines.append(f"| {words} | {' | '.join(cells)} |")
    ideals = [f"{100 * part['ideal']:.1f} %" for part in data["schedules"].values()]
    lines.append(f"| ideal | {' | '.join(ideals)} |")
    ratios = [f"{100 * part['kit_of_ideal']:.1f} %" for part in data["schedules"].values()]
    lines.append(f"| this kit, of the ideal | {' | '.join(ratios)} |")
    ahead = [_ahead(part) for part in data["schedules"].values()]
    lines.append(f"| ahead of the best other, seed by seed | {' | '.join(ahead)} |")
    counts = [", ".join(map(str, part["failures"].values())) for part in data["schedules"].values()]
    lines.append(f"| failures of each seed | {' | '.join(counts)} |")
    lines += [
        "",
        (
            f"Ideal: survivors never pause, and a lost group is away for a bare start only (median "
            f"{start:.1f} s of {len(probe['starts'])}, with no other group beside it)."
        ),
        (
            f"The classic job saves every {_intervals(runs) or '-'} steps (Young and Daly, from a measured "
            f"{probe['checkpoint_s']:.2f} s a checkpoint and {probe['step_s']:.2f} s a step), and starts "
            "again in its allocation one second after a failure; after a lost node Slurm requeues it."
        ),
        (
            "The others have no checkpoints: where all groups were lost at once and training began "
            "anew, what had been committed counts all the same, as if it had just been saved at no "
            f"cost ({_anew(data)})."
        ),
        "",
        "Where the time of all groups went with this kit, in % of the window:",
        "",
        f"| | {' | '.join(f.name.replace('_', ' ') for f in fields(Losses))} |",
        "|---" * (1 + len(fields(Losses))) + "|",
    ]
    for name, part in data["schedules"].items():
        cells = [f"{100 * value:.1f}" for value in part["kit_losses"].values()]
        lines.append(f"| {SCHEDULES[name]} | {' | '.join(cells)} |")
    return data, "\n".join(lines) + "\n"


def _of_schedule(
    runs: Sequence[dict[str, Any]], data: dict[str, Any], step: float, ceiling: float
) -> dict[str, Any] | None:
    """One schedule: every system's share, the ideal's, and where the kit's time went."""
    if not runs:
        return None
    window, groups, start = data["window"], data["groups"], statistics.median(data["starts"])
    systems = {}
    for system in NAMES:
        shares = {
            r["seed"]: r["useful_group_steps"] / ceiling for r in runs if r["system"] == system
        }
        if shares:
            mean, half = interval(list(shares.values()))
            anew = (
                0
                if system == "classic"
                else sum(_begun_anew(r) for r in runs if r["system"] == system)
            )
            systems[system] = {"mean": mean, "half": half, "seeds": shares, "begun_anew": anew}
    kit = [r for r in runs if r["system"] == "kit"]
    outage = all(r["schedule"] == "outage" for r in runs)
    ideals, where, ratios = [], [], []
    for run in kit:
        failures = [] if outage else [Failure(*each) for each in run["failures"]]
        ideals.append(ideal(failures, window, groups, start))
        ratios.append(run["useful_group_steps"] / ceiling / ideals[-1])
        commits = [Commit(*each) for each in run["commits"]]
        where.append(losses(commits, failures, (0.0, window), groups, step, start))
    return {
        "systems": systems,
        "failures": {r["seed"]: len(r["failures"]) for r in kit},
        "ideal": statistics.fmean(ideals) if ideals else math.nan,
        "kit_of_ideal": statistics.fmean(ratios) if ratios else math.nan,
        "kit_losses": {
            f.name: statistics.fmean(getattr(each, f.name) for each in where)
            for f in fields(Losses)
        }
        if where
        else {},
        "kit_runs": [asdict(each) for each in where],
    }


def _ahead(part: dict[str, Any]) -> str:
    """Points by which the kit is ahead, at the same failures at the same moments."""
    others = [found["seeds"] for name, found in part["systems"].items() if name != "kit"]
    kit = part["systems"].get("kit", {"seeds": {}})["seeds"]
    return ", ".join(
        f"{100 * (share - max(seeds.get(seed, 0.0) for seeds in others)):+.1f}"
        for seed, share in sorted(kit.items())
        if others
    )


def _begun_anew(row: dict[str, Any]) -> int:
    return total_losses([Commit(*each) for each in row["commits"]])


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    half = "" if math.isnan(found["half"]) else f" ± {100 * found['half']:.1f}"
    return f"{100 * found['mean']:.1f}{half} % ({len(found['seeds'])})"


def _anew(data: dict[str, Any]) -> str:
    counts = {
        words: sum(
            p["systems"].get(system, {}).get("begun_anew", 0) for p in data["schedules"].values()
        )
        for system, words in NAMES.items()
        if system != "classic"
    }
    return ", ".join(f"{words}: {count}" for words, count in counts.items())


def _intervals(runs: Sequence[dict[str, Any]]) -> str:
    found = {r["schedule"]: r["interval"] for r in runs if "interval" in r}
    return ", ".join(f"{found[name]} ({SCHEDULES[name]})" for name in SCHEDULES if name in found)


def picture(data: dict[str, Any], path: Path) -> None:
    """Bars: a group for every schedule, a dot for each seed, the ideal as a line over it."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "goodput"
    import matplotlib.pyplot as plt

    names = list(data["schedules"])
    figure, axes = plt.subplots(figsize=(8, 3.6))
    width = 0.8 / len(NAMES)
    for number, (system, words) in enumerate(NAMES.items()):
        found = [data["schedules"][name]["systems"].get(system) for name in names]
        places = [index - 0.4 + width * (number + 0.5) for index in range(len(names))]
        means = [100 * max(0.0, each["mean"]) if each else 0.0 for each in found]
        axes.bar(places, means, width * 0.92, label=words, color=COLOURS[system])
        # Seeds differ by how many failures theirs has: each by itself, not their spread.
        for place, each in zip(places, found, strict=True):
            shares = [100 * share for share in each["seeds"].values()] if each else []
            axes.scatter([place] * len(shares), shares, s=9, color="white", edgecolors="black",
                         linewidths=0.7, zorder=3)  # fmt: skip
    for index, name in enumerate(names):
        level = 100 * data["schedules"][name]["ideal"]
        axes.plot([index - 0.42, index + 0.42], [level, level], color="black", linewidth=1.2,
                  linestyle=(0, (3, 2)), label="ideal" if index == 0 else None)  # fmt: skip
    axes.set_xticks(range(len(names)), [SCHEDULES[name] for name in names], fontsize=8)
    axes.set_ylabel("useful tokens, % of no failures", fontsize=8)
    axes.set_ylim(0, 105)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
