"""The monitor's live terminal view."""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launcher.findings import Finding, Severity
from launcher.model import GroupState
from launcher.monitor import await_start, conclude, figure_lines, line, looks
from launcher.outlets import Outlets
from launcher.rundir import RunDir
from launcher.scheduler import Scheduler
from launcher.state import RunState
from launcher.watcher import Watcher

#: Replica groups shown in full; of a larger run, those that are not simply training.
MOST_ROWS = 32

_STYLE = {
    GroupState.TRAINING: "green",
    GroupState.DONE: "green",
    GroupState.HEALING: "cyan",
    GroupState.STARTING: "yellow",
    GroupState.PENDING: "yellow",
    GroupState.REQUEUED: "yellow",
    GroupState.STALLED: "bold red",
    GroupState.LOST: "bold red",
}
_SEVERITY = {Severity.CRITICAL: "bold red", Severity.WARNING: "yellow", Severity.INFO: "dim"}


def follow_live(
    run: RunDir, slurm: Scheduler, outlets: Outlets, console: Console | None = None
) -> None:
    """Show a run until it ends; its story scrolls by above a table that stays.

    Raises:
        UsageError: an outlet cannot be opened.
        CriticalError: the run ended without having finished, or did not start.
        BlindError: at the end, a source could not be read.
    """
    console = console or Console(highlight=False, markup=False)
    await_start(run, say=console.print, slurm=slurm)
    with Watcher.of_run(run, slurm) as watcher:
        with (
            outlets.delivering(run, say=console.print) as delivery,
            Live(console=console, auto_refresh=False, transient=True) as live,
        ):
            for notices in looks(watcher, delivery):
                for notice in notices:
                    console.print(line(notice))
                live.update(view(watcher, run, time.time()), refresh=True)
        console.print(view(watcher, run, time.time()))
        conclude(watcher, run)


def view(watcher: Watcher, run: RunDir, now: float) -> Group:
    """The screen as it is at ``now`` (Unix seconds)."""
    state = watcher.state
    parts: list[Text | Table] = [_head(state, run, now), _groups(watcher, now)]
    parts += [Text(text) for text in figure_lines(state)]
    parts += [_finding(finding) for finding in watcher.findings(now)[:6]]
    return Group(*parts)


def _head(state: RunState, run: RunDir, now: float) -> Text:
    age = f"{_ago(now - state.quorum_since)} old" if state.quorum_since is not None else "none yet"
    groups = state.groups.values()
    speeds = [g.tokens_per_second for g in groups if g.state is GroupState.TRAINING]
    known = [speed for speed in speeds if speed is not None]
    losses = [g.loss for g in groups if g.loss is not None]
    steps = f" of {state.steps}" if state.steps is not None else ""
    if state.sync_every > 1:
        steps = f", one every {state.sync_every} steps{steps}"
    text = Text()
    text.append(f"{run.name}  ", style="bold")
    text.append(f"quorum {state.quorum_id} ({age}): {len(state.members)} of {state.size}  ")
    text.append(f"{state.counted} {state.step}{steps}  ")
    if losses:
        # Groups that meet at every step report the same; others have one each.
        loss = losses[0] if state.sync_every == 1 else sum(losses) / len(losses)
        text.append(f"loss {loss:.4f}  ")
    if known:
        text.append(f"{sum(known) / len(known):,.0f} tokens/s a rank")
    return text


def _groups(watcher: Watcher, now: float) -> Table:
    state = watcher.state
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in (
        "replica",
        "state",
        "for",
        "node",
        "attempt",
        state.counted,
        "last commit",
        "failed",
    ):
        table.add_column(
            name, no_wrap=True, justify="left" if name in ("state", "node") else "right"
        )
    table.add_column(state.scheduler)
    rows = list(state.groups.values())
    hidden = 0
    if len(rows) > MOST_ROWS:
        shown = [group for group in rows if group.state is not GroupState.TRAINING][:MOST_ROWS]
        hidden = len(rows) - len(shown)
        rows = shown
    for group in rows:
        table.add_row(
            str(group.replica),
            Text(group.state.value, style=_STYLE[group.state]),
            _ago(now - group.since) if group.since else "",
            group.where,
            str(group.attempt or ""),
            str(group.step),
            _ago(now - group.last_commit) + " ago" if group.last_commit else "",
            str(group.failed_commits),
            _slurm_words(watcher, group.replica),
        )
    if hidden:
        table.add_row("…", Text(f"{hidden} more are training", style="green"))
    return table


def _slurm_words(watcher: Watcher, replica: int) -> str:
    group = watcher.state.groups[replica]
    words = group.slurm_state
    if group.waiting:
        words += f" ({group.waiting})"
    if group.expected_start:
        words += f", start expected {group.expected_start.rpartition('T')[2]}"
    for node in filter(None, map(watcher.nodes.get, group.nodes)):
        if not node.up:
            name = node.name if len(group.nodes) > 1 else "node"
            words += f"; {name} {node.state} ({node.reason})"
    return words


def _finding(finding: Finding) -> Text:
    head = f"{finding.severity.value.upper()} {finding.kind}: "
    return Text(head, style=_SEVERITY[finding.severity]).append(finding.message, style="default")


def _ago(seconds: float) -> str:
    seconds = max(0.0, seconds)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
