"""Draws a run's history as SVG for a page: sizes are bounded, colours are the page's.

Every colour is drawn as a placeholder and then made a variable of the page's style sheet, so
that one picture is right in a light and in a dark page. Pictures hold numbers only, no text
that came from a log.
"""

from __future__ import annotations

import datetime
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from launcher.history import BY_BADNESS, History, Series, Span
from launcher.incidents import Incident
from launcher.model import GroupState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: All sizes are in pixels of a page that is shown in full width.
WIDTH, LEFT, RIGHT = 1160, 58, 18
PLOT = WIDTH - LEFT - RIGHT
#: Room above the plots and below them for a line of text less than they need, and between.
TOP, BOTTOM, GAP = 19, 14, 28
#: Narrowest part of a lane: whatever is shorter is drawn this wide, so that it is seen.
CELL = 2.4
#: Rows of incidents' numbers above a plot, their height, and the width of a character in them.
ROWS, ROW_HEIGHT, CHARACTER = 3, 13, 7.2
QUORUM_HEIGHT, CURVE_HEIGHT = 84, 170

#: The page's variable for each state.
VARIABLES = {
    GroupState.TRAINING: "training",
    GroupState.HEALING: "healing",
    GroupState.STARTING: "starting",
    GroupState.PENDING: "waiting",
    GroupState.REQUEUED: "waiting",
    GroupState.LOST: "lost",
    GroupState.STALLED: "stalled",
    GroupState.DONE: "done",
}
#: Placeholder of every variable; no other colour is in a picture.
PLACEHOLDERS = {
    name: f"#0a0b{number:02x}"
    for number, name in enumerate(
        ["ink", "muted", "line", "accent", "second", *dict.fromkeys(VARIABLES.values())], start=1
    )
}


def timeline(
    history: History, incidents: Sequence[Incident], start: float, end: float, size: int
) -> str:
    """A lane for every replica group, coloured by its state, above the quorum's size."""
    replicas = sorted(history.groups)
    lane = _lane_height(len(replicas))
    lanes_height = lane * max(1, len(replicas))
    marks = labels(incidents, start, end)
    with _style("timeline"):
        figure, (lanes, quorum) = _figure([lanes_height, QUORUM_HEIGHT], marks, start, end)
        _draw_lanes(lanes, history, replicas, lane, start, end)
        _mark(lanes, incidents, marks)
        lanes.tick_params(axis="x", labelbottom=False, length=0)
        _draw_quorum(quorum, history.quorum.spans(end), max(size, 1))
        return _svg(figure)


def curves(history: History, incidents: Sequence[Incident], start: float, end: float) -> str:
    """Loss and tokens per second, with the incidents as lines through both."""
    marks = labels(incidents, start, end)
    with _style("curves"):
        figure, (loss, speed) = _figure([CURVE_HEIGHT, CURVE_HEIGHT], marks, start, end)
        _draw_series(loss, history.loss, "accent", "loss")
        _draw_series(speed, history.tokens_per_second, "second", "tokens/s")
        speed.set_ylim(bottom=0)
        speed.yaxis.set_major_formatter(lambda value, _: _short(value))
        loss.tick_params(axis="x", labelbottom=False)
        for axes in (loss, speed):
            axes.plot(
                [
                    t
                    for incident in incidents
                    for t in (incident.lost_at, incident.lost_at, math.nan)
                ],
                [0.0, 1.0, math.nan] * len(incidents),
                color=PLACEHOLDERS["lost"],
                linewidth=0.8,
                alpha=0.55,
                transform=axes.get_xaxis_transform(),
            )
        _mark(loss, incidents, marks)
        return _svg(figure)


def cells(spans: Sequence[Span[GroupState]], start: float, end: float, count: int) -> list[int]:
    """The worst state in each of ``count`` equal parts of the time, as its index in BY_BADNESS.

    -1 where nothing is known.
    """
    found = [-1] * count
    for span in spans:
        badness = BY_BADNESS.index(span.value)
        first, last = (
            min(count - 1, max(0, int((t - start) / (end - start) * count)))
            for t in (span.start, span.end)
        )
        for cell in range(first, last + 1):
            found[cell] = max(found[cell], badness)
    return found


class Label(NamedTuple):
    """A number above a plot, or several of neighbours for whom there is no room."""

    x: float
    """Pixels from the left end of the plot."""
    row: int
    first: int
    last: int

    @property
    def text(self) -> str:
        dash = "\N{EN DASH}"
        return str(self.first) if self.first == self.last else f"{self.first}{dash}{self.last}"

    @property
    def right(self) -> float:
        return self.x + CHARACTER * (len(self.text) + 0.5)


def labels(incidents: Sequence[Incident], start: float, end: float) -> list[Label]:
    """Where to write the numbers of incidents so that none covers another."""
    placed: list[Label] = []
    rights = [float("-inf")] * ROWS
    for t, number in sorted((i.lost_at, n) for n, i in enumerate(incidents, start=1)):
        x = (t - start) / (end - start) * PLOT
        row = next((row for row in range(ROWS) if rights[row] <= x), None)
        if row is not None:
            placed.append(Label(x, row, number, number))
        else:
            label = placed.pop()
            row = label.row
            first, last = min(label.first, number), max(label.last, number)
            placed.append(label._replace(first=first, last=last))
        rights[row] = placed[-1].right
    return placed


def _lane_height(count: int) -> int:
    for most, height in ((4, 30), (12, 22), (32, 16), (80, 12)):
        if count <= most:
            return height
    return max(2, 960 // count)


def _draw_lanes(
    axes: Axes, history: History, replicas: list[int], lane: int, start: float, end: float
) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    count = int(PLOT / CELL)
    width = (end - start) / count
    corners: dict[str, list[list[tuple[float, float]]]] = {}
    for row, replica in enumerate(replicas):
        found = cells(history.groups[replica].spans(end), start, end, count)
        first = 0
        for cell in range(1, count + 1):
            if cell < count and found[cell] == found[first]:
                continue
            if found[first] >= 0:
                left, right = start + first * width, start + cell * width
                low, high = row - 0.39, row + 0.39
                corners.setdefault(VARIABLES[BY_BADNESS[found[first]]], []).append(
                    [(left, low), (right, low), (right, high), (left, high), (left, low)]
                )
            first = cell
    for variable, boxes in corners.items():
        codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY] * len(boxes)
        path = Path([corner for box in boxes for corner in box], codes)
        axes.add_patch(PathPatch(path, facecolor=PLACEHOLDERS[variable], edgecolor="none"))
    axes.set_ylim(max(1, len(replicas)) - 0.5, -0.5)
    every = -(-13 // lane)
    axes.set_yticks(range(0, len(replicas), every), [str(r) for r in replicas[::every]])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    _name(axes, "replica")


def _draw_quorum(axes: Axes, spans: Sequence[Span[int]], size: int) -> None:
    from matplotlib.ticker import MaxNLocator

    times = [t for span in spans for t in (span.start, span.end)]
    sizes = [span.value for span in spans for _ in (span.start, span.end)]
    # What is missing is filled, from the top: right even where the scale does not begin at 0.
    axes.fill_between(times, sizes, size, color=PLACEHOLDERS["lost"], alpha=0.3, linewidth=0)
    axes.plot(times, sizes, color=PLACEHOLDERS["accent"], linewidth=1.4, clip_on=False)
    least = min(sizes, default=0)
    axes.set_ylim(max(0, least - max(1, size - least)), size)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    _name(axes, "quorum")


def _draw_series(axes: Axes, series: Series, variable: str, name: str) -> None:
    times = [point.t for point in series.points]
    colour = PLACEHOLDERS[variable]
    if any(point.low < point.high for point in series.points):
        lows, highs = [p.low for p in series.points], [p.high for p in series.points]
        axes.fill_between(times, lows, highs, color=colour, alpha=0.25, linewidth=0)
    axes.plot(times, [point.mean for point in series.points], color=colour, linewidth=1.4)
    axes.margins(y=0.08)
    if not times:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center")
    _name(axes, name)


def _name(axes: Axes, name: str) -> None:
    """Write what ``axes`` show above their scale, where nothing else is."""
    axes.annotate(
        name,
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(-LEFT + 2, 9),
        textcoords="offset points",
        color=PLACEHOLDERS["muted"],
    )


def _mark(axes: Axes, incidents: Sequence[Incident], marks: Sequence[Label]) -> None:
    """Number the incidents above ``axes``; each number leads to its row in the table."""
    colour = PLACEHOLDERS["lost"]
    across = axes.get_xaxis_transform()
    axes.plot(
        [incident.lost_at for incident in incidents],
        [1.0] * len(incidents),
        linestyle="none",
        marker=[(-0.5, 1.0), (0.5, 1.0), (0.0, 0.0)],
        markersize=13,
        color=colour,
        markeredgewidth=0,
        transform=across,
        clip_on=False,
    )
    for label in marks:
        text = axes.annotate(
            label.text,
            xy=(label.x / PLOT, 1.0),
            xycoords="axes fraction",
            xytext=(-CHARACTER / 2, 12 + ROW_HEIGHT * label.row),
            textcoords="offset points",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )
        text.set_url(f"#incident-{label.first}")


def _figure(
    heights: Sequence[int], marks: Sequence[Label], start: float, end: float
) -> tuple[Figure, list[Axes]]:
    """Axes of these heights below each other, on one axis of time."""
    from matplotlib.figure import Figure

    ticks = _ticks(start, end)
    above = TOP + ROW_HEIGHT * (1 + max((label.row for label in marks), default=0))
    under = BOTTOM + ROW_HEIGHT * (1 + any("\n" in text for _, text in ticks))
    total = above + sum(heights) + GAP * (len(heights) - 1) + under
    figure = Figure(figsize=(WIDTH / 72, total / 72))
    below, all_axes = above, []
    for height in heights:
        box = (LEFT / WIDTH, 1 - (below + height) / total, PLOT / WIDTH, height / total)
        axes = figure.add_axes(box)
        axes.set_xlim(start, end)
        axes.set_xticks([t for t, _ in ticks], [text for _, text in ticks])
        all_axes.append(axes)
        below += height + GAP
    return figure, all_axes


def _ticks(start: float, end: float) -> list[tuple[float, str]]:
    """Round local times, at most a dozen, with the day where a new one begins."""
    span = end - start
    days = 86400 * math.ceil(span / 12 / 86400)
    step = next((step for step in STEPS if span / step <= 12), days)
    offset = datetime.datetime.fromtimestamp(start).astimezone().utcoffset()
    zone = offset.total_seconds() if offset is not None else 0.0
    shape = "%H:%M:%S" if step < 60 else "%H:%M"
    found, day = [], ""
    t = -(-(start + zone) // step) * step - zone
    while t <= end:
        local = datetime.datetime.fromtimestamp(t)
        today = local.strftime("%b %d")
        text = local.strftime(shape) if step < 86400 else today
        if step < 86400 and span > 43200 and today != day:
            text = f"{text}\n{today}"
        found.append((t, text))
        day, t = today, t + step
    return found


#: Round steps of time, seconds.
STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200)


def _short(value: float) -> str:
    """A number on a scale: 1500000 is 1.5M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _style(salt: str) -> Any:
    """matplotlib's settings while one picture is drawn; ``salt`` keeps its ids its own."""
    import matplotlib

    ink, muted, line = (PLACEHOLDERS[name] for name in ("ink", "muted", "line"))
    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": salt,
            "font.size": 11,
            "text.color": ink,
            "axes.facecolor": "none",
            "axes.edgecolor": line,
            "axes.linewidth": 1,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "axes.axisbelow": True,
            "grid.color": line,
            "grid.linewidth": 0.8,
            "figure.facecolor": "none",
            "xtick.color": line,
            "xtick.labelcolor": muted,
            "ytick.color": line,
            "ytick.labelcolor": muted,
            "ytick.major.size": 0,
            "xtick.major.size": 4,
        }
    )


def _svg(figure: Figure) -> str:
    """``figure`` for use inside an HTML page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"| height="[^"]*pt"', r"\1", svg)
    for name, placeholder in PLACEHOLDERS.items():
        svg = svg.replace(placeholder, f"var(--{name})")
    return svg
