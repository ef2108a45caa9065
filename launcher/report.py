"""A run as a report: a page to look at, text tables, or data. Pure: text comes out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from launcher.digest import NOTHING, STATE_NAMES, Digest, Evidence, Moment, data, digest
from launcher.findings import Finding
from launcher.history import History, Point
from launcher.model import ReportFormat
from launcher.page import html_page
from launcher.pictures import curves, timeline
from launcher.rundir import Manifest
from launcher.state import RunState
from launcher.words import clock, seconds

#: Rows of the loss and of the tokens per second in text.
TEXT_POINTS = 20


def render(
    shape: ReportFormat,
    manifest: Manifest,
    state: RunState,
    history: History,
    findings: Sequence[Finding],
    end: float,
) -> str:
    """The report of a run as it stands at ``end`` (Unix seconds)."""
    if shape is ReportFormat.JSON:
        return json.dumps(data(manifest, state, findings), indent=2, allow_nan=False) + "\n"
    said = digest(manifest, state, history, findings, end)
    if shape is ReportFormat.MARKDOWN:
        return "\n".join(markdown(said, history)) + "\n"
    # A picture has a width, even of a run of which nothing has been seen yet.
    until = max(said.end, said.start + 1.0)
    return html_page(
        said,
        timeline(history, state.incidents, said.start, until, state.size),
        curves(history, state.incidents, said.start, until),
    )


def markdown(said: Digest, history: History) -> Iterable[str]:
    """The report as text, line by line: tables for whoever reads or renders Markdown."""
    yield f"# Run {_escaped(said.run)}"
    yield ""
    as_of = f"as of {clock(said.end, date=True)}, times in {_escaped(said.zone)}"
    yield f"{_escaped(said.status)}, {as_of}"
    yield from _table(["", ""], said.facts)
    yield from _table(
        ["figure", "value", "meaning"], [(f.name, f.value, f.meaning) for f in said.figures]
    )
    yield from ["", "## Timeline"]
    names = list(dict.fromkeys(STATE_NAMES.values()))
    yield from _table(
        ["replica", "node", "state", "step", "attempts", "failed commits"]
        + [f"time {name}" for name in names],
        [
            [
                *(group.replica, group.node, group.state, group.step),
                *(group.attempts, group.failed_commits),
                *(seconds(group.seconds.get(name, 0.0)) for name in names),
            ]
            for group in said.groups
        ],
    )
    sizes: dict[int, float] = {}
    for span in history.quorum.spans(said.end):
        sizes[span.value] = sizes.get(span.value, 0.0) + span.end - span.start
    yield from _table(
        ["replica groups in the quorum", "time"],
        [(size, seconds(time)) for size, time in sorted(sizes.items(), reverse=True)],
    )
    yield from ["", "## Loss and tokens per second"]
    for name, series in (("loss", history.loss), ("tokens/s", history.tokens_per_second)):
        yield from _table(
            ["time", f"{name}, mean", "lowest", "highest"],
            [
                (clock(p.t, date=True), *(f"{value:,.6g}" for value in (p.mean, p.low, p.high)))
                for p in _some(series.points)
            ],
        )
    yield from _incidents(said)
    yield from ["", "## Findings at the end", ""]
    for finding in said.findings:
        yield f"- {finding.severity.value}: {finding.kind}: {_escaped(finding.message)}"
    if not said.findings:
        yield "None."


def _incidents(said: Digest) -> Iterable[str]:
    yield from ["", "## Incidents"]
    if not said.incidents:
        yield from ["", "None."]
        return
    if said.incidents_left_out:
        yield from ["", f"{said.incidents_left_out:,} older ones are in the report as JSON."]
    yield from _table(
        ["#", "replica", "node", "cause"]
        + [moment.name.lower() for moment in said.incidents[0].moments]
        + ["steps lost", "survivor stall"],
        [
            [
                *(i.number, i.who, i.node, i.cause),
                *(_moment(moment) for moment in i.moments),
                *(i.steps_lost, i.survivor_stall),
            ]
            for i in said.incidents
        ],
    )
    yield from ["", "Evidence:"]
    yield from _table(
        ["#", "time", "line", "points to", "read in"],
        [
            (i.number, clock(line.t), _line(line), line.cause, line.where)
            for i in said.incidents
            for line in i.evidence
        ],
    )


class _Markdown(str):
    """Text that is escaped already."""

    __slots__ = ()


def _line(line: Evidence) -> _Markdown:
    """What a line says, and the line itself below it."""
    code = f"<br><code>{_escaped(line.line)}</code>" if line.line else ""
    return _Markdown(_escaped(line.text) + code)


def _moment(moment: Moment) -> str:
    if moment.t is None:
        return NOTHING
    after = "" if moment.after is None else f" (+{seconds(moment.after)})"
    note = f" {moment.note}" if moment.note else ""
    return clock(moment.t, date=moment.after is None) + after + note


def _some(points: Sequence[Point]) -> Sequence[Point]:
    """At most ``TEXT_POINTS`` of them, evenly, with the last one."""
    every = max(1, -(-len(points) // TEXT_POINTS))
    return points[::-1][::every][::-1]


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterable[str]:
    yield ""
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(map(_cell, row)) + " |"


def _cell(value: object) -> str:
    return value if isinstance(value, _Markdown) else _escaped(str(value))


def _escaped(text: str) -> str:
    """``text`` without meaning for Markdown, or for the HTML that may be inside it."""
    return re.sub(r"([\\`*_\[\]<>|&~#])", r"\\\1", text)
