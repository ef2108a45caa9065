"""What the report says of an incident, and in which zone: in every format, whatever the logs hold."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import time

import pytest

from launcher.digest import Digest, Evidence, digest
from launcher.events import Event
from launcher.history import History
from launcher.incidents import Cause, Incident, Sign
from launcher.model import GroupState, ReportFormat
from launcher.page import html_page
from launcher.report import markdown, render
from launcher.rundir import Manifest
from launcher.state import RunState
from launcher.words import clean, zone
from tests.unit.test_report import HOSTILE, START, Checker, told, words

FORMATS = (ReportFormat.HTML, ReportFormat.MARKDOWN, ReportFormat.JSON)


def waiting(requeued_at: float, started_at: float | None) -> tuple[Manifest, RunState, History]:
    """Group 1 of two was lost at ``START`` and put back into Slurm's queue."""
    manifest, state, history = told(iter([]), groups=2)
    incident = Incident(replica=1, first_sign=START, lost_at_step=7)
    incident.requeued_at, incident.started_at = requeued_at, started_at
    state.incidents.append(incident)
    state.enter(state.group(1), GroupState.REQUEUED, requeued_at)
    state.group(1).waiting = "BeginTime"
    return manifest, state, history


@pytest.mark.parametrize(
    ("requeued_at", "started_at", "note", "seconds"),
    [
        (START + 2, START + 123.5, "waited 2 min 02 s for Slurm", 121.5),
        (START + 2, None, "waits for Slurm (BeginTime), so far 58.0 s", None),
        # Started once in place, which was in vain.
        (START + 20, START + 5, "waits for Slurm (BeginTime), so far 40.0 s", None),
    ],
)
def test_how_long_a_group_waits_for_slurm(
    requeued_at: float, started_at: float | None, note: str, seconds: float | None
) -> None:
    run = waiting(requeued_at, started_at)
    page, text, data = (render(shape, *run, [], START + 60) for shape in FORMATS)
    after = f"{requeued_at - START:.1f} s"
    at = "14:00:20" if requeued_at > START + 2 else "14:00:02"
    assert f"Requeued {at} +{after} · {note}" in words(page)
    assert f"| {at} (+{after}) {note} |" in text
    (incident,) = json.loads(data)["incidents"]
    assert incident["waited_for_slurm_s"] == seconds


def test_who_is_not_in_the_queue_does_not_wait() -> None:
    manifest, state, history = waiting(START + 2, None)
    state.enter(state.group(1), GroupState.DONE, START + 30)
    page = words(render(ReportFormat.HTML, manifest, state, history, [], START + 60))
    assert "Requeued 14:00:02 +2.0 s " in page
    assert "for Slurm" not in page


@pytest.mark.parametrize(
    ("zone", "expected"),
    [
        ("UTC", "UTC"),
        ("CET-1CEST,M3.5.0,M10.5.0/3", "UTC+01:00 (CET)"),
        ("<-0330>3:30", "UTC-03:30"),
    ],
)
def test_a_report_says_the_zone_of_its_times(
    zone: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    manifest, state, history = told(iter([]), groups=2)
    page, text, _ = (render(shape, manifest, state, history, [], START) for shape in FORMATS)
    assert f", times in {expected} " in words(page)
    escaped = expected.replace("<", "")
    assert f", times in {escaped}\n" in text
    assert page.count("times in") == text.count("times in") == 1


def test_a_report_over_a_change_of_the_clocks_says_both_zones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")
    time.tzset()
    october = 1792886400.0  # 2026-10-25 00:00 UTC, an hour before
    assert zone(october, october + 7200) == "UTC+02:00 (CEST), at the end UTC+01:00 (CET)"


def with_evidence(*lines: tuple[str, str]) -> Digest:
    """A report of one incident, with these (meanings, lines) as evidence."""
    manifest, state, history = waiting(START + 2, None)
    said = digest(manifest, state, history, [], START + 60)
    evidence = [
        Evidence(t=START, text=text, line=line, cause="unknown", where="a.err, byte 7")
        for text, line in lines
    ]
    return dataclasses.replace(
        said, incidents=[dataclasses.replace(said.incidents[0], evidence=evidence)]
    )


def test_the_line_itself_is_below_what_it_says() -> None:
    said = with_evidence(
        ("Slurm: due to node failure", "slurmstepd: DUE TO NODE FAILURE"), ("x", "")
    )
    page = html_page(said, "", "")
    assert (
        "14:00:00 Slurm: due to node failure <small>unknown · a.err, byte 7</small> <code>" in page
    )
    assert page.count("<code>") == 1
    text = "\n".join(markdown(said, History()))
    below = "Slurm: due to node failure<br><code>slurmstepd: DUE TO NODE FAILURE</code> | unknown |"
    assert f"| 1 | 14:00:00 | {below}" in text
    assert "| 1 | 14:00:00 | x | unknown |" in text


@pytest.mark.parametrize("line", [clean(HOSTILE), "</code>`` | \\| \\` \\", "<br>![x](http://y)"])
def test_a_hostile_line_stays_text(line: str) -> None:
    said = with_evidence(("what", line))
    page = html_page(said, "", "")
    Checker(page)
    assert f"<code>{html.escape(line)}</code>" in page
    (row,) = [x for x in markdown(said, History()) if x.startswith("| 1 | 14:00:00 | what")]
    code = row.partition("<code>")[2].partition("</code> | unknown |")[0]
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`<\[]", code), "each is behind a backslash of its own"
    assert re.sub(r"\\(\W)", r"\1", code) == line


def test_the_time_in_slurms_queue_has_its_place_in_the_timeline() -> None:
    def event(t: float, kind: str, replica: int | None = 1, **fields: object) -> Event:
        return Event(t=START + t, kind=kind, replica=replica, fields=fields)

    def quorum(t: float, *replicas: int) -> Event:
        members = [(replica, f"uuid-{replica}", 1, "x") for replica in replicas]
        return event(t, "membership", None, quorum_id=int(t), members=members)

    story = [event(0, "launch", replica, attempt=1, host=f"w-{replica}") for replica in (0, 1)]
    story += [quorum(5, 0, 1), event(10, "exit", code=1, reason="killed"), quorum(11, 0)]
    story += [event(12, "queued", reason="BeginTime")]
    story += [event(60, "launch", attempt=2, host="w-2"), quorum(70, 0, 1)]
    manifest, state, history = told(iter(story), groups=2)
    (span,) = (s for s in history.groups[1].spans(START + 80) if s.value is GroupState.REQUEUED)
    assert (span.start, span.end) == (START + 12, START + 60)
    page = words(render(ReportFormat.HTML, manifest, state, history, [], START + 80))
    assert "waited 48.0 s for Slurm" in page
    assert "Time waiting in Slurm" in page
    assert "Back at full strength 14:01:10 +1 min 00 s" in page
    assert "1 w-2 training 0 2 0 15.0 s 15.0 s 48.0 s 2.0 s" in page


@pytest.mark.parametrize(
    ("line", "shown"),
    [("[e] killed\x1b[0m", "[e] killed\N{REPLACEMENT CHARACTER}[0m"), (" killed\n", ""), ("", "")],
)
def test_a_line_is_shown_where_it_says_more(line: str, shown: str) -> None:
    manifest, state, history = waiting(START + 2, None)
    sign = Sign(t=START, weight=5, cause=Cause.UNKNOWN, text="killed", line=line)
    state.incidents[0].explain([sign])
    said = digest(manifest, state, history, [], START + 60)
    assert [(each.text, each.line) for each in said.incidents[0].evidence] == [("killed", shown)]
    data = json.loads(render(ReportFormat.JSON, manifest, state, history, [], START + 60))
    (evidence,) = data["incidents"][0]["evidence"]
    assert (evidence["text"], evidence["line"]) == ("killed", line)
