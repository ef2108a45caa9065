"""The HTML page of a report: one file, nothing loaded from elsewhere, every text escaped. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from launcher.digest import (
    NOTHING,
    STATE_NAMES,
    Digest,
    GroupText,
    IncidentText,
    Moment,
)
from launcher.pictures import VARIABLES
from launcher.words import clock, plural, seconds

#: The browser loads nothing, whatever the page says.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
#: With more incidents than this, the evidence is folded away.
MOST_OPEN = 3
#: Runs longer than this have the day beside the time of day.
DAY = 43200.0

CURVES_EXPLAINED = (
    "Red lines are incidents. Loss: mean over the replica groups. Tokens per second: of rank 0 of "
    "every replica group, summed. Where many measurements share one point, the line is their mean "
    "and the shade their range."
)

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1b2330; --muted: #616b7a; --line: #dfe3e9;
  --accent: #1f6fb2; --second: #7a5bc0;
  --training: #8fbbe0; --healing: #e8a90c; --starting: #9a86dd; --waiting: #bcc4cf;
  --lost: #c8372d; --stalled: #b3338f; --done: #e7ebf0;
  --warning: #a15c00; --good: #23794a;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2028; --ink: #e4e8ee; --muted: #98a3b3; --line: #2e3642;
    --accent: #6cb2ee; --second: #b39bf0;
    --training: #3a6d9c; --healing: #eab63d; --starting: #8f7be0; --waiting: #5a6472;
    --lost: #f4695c; --stalled: #df67bd; --done: #29313c;
    --warning: #e6a64a; --good: #5fc38c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system,
  "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums;
}
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 27px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 36px 0 10px; }
p { margin: 6px 0; }
.muted, small { color: var(--muted); font-size: 13px; }
.status { font-weight: 600; color: var(--warning); }
.status.good { color: var(--good); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 16px 19px; }
.wide { overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: 12px; margin: 22px 0 12px; }
.tile { padding: 12px 13px; }
.tile b { display: block; font-size: 20px; line-height: 1.4; font-weight: 600; white-space: nowrap; }
.tile span { font-size: 13px; }
.tile small { display: block; font-size: 12px; line-height: 1.35; margin-top: 3px; }
dl { display: grid; grid-template-columns: max-content 1fr max-content 1fr; gap: 5px 18px; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 800px) { dl { grid-template-columns: max-content 1fr; } }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; margin: 0 0 6px; }
.legend i { display: inline-block; width: 13px; height: 13px; border-radius: 3px; margin-right: 6px; vertical-align: -2px; }
svg { display: block; width: 100%; min-width: 760px; height: auto; overflow: visible; }
svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif !important; }
table { border-collapse: collapse; width: 100%; font-size: 13px; line-height: 1.4; }
th { text-align: left; font-weight: 600; color: var(--muted); vertical-align: bottom; }
th, td { padding: 7px 8px; }
td { vertical-align: top; border-top: 1px solid var(--line); }
td.time { white-space: nowrap; }
td.time small { display: block; font-size: 12px; }
th.number, td.number { text-align: right; }
td.number { white-space: nowrap; }
td.node { min-width: 84px; width: 18%; overflow-wrap: anywhere; }
td.cause { min-width: 170px; width: 30%; overflow-wrap: anywhere; }
td.cause div { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
tr.more td { border-top: 0; padding-top: 0; padding-bottom: 10px; }
tr:target td { background: color-mix(in srgb, var(--lost) 12%, transparent); }
.mark { color: var(--lost); font-weight: 700; }
.moments { display: flex; flex-wrap: wrap; gap: 2px 20px; margin-bottom: 4px; }
.moments b { font-weight: 400; color: var(--muted); }
summary { cursor: pointer; color: var(--muted); }
ul.evidence { list-style: none; margin: 5px 0 0; padding: 8px 12px; background: var(--page); border-radius: 6px; }
ul.evidence li { padding: 2px 0; overflow-wrap: anywhere; }
ul.evidence code { display: block; white-space: pre-wrap; }
code { font: 12px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
ul.findings { list-style: none; margin: 0; padding: 8px 19px; }
ul.findings li { padding: 7px 0; overflow-wrap: anywhere; border-top: 1px solid var(--line); }
ul.findings li:first-child { border-top: 0; }
.badge { font-size: 11px; font-weight: 700; letter-spacing: 0.03em; text-transform: uppercase; margin-right: 8px; color: var(--muted); }
.badge.critical { color: var(--lost); }
.badge.warning { color: var(--warning); }
@media print { .card { break-inside: avoid; } body { background: none; } }
"""


def html_page(digest: Digest, timeline: str, curves: str) -> str:
    """The whole page; the pictures are SVG of ours, all else is escaped here."""
    title = f"Run {escape(digest.run)}"
    good = " good" if digest.finished else ""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style></head><body><main>",
            f"<h1>{title}</h1>",
            f'<p><span class="status{good}">{escape(digest.status)}</span>',
            f'<span class="muted">as of {clock(digest.end, date=True)},',
            f"times in {escape(digest.zone)}</span></p>",
            *_tiles(digest),
            *_facts(digest),
            "<h2>Timeline</h2>",
            '<figure class="card wide" style="margin:0">',
            *_legend(digest),
            timeline,
            "</figure>",
            "<h2>Loss and tokens per second</h2>",
            '<figure class="card wide" style="margin:0">',
            curves,
            f'<p class="muted">{CURVES_EXPLAINED}</p></figure>',
            *_incidents(digest),
            *_findings(digest),
            *_groups(digest),
            "</main></body></html>",
            "",
        ]
    )


def _tiles(digest: Digest) -> Iterable[str]:
    yield '<div class="tiles">'
    for figure in digest.figures:
        yield (
            f'<div class="card tile"><span>{escape(figure.name)}</span>'
            f"<b>{escape(figure.value)}</b><small>{escape(figure.meaning)}</small></div>"
        )
    yield "</div>"


def _facts(digest: Digest) -> Iterable[str]:
    yield '<dl class="card">'
    for name, value in digest.facts:
        yield f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
    yield "</dl>"


def _legend(digest: Digest) -> Iterable[str]:
    seen = {name for group in digest.groups for name in group.seconds}
    yield '<div class="legend">'
    for state, variable in VARIABLES.items():
        if STATE_NAMES[state] in seen:
            seen.remove(STATE_NAMES[state])
            yield f'<span><i style="background:var(--{variable})"></i>{STATE_NAMES[state]}</span>'
    if digest.incidents:
        yield '<span><b class="mark">▾ 1</b> incident, by its number in the table</span>'
    yield "</div>"


def _incidents(digest: Digest) -> Iterable[str]:
    yield "<h2>Incidents</h2>"
    if not digest.incidents:
        yield '<p class="card">None: neither a replica group nor the lighthouse was lost.</p>'
        return
    if digest.incidents_left_out:
        yield (
            f'<p class="muted">The newest {len(digest.incidents)}; {digest.incidents_left_out:,} '
            "older ones are in the report as JSON.</p>"
        )
    names = [moment.name for moment in digest.incidents[0].moments if moment.main]
    yield '<div class="card wide"><table><thead><tr>'
    yield "<th>#</th><th>Replica</th><th>Node</th><th>Cause</th>"
    yield "".join(f"<th>{escape(name)}</th>" for name in names)
    yield '<th class="number">Steps lost</th><th class="number">Survivor stall</th>'
    yield "</tr></thead><tbody>"
    dated = digest.end - digest.start > DAY
    opened = " open" if len(digest.incidents) <= MOST_OPEN else ""
    for incident in digest.incidents:
        yield from _incident(incident, opened, dated, columns=len(names) + 6)
    yield "</tbody></table></div>"


def _incident(incident: IncidentText, opened: str, dated: bool, columns: int) -> Iterable[str]:
    cause = escape(incident.cause)
    yield (
        f'<tr id="incident-{incident.number}"><td class="mark">{incident.number}</td>'
        f'<td>{incident.who}</td><td class="node">{escape(incident.node) or NOTHING}</td>'
        f'<td class="cause"><div title="{cause}">{cause}</div></td>'
    )
    for moment in incident.moments:
        if moment.main:
            yield _moment(moment, dated)
    yield f'<td class="number">{incident.steps_lost:,}</td>'
    yield f'<td class="number">{escape(incident.survivor_stall)}</td></tr>'
    between = [moment for moment in incident.moments if not moment.main and moment.t is not None]
    if between or incident.evidence:
        yield f'<tr class="more"><td></td><td colspan="{columns - 1}">'
        yield from _between(between)
        yield from _evidence(incident, opened)
        yield "</td></tr>"


def _between(moments: Sequence[Moment]) -> Iterable[str]:
    """What has no column of its own, in a line that breaks where it must."""
    if not moments:
        return
    yield '<div class="moments">'
    for moment in moments:
        yield (
            f"<span><b>{escape(moment.name)}</b> {clock(moment.t or 0.0)} "
            f"<small>{escape(' · '.join(_notes(moment)))}</small></span>"
        )
    yield "</div>"


def _evidence(incident: IncidentText, opened: str) -> Iterable[str]:
    if not incident.evidence:
        return
    count = len(incident.evidence) + incident.evidence_left_out
    yield f"<details{opened}><summary>{plural(count, 'line')} of evidence</summary>"
    yield '<ul class="evidence">'
    for line in incident.evidence:
        code = f" <code>{escape(line.line)}</code>" if line.line else ""
        yield (
            f"<li>{clock(line.t)} {escape(line.text)} "
            f"<small>{escape(line.cause)} · {escape(line.where)}</small>{code}</li>"
        )
    if incident.evidence_left_out:
        yield f"<li><small>and {incident.evidence_left_out:,} more in the JSON</small></li>"
    yield "</ul></details>"


def _moment(moment: Moment, dated: bool) -> str:
    if moment.t is None:
        return f'<td class="time">{NOTHING}</td>'
    day = [clock(moment.t, date=True)[:10]] if dated and moment.after is None else []
    lines = "".join(f"<small>{escape(note)}</small>" for note in [*day, *_notes(moment)])
    return f'<td class="time">{clock(moment.t)}{lines}</td>'


def _notes(moment: Moment) -> list[str]:
    after = [] if moment.after is None else [f"+{seconds(moment.after)}"]
    return [*after, moment.note] if moment.note else after


def _findings(digest: Digest) -> Iterable[str]:
    yield "<h2>Findings at the end</h2>"
    if not digest.findings:
        yield '<p class="card">None: nothing was wrong at the end.</p>'
        return
    yield '<ul class="card findings">'
    for finding in digest.findings:
        severity = finding.severity.value
        yield (
            f'<li><span class="badge {severity}">{severity}</span>'
            f"<b>{escape(finding.kind)}</b>: {escape(finding.message)}</li>"
        )
    yield "</ul>"


def _groups(digest: Digest) -> Iterable[str]:
    names = [
        name
        for name in dict.fromkeys(STATE_NAMES.values())
        if any(group.seconds.get(name, 0.0) for group in digest.groups)
    ]
    yield "<h2>Replica groups</h2>"
    yield '<div class="card wide"><table><thead><tr><th>Replica</th><th>Node</th><th>State</th>'
    for name in ["Step", "Attempts", "Failed commits", *(f"Time {name}" for name in names)]:
        yield f'<th class="number">{escape(name)}</th>'
    yield "</tr></thead><tbody>"
    for group in digest.groups:
        yield _group(group, names)
    yield "</tbody></table></div>"


def _group(group: GroupText, names: Sequence[str]) -> str:
    cells = [f"{group.step:,}", str(group.attempts), f"{group.failed_commits:,}"]
    cells += [
        seconds(group.seconds[name]) if group.seconds.get(name) else NOTHING for name in names
    ]
    return (
        f'<tr><td>{group.replica}</td><td class="node">{escape(group.node)}</td><td>{group.state}</td>'
        + "".join(f'<td class="number">{cell}</td>' for cell in cells)
        + "</tr>"
    )
