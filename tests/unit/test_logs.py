"""Readers of logs: every pattern on its sample; any cut, any bytes, the same incidents."""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.events import Event, ReplicaLogReader
from launcher.incidents import Cause, sign_of
from launcher.lighthouse_log import UTC_MARK, LighthouseReader
from launcher.patterns import PATTERNS
from launcher.snapshot import as_data
from launcher.watcher import Watcher
from tests.conftest import FIXTURES

SCENES = sorted(path for path in FIXTURES.iterdir() if path.is_dir())


@pytest.mark.parametrize("kind", ["commit", "metrics", "launch", "slurm_cancelled"])
def test_the_time_is_the_lines_own(kind: str) -> None:
    sample = next(pattern.samples[0].line for pattern in PATTERNS if pattern.kind == kind)
    (event,) = ReplicaLogReader("sample", replica=0).read(0, f"{sample}\n".encode())
    assert 1795181000 < event.t < 1795187000


def test_a_step_that_is_cancelled_without_a_reason_is_no_sign() -> None:
    """Slurm 22.05.8 prints it when the srun of a group of several nodes is killed by its own launcher."""
    step = "slurmstepd-worker-2: error: *** STEP 5280600.3 ON worker-2 CANCELLED AT 2026-11-21T17:07:08"
    ends = {" ***": [], " DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***": ["NODE FAILURE"]}
    for end, due in ends.items():
        found = ReplicaLogReader("sample", replica=1).read(0, f"{step}{end}\n".encode())
        assert [event.get("due") for event in found] == due


def test_a_line_without_a_time_happened_with_the_one_before() -> None:
    text = (
        b"[rank0]:[titan] 2026-11-20 14:31:46,888 - root - INFO - hello\n"
        b"[rank0]:Traceback (most recent call last):\n"
        b"[rank0]:torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n"
    )
    (event,) = ReplicaLogReader("x", 0).read(100, text)
    assert (event.kind, event.t) == ("out_of_memory", 1795185106.888)
    assert event.source is not None
    assert text[event.source.offset - 100 :].startswith(b"[rank0]:torch.OutOfMemoryError")


def test_lines_before_any_time_happened_before_the_first_one() -> None:
    """As in a log of errors that is quiet until its end; never at the start of 1970."""
    text = (
        b"[rank0]:Traceback (most recent call last):\n"
        b"[rank0]:[rank0]: RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory\n"
        b"  exitcode  : 1 (pid: 7144)\n"
        b"[2026-11-20 14:31:46] replica 1 (attempt 1) on worker-1 failed: rank 0 exited\n"
        b"MemoryError\n"
    )
    whole = list(ReplicaLogReader("x", 1).read(0, text))
    assert [event.kind for event in whole] == [
        "out_of_memory",
        "rank_failed",
        "exit",
        "out_of_memory",
    ]
    assert {event.t for event in whole} == {1795185106.0}
    assert whole[0].get("text").startswith("RuntimeError: ")
    reader, offset, found = ReplicaLogReader("x", 1), 0, []
    for line in text.splitlines(keepends=True):
        found += list(reader.read(offset, line))
        offset += len(line)
    assert found == whole
    assert list(ReplicaLogReader("x", 1).read(0, b"MemoryError\n")) == []


@pytest.mark.parametrize(
    "reason",
    [
        "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "MemoryError",
        "std::bad_alloc",
    ],
)
def test_a_reason_that_speaks_of_memory_is_no_plain_crash(reason: str) -> None:
    reason = f"rank 0 (pid 9) exited with code 1: {reason}"
    event = Event(t=1.0, kind="exit", replica=0, fields={"code": 1, "reason": reason})
    sign = sign_of(event)
    assert sign is not None
    assert (sign.cause, sign.text) == (Cause.OUT_OF_MEMORY, reason)


def lighthouse_events(blocks: list[bytes]) -> list[Event]:
    reader, offset, found = LighthouseReader("l"), 0, []
    for block in blocks:
        found += list(reader.read(offset, block))
        offset += len(block)
    return found


def changes(events: list[Event]) -> list[Event]:
    """What is said once: not the steps that each quorum names."""
    return [event for event in events if event.kind != "steps"]


def cut(data: bytes, chances: random.Random) -> list[bytes]:
    """``data`` in random runs of whole lines, as a tail delivers it."""
    blocks, current = [], b""
    for line in data.splitlines(keepends=True):
        current += line
        if chances.random() < 0.05:
            blocks.append(current)
            current = b""
    return [*blocks, current] if current else blocks


@pytest.mark.parametrize("scene", SCENES, ids=lambda path: path.name)
def test_however_the_lighthouse_log_is_cut_it_says_the_same(scene: Path) -> None:
    data = (scene / "lighthouse.log").read_bytes()
    whole = lighthouse_events([data])
    assert [e.get("quorum_id") for e in whole if e.kind == "membership"]
    for seed in range(8):
        assert lighthouse_events(cut(data, random.Random(seed))) == whole
    assert lighthouse_events(data.splitlines(keepends=True)) == whole


def test_lines_of_older_versions_too() -> None:
    """Without reconfigure_handles, as torchft wrote them in 2025."""
    line = (
        b"2025-07-16T13:51:42.123 [INFO] [torchft::lighthouse] - Quorum! Quorum { quorum_id: 4, "
        b'participants: [QuorumMember { replica_id: "torchtitan_ft_1:3f-a", address: "http://w-1:1", '
        b'store_address: "w-1:2", step: 302, world_size: 8, shrink_only: false, commit_failures: 0, '
        b'data: "" }], created: Some(Timestamp { seconds: 1752673902, nanos: 1 }) }\n'
    )
    (event,) = changes(lighthouse_events([line]))
    assert event.t == pytest.approx(1752673902.123)
    assert event.get("members") == [(1, "3f-a", 302, "http://w-1:1")]


def test_a_log_in_utc_is_understood_in_any_time_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (FIXTURES / "node-down" / "lighthouse.log").read_bytes()
    here = lighthouse_events([data])
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    assert [e.t for e in lighthouse_events([UTC_MARK + data])] == [e.t for e in here]
    assert [e.t for e in lighthouse_events([data])] != [e.t for e in here]


def test_a_restarted_lighthouse_counts_from_one_again() -> None:
    scene = (FIXTURES / "node-down" / "lighthouse.log").read_bytes()
    listening = b"2026-11-20T15:00:00.000 [INFO] [torchft::lighthouse] - Lighthouse listening on: http://x:1\n"
    quorum = next(line for line in scene.splitlines(keepends=True) if b"Quorum! " in line)
    for blocks in ([quorum, listening + quorum, quorum], [quorum, listening, quorum, quorum]):
        kinds = [event.kind for event in changes(lighthouse_events(blocks))]
        assert kinds == ["membership", "listening", "membership"]


@settings(max_examples=80, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3))
def test_any_bytes_among_real_lines_give_no_crash(noise: bytes, position: int) -> None:
    scene = FIXTURES / "node-down"
    for path in (scene / "lighthouse.log", scene / "tft-5183502_1.events.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)[:40]
        lines.insert(position * 10, noise + b"\n")
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, path.name)
            copy.write_bytes(b"".join(lines))
            is_lighthouse = path.suffix == ".log"
            watcher = Watcher.of_files(
                copy if is_lighthouse else None, [] if is_lighthouse else [copy]
            )
            with watcher:
                watcher.look(final=True)
                as_data(watcher.state, watcher.findings())


def replica_logs(scene: Path) -> list[Path]:
    """Structured events, and the text logs beside them where they were kept."""
    return sorted(path for path in scene.iterdir() if path.name.startswith("tft-"))


@pytest.mark.parametrize("scene", SCENES, ids=lambda path: path.name)
def test_each_recorded_failure_is_understood(scene: Path) -> None:
    """What really happened in the scene is in ``expected.json``, written by hand."""
    expected = json.loads((scene / "expected.json").read_text())
    with Watcher.of_files(scene / "lighthouse.log", replica_logs(scene)) as watcher:
        watcher.look(final=True)
        data = as_data(watcher.state, watcher.findings(watcher.state.last_event))
    assert len(data["incidents"]) == len(expected)
    for incident, told in zip(data["incidents"], expected, strict=True):
        assert incident["replica"] == told["replica"]
        assert incident["cause"].startswith(told["cause"])
        assert (incident["recovered_at"] is not None) is told["recovered"]
        assert incident["steps_lost"] == told["steps_lost"]
    assert {replica["state"] for replica in data["replicas"]} == {"DONE"}
    assert not watcher.state.weights.differences
    assert watcher.state.weights.compared > 20


@pytest.mark.parametrize(
    "scene", [path for path in SCENES if list(path.glob("*.out"))], ids=lambda path: path.name
)
def test_text_logs_alone_tell_the_same_incidents(scene: Path) -> None:
    """As of a run whose groups write no structured events: anybody's."""
    texts = [path for path in replica_logs(scene) if path.suffix in (".out", ".err")]
    expected = json.loads((scene / "expected.json").read_text())
    with Watcher.of_files(scene / "lighthouse.log", texts) as watcher:
        watcher.look(final=True)
        incidents = as_data(watcher.state, [])["incidents"]
    got = [(i["replica"], i["recovered_at"] is not None, i["steps_lost"]) for i in incidents]
    assert got == [(e["replica"], e["recovered"], e["steps_lost"]) for e in expected]
    for incident, told in zip(incidents, expected, strict=True):
        assert incident["cause"].startswith(told["cause"].partition(":")[0])
