"""How a run stands, as one screen: live in a terminal, and as plain lines elsewhere."""

from __future__ import annotations

import io
from collections import Counter

from rich import console as rich
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.findings import Finding, Severity
from launcher.groups import Group
from launcher.incidents import Incident
from launcher.model import GroupState
from launcher.snapshot import figures
from launcher.state import RunState
from launcher.watcher import Watcher
from launcher.words import ago, clean, clock, plural, seconds

#: Incidents shown: those that are not over first, then the last ones.
MOST_INCIDENTS = 4
#: Findings shown: the worst.
MOST_FINDINGS = 6
#: Characters shown of a cause.
MOST_OF_A_CAUSE = 100
#: Replica groups shown even where a terminal has no room for more.
FEWEST_ROWS = 3
#: Lines of a terminal that is low, and columns of one that is narrow: less is shown there.
LOW, NARROW = 30, 110
#: Columns where there is no terminal.
PLAIN_WIDTH = 200

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


def plain(watcher: Watcher, name: str, now: float, found: list[Finding] | None = None) -> list[str]:
    """The screen as lines of text, with every replica group, and the findings ``found``."""
    text = io.StringIO()
    Console(file=text, width=PLAIN_WIDTH, highlight=False, emoji=False).print(
        view(watcher, name, now, found=found)
    )
    return [line.rstrip() for line in text.getvalue().splitlines()]


def view(
    watcher: Watcher,
    name: str,
    now: float,
    *,
    width: int = PLAIN_WIDTH,
    height: int | None = None,
    found: list[Finding] | None = None,
) -> rich.Group:
    """The screen as it is at ``now`` (Unix seconds).

    Args:
        width: columns of the terminal.
        height: its lines; replica groups that simply train are left out where they do not fit.
    """
    state = watcher.state
    found = watcher.findings(now) if found is None else found
    low = height is not None and height < LOW
    few, most = (
        (MOST_INCIDENTS // 2, MOST_FINDINGS // 3) if low else (MOST_INCIDENTS, MOST_FINDINGS)
    )
    around = [
        *(_incident(number, incident, now) for number, incident in _newest(state, few)),
        *(Text(text) for text in figure_lines(state)),
        *(_finding(finding) for finding in found[:most]),
    ]
    if len(found) > most:
        around.append(Text(f"… and {len(found) - most} more findings", style="dim"))
    head = _head(state, name, now)
    rows = None
    if height is not None:
        console = Console(width=width, file=io.StringIO())
        taken = sum(len(text.wrap(console, width)) for text in [head, *around])
        # (The table's own head, and a line for what is left out.)
        rows = max(FEWEST_ROWS, height - taken - 2)
    return rich.Group(head, _groups(watcher, now, rows, width), *around)


def _head(state: RunState, name: str, now: float) -> Text:
    age = f"{ago(now - state.quorum_since)} old" if state.quorum_since is not None else "none yet"
    groups = state.groups.values()
    speeds = [g.tokens_per_second for g in groups if g.state is GroupState.TRAINING]
    known = [speed for speed in speeds if speed is not None]
    losses = [g.loss for g in groups if g.loss is not None]
    steps = f" of {state.steps}" if state.steps is not None else ""
    if state.sync_every > 1:
        steps = f", one every {state.sync_every} steps{steps}"
    text = Text()
    if name:
        text.append(f"{clean(name)}  ", style="bold")
    text.append(f"quorum {state.quorum_id} ({age}): {len(state.members)} of {state.size}  ")
    text.append(f"{state.counted} {state.step}{steps}  ")
    if losses:
        # Groups that meet at every step report the same; others have one each.
        loss = losses[0] if state.sync_every == 1 else sum(losses) / len(losses)
        text.append(f"loss {loss:.4f}  ")
    if known:
        text.append(f"{sum(known) / len(known):,.0f} tokens/s a rank")
    return text


def _groups(watcher: Watcher, now: float, most: int | None, width: int) -> Table:
    state, narrow = watcher.state, width < NARROW
    groups = sorted(state.groups.values(), key=lambda group: group.replica)
    rows = groups
    if most is not None and len(groups) > most:
        # Those that need a look, then the first of the others.
        quiet = (GroupState.TRAINING, GroupState.DONE)
        rows = sorted(groups, key=lambda group: group.state in quiet)[:most]
        rows.sort(key=lambda group: group.replica)
    cells = [_cells(watcher, group, now, narrow=narrow) for group in rows]
    heads = ["replica", "state", "for", "node", "attempt", state.counted, "last commit"]
    if narrow:
        heads = ["id", "state", "for", "node", "try", state.counted, "commit"]
    heads += ["failed" if narrow else "failed commits", state.scheduler]
    gap = 1 if narrow else 2
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, gap, 0, 0))
    taken = 0
    for column, head in enumerate(heads[:-1]):
        left = head in ("state", "node")
        table.add_column(head, no_wrap=True, justify="left" if left else "right")
        taken += gap + max(len(text) for text in [head, *(row[column] for row in cells)])
    if watcher.asks:
        # What the scheduler says may be long: it gives way, in one line.
        room = max(len(heads[-1]), width - taken - 1)
        table.add_column(heads[-1], no_wrap=True, overflow="ellipsis", max_width=room)
    for group, row in zip(rows, cells, strict=True):
        state_cell = Text(row[1], style=_STYLE[group.state])
        table.add_row(row[0], state_cell, *row[2 : len(table.columns)])
    if len(rows) < len(groups):
        shown = {group.replica for group in rows}
        rest = Counter(group.state.value for group in groups if group.replica not in shown)
        table.caption = "… and " + ", ".join(f"{count} {name}" for name, count in rest.items())
        table.caption_justify = "left"
    return table


def _cells(watcher: Watcher, group: Group, now: float, *, narrow: bool) -> list[str]:
    committed = ""
    if group.last_commit:
        committed = ago(now - group.last_commit) + ("" if narrow else " ago")
    return [
        str(group.replica),
        group.state.value,
        ago(now - group.since) if group.since else "",
        clean(group.where),
        str(group.attempts or ""),
        str(group.step),
        committed,
        str(group.failed_commits),
        clean(_slurm_words(watcher, group)),
    ]


def _slurm_words(watcher: Watcher, group: Group) -> str:
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


def _newest(state: RunState, most: int) -> list[tuple[int, Incident]]:
    """The incidents to show, with their numbers, in their order."""
    numbered = list(enumerate(state.incidents, start=1))
    going_on = [each for each in numbered if each[1].recovered_at is None][-most:]
    over = [each for each in numbered if each[1].recovered_at is not None][-most:]
    over = over[len(going_on) - most :] if len(going_on) < most else []
    return sorted([*going_on, *over], key=lambda each: each[0])


def _incident(number: int, incident: Incident, now: float) -> Text:
    where = f" on {incident.where}" if incident.where else ""
    text = Text(f"#{number} {clock(incident.first_sign)}  {clean(incident.who + where)} lost: ")
    text.append(clean(incident.why)[:MOST_OF_A_CAUSE])
    if incident.recovered_at is not None:
        text.append(f"; back after {seconds(incident.recovered_at - incident.lost_at)}", "green")
    else:
        text.append(f"; not back for {seconds(max(0.0, now - incident.lost_at))}", "bold red")
    text.append(
        f"; {plural(incident.steps_lost, 'step')} lost, "
        f"the others paused {seconds(incident.survivor_stall_s)}"
    )
    return text


def figure_lines(state: RunState) -> list[str]:
    """The running figures in one line; none before anything was measured."""
    values = figures(state)
    texts = {
        "time to detect": (values["time_to_detect_s"], "{:.1f} s"),
        "time to recover": (values["time_to_recover_s"], "{:.1f} s"),
        "steps lost": (values["steps_lost"], "{:.0f}"),
        "participation": (values["participation"], "{:.1%}"),
        "step efficiency": (values["step_efficiency"], "{:.1%}"),
        "both": (values["training_efficiency"], "{:.1%}"),
    }
    known = [f"{name} {shape.format(v)}" for name, (v, shape) in texts.items() if v is not None]
    return ["  ".join(known)] if state.events else []


def _finding(finding: Finding) -> Text:
    head = f"{finding.severity.value.upper()} {finding.kind}: "
    return Text(head, style=_SEVERITY[finding.severity]).append(
        clean(finding.message), style="default"
    )
