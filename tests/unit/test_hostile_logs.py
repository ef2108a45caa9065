"""Lines that look like those of a log and are not: none is worth a traceback of the monitor's."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.events import REPLICA_KINDS, Event, ReplicaLogReader, parse_replica_event
from launcher.fields import FIELDS
from launcher.findings import STRANGE_LINES, Snapshot, judge
from launcher.lighthouse_log import LIGHTHOUSE_PATTERNS, LighthouseReader
from launcher.patterns import PATTERNS
from launcher.snapshot import as_data
from launcher.state import RunState
from launcher.watcher import Watcher
from tests.conftest import FIXTURES

#: Values as they stand in a line of JSON.
HOSTILE = [
    *["null", "true", "[]", "{}", '""', '"x"', '"\\ud800"', '["a", null]', "[[1]]", '["\\udfff"]'],
    *["1e999", "-1e999", "NaN", "-1", "0", "0.5", "9007199254740993", "1" + "0" * 400, "9" * 5000],
]
#: What each field may well be.
SOUND: dict[str, str] = {
    **dict.fromkeys(FIELDS, "1"),
    **dict.fromkeys(["committed", "serves", "trained", "joining", "silent"], "true"),
    **dict.fromkeys(
        ["host", "reason", "hash", "error", "what", "next", "node", "why", "state"], '"w-1"'
    ),
    "action": '"requeue"',
    "uuid": '"u"',
    "nodes": '["w-1"]',
    "slowed": '["heat"]',
    "t": "100.5",
    "replica": "1",
}
#: What may stand where a number or a word was.
TOKENS = [
    "",
    "-",
    ",,,",
    "9" * 5000,
    "nan",
    "1e999",
    "\u0663",
    "\u00e9",
    "\0",
    "A" * 5000,
    "[",
    "\r",
]
SAMPLES = [sample.line for pattern in PATTERNS + LIGHTHOUSE_PATTERNS for sample in pattern.samples]


def line_of(kind: str, fields: dict[str, str]) -> bytes:
    told = {"t": SOUND["t"], "kind": json.dumps(kind), "replica": SOUND["replica"], **fields}
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in told.items()) + "}").encode()


def fold(events: Iterable[Event | None]) -> RunState:
    state = RunState(2, 100)
    for event in events:
        if event is not None:
            state.apply(event)
    found = judge(Snapshot(state=state, now=state.last_event))
    json.dumps(as_data(state, found), allow_nan=False).encode()
    return state


structured = st.builds(
    line_of,
    st.sampled_from(sorted(REPLICA_KINDS)),
    st.dictionaries(st.sampled_from(sorted(SOUND)), st.sampled_from(HOSTILE), max_size=2).map(
        lambda hostile: {**{name: SOUND[name] for name in FIELDS}, **hostile}
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(structured, min_size=1, max_size=6))
def test_no_field_of_an_event_ends_the_monitor(lines: list[bytes]) -> None:
    launch = line_of("launch", {"attempt": "1", "host": '"w-1"'})
    fold(parse_replica_event(line) for line in [launch, *lines])


@pytest.mark.parametrize("name", sorted({*FIELDS, "t", "replica"}))
def test_each_field_is_bounded(name: str) -> None:
    """Of every hostile value and kind, one at a time."""
    sound = {field: SOUND[field] for field in FIELDS}
    taken = set()
    for kind in sorted(REPLICA_KINDS):
        assert parse_replica_event(line_of(kind, sound)) is not None
        for value in HOSTILE:
            event = parse_replica_event(line_of(kind, {**sound, name: value}))
            if event is not None:
                fold([event])
                taken.add(value)
    assert not taken & {"[[1]]", "{}", "9007199254740993", "9" * 5000, '"\\ud800"', '["\\udfff"]'}
    assert not taken & {"NaN", "1e999"} or name in ("loss", "local_loss", "grad_norm")


@pytest.mark.parametrize(
    "bad",
    [
        ("commit", {"step": '"abc"'}),
        ("commit", {"step": "null"}),
        ("commit", {"step": "true"}),
        ("commit", {"rank": "[]"}),
        ("launch", {"attempt": '"x"'}),
        ("launch", {"nodes": "5"}),
        ("commit", {"replica": "1e999"}),
        ("commit", {"t": "1" + "0" * 400}),
        ("metrics", {"loss": "1" + "0" * 400}),
        ("exit", {"code": "null"}),
        ("gpu", {"celsius": '"hot"'}),
        ("resize", {"replicas": "9007199254740991"}),
    ],
)
def test_a_bad_event_is_no_event(bad: tuple[str, dict[str, str]]) -> None:
    assert parse_replica_event(line_of(*bad)) is None


def test_a_loss_that_is_no_number_is_one() -> None:
    for value in ("NaN", "1e999", "1.5", "null"):
        event = parse_replica_event(line_of("metrics", {"loss": value, "grad_norm": value}))
        assert event is not None


def test_every_recorded_event_is_sound() -> None:
    for path in sorted(FIXTURES.glob("*/*.events.jsonl")):
        for line in path.read_bytes().splitlines():
            event = parse_replica_event(line)
            assert event is not None, line
            assert (event.line == line.decode()[:500]) is (event.kind in ("exit", "error"))


@st.composite
def hostile_lines(draw: st.DrawFn) -> str:
    """A sample of a pattern, some of whose words or numbers are others."""
    line = draw(st.sampled_from(SAMPLES))
    spans = [match.span() for match in re.finditer(r"\d+|[A-Za-z_]+|[^\w\s]", line)]
    chosen = draw(st.lists(st.sampled_from(spans), min_size=1, max_size=3, unique=True))
    for start, end in sorted(chosen, reverse=True):
        line = line[:start] + draw(st.sampled_from(TOKENS) | st.text(max_size=5)) + line[end:]
    return line


@settings(max_examples=300, deadline=None)
@given(st.lists(hostile_lines() | st.sampled_from(SAMPLES), min_size=1, max_size=6))
def test_no_line_of_a_log_ends_the_monitor(lines: list[str]) -> None:
    stamp = "2026-11-20T14:31:46.888 hello\n"
    log = (stamp + "\n".join(lines) + "\n").encode(errors="replace")
    for reader in (ReplicaLogReader("r", 1), LighthouseReader("l")):
        fold(reader.read(0, log))


@pytest.mark.parametrize(
    "line",
    [
        "[titan] 2026-11-20 14:31:46,890 - root - INFO - step: 36  loss: 6.0  tps: ,,,",
        "[titan] 2026-11-20 14:31:46,890 - root - INFO - step: 36  loss: -  tps: 600",
        f"[t_0:u/0 - step {'9' * 1000}] should_commit=True enough_replicas=True",
        f"exitcode  : {'9' * 1000} (pid: 1)",
        f"[2026-11-20 14:31:20] launching replica {'9' * 1000} (attempt 1) on w",
        f"[2026-11-20 14:31:20] launching replica 0 (attempt {'9' * 1000}) on w",
    ],
)
def test_a_number_that_is_none_makes_no_event(line: str) -> None:
    log = f"2026-11-20T14:31:46.888 hello\n{line}\n"
    assert list(ReplicaLogReader("r", 1).read(0, log.encode())) == []


def quorum(member: str) -> str:
    return (
        "2026-11-20T14:31:46.888 [INFO] [torchft::lighthouse] - Quorum! Quorum { quorum_id: 4, "
        f"participants: [{member}] }}\n"
    )


@pytest.mark.parametrize("step", ["9" * 5000, "x", "-"])
def test_a_quorum_of_which_no_member_is_understood_is_none(step: str) -> None:
    line = quorum(
        f'QuorumMember {{ replica_id: "t_0:u", address: "a", store_address: "b", step: {step} '
    )
    assert list(LighthouseReader("l").read(0, line.encode())) == []
    (event,) = LighthouseReader("l").read(0, quorum("").encode())
    assert event.get("members") == []


def findings(tmp_path: Any, text: str) -> list[str]:
    path = tmp_path / "lighthouse.log"
    path.write_text(text)
    with Watcher.of_files(path, []) as watcher:
        watcher.look(final=True)
        return [finding.kind for finding in watcher.findings()]


def test_a_lighthouses_log_that_is_not_understood_is_a_finding(tmp_path: Any) -> None:
    few = STRANGE_LINES - 1
    assert "log_not_understood" not in findings(tmp_path, "some other program says hello\n" * few)
    assert "log_not_understood" in findings(tmp_path, "some other program says hello\n" * (few + 1))
    strange = quorum("QuorumMember { id: 5 }") * (few + 1)
    assert "log_not_understood" in findings(tmp_path, strange)
    request = "2026-11-20T14:31:46.888 - Received quorum request for replica t_0:u\n"
    assert "log_not_understood" not in findings(tmp_path, request * (few + 1))


def test_torchfts_own_lines_are_not_strange() -> None:
    """A log of errors of a group that is well has nothing else."""
    line = b"2026-11-20T14:31:46.888 [INFO] [torchft::manager] - [Replica t_0] Start quorum for 0\n"
    reader = ReplicaLogReader("r", 0)
    assert list(reader.read(0, line * 600)) == []
    assert reader.lines == 0
    assert list(reader.read(0, b"hello\n" * 600)) == []
    assert reader.lines == 600


def test_long_lines_and_logs_without_a_time_cost_little() -> None:
    lines = [
        b"x" * 100_000 + b" Error",
        b"[" + b"1" * 100_000 + b" Error",
        b"step: 1 loss: 1 " * 6000,
    ]
    log = b"\n".join(lines * 5) + b"\n" + b"RuntimeError: x\n" * 20_000
    started = time.perf_counter()
    assert list(ReplicaLogReader("r", 1).read(0, log)) == []
    assert list(LighthouseReader("l").read(0, log + quorum("1" * 100_000).encode())) != []
    assert time.perf_counter() - started < 5
