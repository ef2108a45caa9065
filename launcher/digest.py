"""What a report says of a run, as clean words and numbers for any format. Pure.

Causes, host names and messages come from logs: every text here has lost what cannot be
printed, and its length is bounded. Escaping is for whoever writes a format.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.findings import Finding
from launcher.groups import Group
from launcher.history import History
from launcher.incidents import Incident, Sign
from launcher.model import GroupState
from launcher.rundir import Manifest
from launcher.snapshot import as_data, figures, iso
from launcher.state import RunState
from launcher.words import clean, clock, plural, seconds, zone

#: Incidents in a report, the newest; the JSON has all.
MOST_INCIDENTS = 200
#: Lines of evidence in a report for one incident, the first; the JSON has all.
MOST_EVIDENCE = 12

#: Stands where there is no value.
NOTHING = "\N{EN DASH}"

#: How a state is called for a person; two states may share a name.
STATE_NAMES = {
    GroupState.TRAINING: "training",
    GroupState.HEALING: "healing",
    GroupState.STARTING: "starting",
    GroupState.PENDING: "waiting in Slurm",
    GroupState.REQUEUED: "waiting in Slurm",
    GroupState.LOST: "lost",
    GroupState.STALLED: "stalled",
    GroupState.DONE: "done",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number, what it is called, and what it means."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When something of an incident happened."""

    name: str
    t: float | None
    after: float | None = None
    """Seconds since the first sign."""
    note: str = ""
    main: bool = False
    """Whether it has a column of its own where there is room for a few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A line of a log that points to a cause."""

    t: float
    text: str
    """What it says."""
    line: str
    """The line itself, where that is more than what it says."""
    cause: str
    where: str
    """File and byte offset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentText:
    """One incident, ready to be printed."""

    number: int
    """As in the pictures."""
    who: str
    """The replica group's number, or the lighthouse."""
    node: str
    cause: str
    moments: Sequence[Moment]
    steps_lost: int
    survivor_stall: str
    evidence: Sequence[Evidence]
    evidence_left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupText:
    """One replica group at the end, and where its time went."""

    replica: int
    node: str
    state: str
    step: int
    attempts: int
    failed_commits: int
    seconds: dict[str, float]
    """By name of the state."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """All that a report says, apart from the pictures."""

    run: str
    status: str
    finished: bool
    start: float
    end: float
    zone: str
    """Of every time in the report."""
    facts: Sequence[tuple[str, str]]
    figures: Sequence[Figure]
    groups: Sequence[GroupText]
    incidents: Sequence[IncidentText]
    incidents_left_out: int
    findings: Sequence[Finding]


def digest(
    manifest: Manifest,
    state: RunState,
    history: History,
    findings: Sequence[Finding],
    end: float,
) -> Digest:
    """Say in words what is known of a run at ``end`` (Unix seconds)."""
    start = state.first_event if state.first_event is not None else manifest.created or end
    numbered = list(enumerate(state.incidents, start=1))
    return Digest(
        run=clean(manifest.run),
        status=_status(state),
        finished=state.finished,
        start=start,
        end=max(start, end),
        zone=zone(start, max(start, end)),
        facts=_facts(manifest, state, start, end),
        figures=_figures(state),
        groups=[
            _group(group, history, end)
            for group in sorted(state.groups.values(), key=lambda group: group.replica)
        ],
        incidents=[_incident(number, i, state, end) for number, i in numbered[-MOST_INCIDENTS:]],
        incidents_left_out=max(0, len(numbered) - MOST_INCIDENTS),
        findings=[replace(finding, message=clean(finding.message)) for finding in findings],
    )


def data(manifest: Manifest, state: RunState, findings: Sequence[Finding]) -> dict[str, Any]:
    """The monitor's interface for tools, with the figures and all that incidents hold."""
    values = as_data(state, findings)
    for plain, incident in zip(values["incidents"], state.incidents, strict=True):
        plain |= {
            "node": incident.where,
            "lost_at_step": incident.lost_at_step,
            "requeued_at": iso(incident.requeued_at),
            "started_at": iso(incident.started_at),
            "waited_for_slurm_s": _in_the_queue(incident),
            "boot_s": dict(incident.boot),
            "rejoined_at": iso(incident.rejoined_at),
            "healed_at": iso(incident.healed_at),
            "healed_from": incident.healed_from,
            "recovered_at_step": incident.recovered_at_step,
            "full_strength_at": iso(incident.full_strength_at),
            "evidence": [
                {
                    "time": iso(sign.t),
                    "cause": sign.cause.value,
                    "text": sign.text,
                    "line": sign.line,
                    "file": sign.source.file if sign.source else None,
                    "offset": sign.source.offset if sign.source else None,
                }
                for sign in incident.evidence
            ],
        }
    return {
        "run": manifest.run,
        **values,
        "figures": figures(state),
        "weights": {
            "compared": state.weights.compared,
            "differences": state.weights.differences,
        },
    }


def _status(state: RunState) -> str:
    if state.finished:
        return "trained to the last step"
    counts = Counter(STATE_NAMES[group.state] for group in state.groups.values())
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _facts(manifest: Manifest, state: RunState, start: float, end: float) -> list[tuple[str, str]]:
    total = f" of {state.steps:,}" if state.steps is not None else ""
    if state.sync_every > 1:
        total = f", one every {state.sync_every:,} steps{total},"
    words = [manifest.config, *manifest.extra_args]
    if manifest.script:
        words = [manifest.script, *manifest.script_args]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    facts = [
        ("Script" if manifest.script else "Configuration", shlex.join(words)),
        *([] if manifest.script else [("Method", manifest.method)]),
        (
            "Replica groups",
            f"{manifest.group_size}, of {plural(manifest.ranks_per_group, 'rank')} each",
        ),
        (f"{state.counted.capitalize()}s", f"{state.step:,}{total} committed"),
        ("Duration", f"{seconds(max(0.0, end - start))}, from {clock(start, date=True)}"),
        ("Quorum", f"{len(state.members)} of {state.size}, id {state.quorum_id}"),
        ("Versions", versions or "not recorded"),
        ("Lighthouse", manifest.lighthouse or "not recorded"),
        ("Submitted by", manifest.submitted_by or "not recorded"),
    ]
    return [(name, clean(value)) for name, value in facts]


def _figures(state: RunState) -> list[Figure]:
    values = figures(state)

    def shown(name: str, shape: str) -> str:
        value = values[name]
        return NOTHING if value is None else shape.format(value)

    recover, detect = values["time_to_recover_s"], values["time_to_detect_s"]
    ledger = state.weights
    return [
        Figure(
            name="Time to detect",
            value=NOTHING if detect is None else seconds(detect),
            meaning="first sign to the first quorum without it, median",
        ),
        Figure(
            name="Time to recover",
            value=NOTHING if recover is None else seconds(recover),
            meaning="from that quorum to the first commit after coming back, median",
        ),
        Figure(
            name="Steps lost",
            value=shown("steps_lost", "{:,.0f}"),
            meaning=f"tried and not committed, over {plural(len(state.incidents), 'incident')}",
        ),
        Figure(
            name="Participation",
            value=shown("participation", "{:.1%}"),
            meaning="mean quorum size over group size",
        ),
        Figure(
            name="Step efficiency",
            value=shown("step_efficiency", "{:.2%}"),
            meaning="committed over attempted steps",
        ),
        Figure(
            name="Both together",
            value=shown("training_efficiency", "{:.1%}"),
            meaning="participation times step efficiency",
        ),
        Figure(
            name="Weights",
            value=_weights(ledger.compared, ledger.differences),
            meaning=f"{ledger.compared:,} (step, rank) pairs compared between groups",
        ),
    ]


def _weights(compared: int, differences: int) -> str:
    if not compared:
        return NOTHING
    return f"{differences:,} differ" if differences else "identical"


def _group(group: Group, history: History, end: float) -> GroupText:
    spent: dict[str, float] = {}
    changes = history.groups.get(group.replica)
    for span in changes.spans(end) if changes else []:
        name = STATE_NAMES[span.value]
        spent[name] = spent.get(name, 0.0) + span.end - span.start
    return GroupText(
        replica=group.replica,
        node=clean(", ".join(group.nodes) or group.host),
        state=STATE_NAMES[group.state],
        step=group.step,
        attempts=group.attempts,
        failed_commits=group.failed_commits,
        seconds=spent,
    )


def _incident(number: int, incident: Incident, state: RunState, end: float) -> IncidentText:
    def moment(name: str, t: float | None, note: str = "", *, main: bool = False) -> Moment:
        after = None if t is None else t - incident.first_sign
        return Moment(name=name, t=t, after=after, note=note, main=main)

    healer = "" if incident.healed_from is None else f"from {incident.healed_from}"
    boot = ", ".join(f"{name} {value:.1f} s" for name, value in incident.boot.items())
    at = incident.recovered_at_step
    recovered = "" if at is None else f"at step {at:,}"
    evidence = sorted(incident.evidence, key=lambda sign: sign.t)
    return IncidentText(
        number=number,
        who="lighthouse" if incident.replica is None else str(incident.replica),
        node=clean(incident.where),
        cause=clean(incident.why),
        moments=[
            Moment(
                name="First sign",
                t=incident.first_sign,
                note=f"at step {incident.lost_at_step:,}",
                main=True,
            ),
            moment("Detected", incident.detected_at, main=True),
            moment("Requeued", incident.requeued_at, _wait(incident, state, end)),
            moment("Started again", incident.started_at, boot),
            moment("Rejoined", incident.rejoined_at),
            moment("Healed", incident.healed_at, healer),
            moment("Recovered", incident.recovered_at, recovered, main=True),
            moment("Back at full strength", incident.full_strength_at),
        ],
        steps_lost=incident.steps_lost,
        survivor_stall=seconds(incident.survivor_stall_s),
        evidence=[_evidence(sign) for sign in evidence[:MOST_EVIDENCE]],
        evidence_left_out=max(0, len(evidence) - MOST_EVIDENCE),
    )


def _in_the_queue(incident: Incident) -> float | None:
    """Seconds from a requeue to the start that followed; None without both."""
    requeued, started = incident.requeued_at, incident.started_at
    if requeued is None or started is None or started < requeued:
        return None
    return round(started - requeued, 3)


def _wait(incident: Incident, state: RunState, end: float) -> str:
    """How long a group waited in the queue; while it does, also what for."""
    waited = _in_the_queue(incident)
    if waited is not None:
        return f"waited {seconds(waited)} for {state.scheduler}"
    group = None if incident.replica is None else state.groups.get(incident.replica)
    if incident.requeued_at is None or group is None or group.state is not GroupState.REQUEUED:
        return ""
    why = f" ({clean(group.waiting)})" if group.waiting else ""
    so_far = seconds(max(0.0, end - incident.requeued_at))
    return f"waits for {state.scheduler}{why}, so far {so_far}"


def _evidence(sign: Sign) -> Evidence:
    text, line = clean(sign.text), clean(sign.line)
    where = "source not recorded"
    if sign.source is not None:
        where = f"{clean(sign.source.file)}, byte {sign.source.offset:,}"
    return Evidence(
        t=sign.t,
        text=text,
        line="" if line == text else line,
        cause=sign.cause.value,
        where=where,
    )
