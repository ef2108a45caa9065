"""The vocabulary of the text logs: every sample of every pattern, and what comes of it."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from typing import Any

import pytest

from launcher.events import Clock, Event, ReplicaLogReader
from launcher.incidents import _DUE, Cause, Incident, sign_of
from launcher.lighthouse_log import LIGHTHOUSE_PATTERNS, LighthouseReader
from launcher.names import Names
from launcher.patterns import PATTERNS
from launcher.state import RunState

BEFORE = "[titan] 2026-11-20 14:31:46,888 - root - INFO - hello\n"
UUIDS = [f"{digit * 8}-e2be-4c27-bd4e-f3442c74af1d" for digit in "abcd"]
BY_PYTHON = {"uuid": "99-c", "rank": 0, "step": 10}
OOM, CRASH = Cause.OUT_OF_MEMORY, Cause.CRASH

#: Of each pattern's samples, in their order: group, fields (of ``text`` its beginning), and cause.
EXPECTED: dict[str, list[tuple[int | None, dict[str, Any], Cause | None]]] = {
    "commit": [
        (0, {**BY_PYTHON, "committed": False}, None),
        (0, {**BY_PYTHON, "committed": True}, None),
        (None, {"uuid": "93cb4be4-a05f-4e59-a477-7a4dead2f25a", "step": 46}, None),
        (1, {"uuid": "e2bec276-13c7-484c-bd4e-f3442c74af1d", "step": 4}, None),
    ],
    "metrics": [
        (7, {"titan_step": 36, "loss": 6.04175, "tokens_per_second": 1609.0}, None),
        (7, {"titan_step": 37, "loss": math.nan, "tokens_per_second": 609.0}, None),
    ],
    "end": [(7, {"code": 0}, None)],
    "launch": [(0, {"attempt": 1, "host": "worker-0"}, None)],
    "exit": [
        (1, {"attempt": 1, "code": 1, "reason": "stopped by SIGTERM"}, Cause.UNKNOWN),
        (1, {"code": 1, "reason": "rank 0 (pid 12671) was killed by SIGKILL"}, CRASH),
        (0, {"code": 0, "reason": "finished", "host": "worker-0"}, None),
    ],
    "quorum": [(0, {**BY_PYTHON, "quorum_id": 2}, None)],
    "healing": [
        (0, {**BY_PYTHON, "max_step": 34}, None),
        (1, {"step": 0, "max_step": 164}, None),
        (7, {"step": 0, "max_step": 164}, None),
    ],
    "healed": [(0, BY_PYTHON, None)],
    "slurm_cancelled": [
        (7, {"host": "worker-1", "due": "NODE FAILURE"}, Cause.NODE_DOWN),
        (7, {"due": "JOB REQUEUE"}, Cause.REQUEUED),
        (7, {"due": "PREEMPTION"}, Cause.PREEMPTED),
        (7, {"due": "TIME LIMIT"}, Cause.TIME_LIMIT),
        (7, {"host": "worker-1"}, Cause.CANCELLED),
        (7, {"host": "worker-1"}, Cause.CANCELLED),
        (7, {"host": "worker-2", "due": "TIME LIMIT"}, Cause.TIME_LIMIT),
        (7, {"host": "gpu-0", "due": "JOB REQUEUE"}, Cause.REQUEUED),
    ],
    "node_failed": [(7, {"host": "worker-1"}, Cause.NODE_DOWN)],
    "kill_request": [
        (7, {"text": "killed from dashboard"}, Cause.KILL_REQUEST),
        (1, {"text": "killed from dashboard"}, Cause.KILL_REQUEST),
    ],
    "heartbeat_failed": [(1, {"text": "status: Unavailable"}, None)],
    "quorum_failed": [
        (1, {"text": "status: Unavailable"}, None),
        (1, {"text": "timeout. error: status: Cancelled"}, None),
    ],
    "out_of_memory": [
        (7, {"text": text}, OOM)
        for text in (
            "torch.OutOfMemoryError: CUDA out of memory.",
            "RuntimeError: CUDA out of memory.",
            "RuntimeError: CUDA error: out of memory",
            "slurmstepd: error: Detected 1 oom-kill",
            "slurmstepd: error: Detected 1 oom_kill",
            "srun: error: worker-1: task 0: Out Of Memory",
            "[1.2] Out of memory: Killed",
            "OSError: [Errno 12] Cannot allocate memory",
            "RuntimeError: [enforce fail",
            "MemoryError",
            "what():  std::bad_alloc",
            "slurmstepd: error: StepId=7.batch exceeded memory limit",
        )
    ],
    "device_error": [
        (7, {"text": "[ 1234.5] NVRM: Xid (PCI:0000:3b:00): 79", "xid": 79}, CRASH),
        (7, {"text": "RuntimeError: CUDA error: an illegal"}, CRASH),
        (7, {"text": "RuntimeError: CUDA: uncorrectable ECC"}, CRASH),
        (7, {"text": "NVRM: GPU 0000:01:00.0: GPU has fallen off"}, CRASH),
        (7, {"text": "slurmstepd: error: *** JOB 7 ON worker-1 UNCORR"}, CRASH),
    ],
    "nccl_error": [
        (7, {"text": "torch.distributed.DistBackendError: NCCL error in"}, CRASH),
        (7, {"text": "[E1121 23:17:50.1 Process", "rank": 3}, CRASH),
        (7, {"text": "w-1:17:99 [0] net.cc:537 NCCL WARN Connect"}, CRASH),
        (7, {"text": "ncclSystemError"}, CRASH),
        (7, {"text": "ncclInternalError"}, CRASH),
        (7, {"text": "ncclRemoteError"}, CRASH),
        (7, {"text": "ncclUnhandledCudaError"}, CRASH),
    ],
    "rank_failed": [
        (7, {"exit_code": -9, "pid": 7144}, CRASH),
        (7, {"exit_code": -9, "pid": 12671, "rank": 3}, CRASH),
        (7, {"pid": 12671, "text": "Signal 9 (SIGKILL) received by PID 12671"}, CRASH),
    ],
    "task_failed": [
        (7, {"host": "worker-1", "task": "3", "text": "Killed"}, CRASH),
        (7, {"host": "worker-1", "task": "0-3", "text": "Exited with exit code 1"}, CRASH),
    ],
    "fatal": [
        (7, {"text": text}, CRASH)
        for text in (
            "Fatal Python error: Segmentation fault",
            "terminate called after throwing an instance of 'c10::Error'",
            "Segmentation fault (core dumped)",
            "Bus error",
            "Aborted (core dumped)",
            "Illegal instruction",
        )
    ],
    "exception": [
        (7, {"text": "RuntimeError: [pair.cc:537] Read error"}, CRASH),
        (7, {"text": "AssertionError"}, CRASH),
        (7, {"text": "torch.distributed.elastic.multiprocessing.api.SignalException"}, CRASH),
        (7, {"text": "KeyboardInterrupt"}, CRASH),
    ],
}


def samples() -> list[Any]:
    found = []
    for kind, expected in EXPECTED.items():
        lines = [sample.line for p in PATTERNS if p.kind == kind for sample in p.samples]
        for number, (line, told) in enumerate(zip(lines, expected, strict=True)):
            found.append(pytest.param(kind, line, told, id=f"{kind}-{number}"))
    return found


def read(text: str, replica: int | None = 7, names: Names | None = None) -> list[Event]:
    return list(ReplicaLogReader("log", replica, names).read(0, (BEFORE + text + "\n").encode()))


def but_steps(events: Iterable[Event]) -> list[Event]:
    """Without what a quorum's line tells besides."""
    return [event for event in events if event.kind != "steps"]


def test_every_pattern_has_its_expectations() -> None:
    assert {pattern.kind for pattern in PATTERNS} == set(EXPECTED)
    for pattern in PATTERNS + LIGHTHOUSE_PATTERNS:
        assert pattern.samples
        assert all(sample.seen for sample in pattern.samples)


@pytest.mark.parametrize("before", ["", "[rank3]:", "3: ", " 3: [default3]:[rank3]: ", "\x1b[31m"])
@pytest.mark.parametrize(("kind", "line", "told"), samples())
def test_a_sample_says_just_this(kind: str, line: str, told: Any, before: str) -> None:
    replica, fields, cause = told
    (event,) = read(f"{before}{line}\r")
    assert (event.kind, event.replica) == (kind, replica)
    for name, value in fields.items():
        got = event.get(name)
        if name == "text":
            assert got.startswith(value)
        else:
            assert got == value or (got != got and value != value), name
    sign = sign_of(event)
    assert (sign and sign.cause) == cause
    if sign is not None:
        assert sign.line == f"{before}{line}", "as it was read"


@pytest.mark.parametrize("pattern", LIGHTHOUSE_PATTERNS, ids=lambda pattern: pattern.kind)
@pytest.mark.parametrize("before", ["", "0: ", "\x1b[2m"])
def test_the_lighthouse_reader_finds_what_its_patterns_find(pattern: Any, before: str) -> None:
    for sample in pattern.samples:
        match = re.search(pattern.regex, sample.line)
        assert match is not None
        reader = LighthouseReader("l")
        found = but_steps(reader.read(0, f"{before}{sample.line}\r\n".encode()))
        if pattern.kind == "request":
            assert (reader.waiting.requested, found) == ({1}, [])
        elif pattern.kind == "status":
            assert (reader.waiting.status, found) == (match["text"], [])
        else:
            told = [event.kind for event in found if event.kind != "membership"] or ["membership"]
            # (Failed commits are told with the quorum that they lead to.)
            assert told == [pattern.kind] or pattern.kind == "commit_failed"
        if pattern.kind == "membership":
            assert found[0].get("quorum_id") == int(match["quorum_id"])
            assert found[0].get("members") == [(1, "3f-a", 302, match["address"])]


def test_failed_commits_are_told_before_the_quorum_they_lead_to() -> None:
    by_kind = {pattern.kind: pattern.samples[0].line for pattern in LIGHTHOUSE_PATTERNS}
    log = f"{by_kind['commit_failed']}\n{by_kind['membership']}\n".encode()
    first, second = but_steps(LighthouseReader("l").read(0, log))
    assert (first.kind, first.get("ids")) == ("commit_failed", ["torchtitan_ft_1:3f-a"])
    assert second.kind == "membership"


def test_the_newest_status_says_how_many_heartbeats_came() -> None:
    reader = LighthouseReader("l")
    status = (
        "2026-11-20T14:31:46.888 - Quorum status: x [1/2 participants healthy][{} heartbeating]\n"
    )
    assert list(reader.read(0, (status.format(3) + status.format(2)).encode())) == []
    assert reader.waiting.heartbeating == 2
    assert list(reader.read(0, b"2026-11-20T14:31:46.888 - Quorum status: x\n")) == []
    assert reader.waiting.heartbeating is None


@pytest.mark.parametrize(("due", "cause"), list(_DUE.items()))
def test_what_slurm_says_it_was_due_to_is_the_cause(due: str, cause: Cause) -> None:
    line = (
        f"slurmstepd: error: *** STEP 7.0 ON w-1 CANCELLED AT 2026-11-20T14:31:46 DUE TO {due} ***"
    )
    (event,) = read(line)
    sign = sign_of(event)
    assert sign is not None
    assert sign.cause is cause


@pytest.mark.parametrize(
    "line",
    [
        "[titan] 2026-11-20 14:31:47,000 - root - INFO - NCCL error handling: watchdog on",
        "[titan] 2026-11-20 14:31:47,000 - root - INFO - uncorrectable ECC counters: none",
        "[titan] 2026-11-20 14:31:47,000 - root - INFO - a snapshot is taken on Out Of Memory",
        "[titan] 2026-11-20 14:31:47,000 - root - INFO - got kill request: handler installed",
        "w-1:17:99 [0] NCCL INFO ncclSystemError is retried",
        "srun: error: worker-1: task 3: Terminated",
        "Finished",
    ],
)
def test_a_line_that_only_speaks_of_it_is_none(line: str) -> None:
    assert read(line) == []


def test_what_a_traceback_ends_with_was_raised_whatever_it_is_called() -> None:
    log = (
        "[rank0]:Traceback (most recent call last):\n"
        '[rank0]:  File "t.py", line 3, in <module>\n'
        "[rank1]:Finished\n"
        '[rank0]:    raise torch.OutOfMemoryError("CUDA out of memory")\n'
        "[rank0]:botocore.exceptions.ClientTimeout: no answer\n"
        "[rank0]:StopIteration"
    )
    (event,) = read(log)
    assert (event.kind, event.get("text")) == (
        "exception",
        "botocore.exceptions.ClientTimeout: no answer",
    )
    reader, offset, found = ReplicaLogReader("log", 7), 0, []
    for line in (BEFORE + log + "\n").encode().splitlines(keepends=True):
        found += list(reader.read(offset, line))
        offset += len(line)
    assert found == [event], "however it is cut"


def summary(root: int) -> str:
    return (
        "Failures:\n[0]:\n  rank      : 0 (local_rank: 0)\n  exitcode  : 1 (pid: 7143) \n"
        f"Root Cause (first observed failure):\n[1]:\n  rank      : {root} (local_rank: {root})\n"
        "  exitcode  : 1 (pid: 7144) \n  traceback : Traceback (most recent call last):\n"
        "    RuntimeError: indented, and told before\n====\n"
    )


def crash(log: str) -> str:
    incident = Incident(replica=7, first_sign=2e9)
    incident.explain([sign for event in read(log) if (sign := sign_of(event)) is not None])
    return incident.why


LATER = "[rank0]:RuntimeError: NCCL error: unhandled system error\n"


def test_a_crash_is_told_by_the_first_error_and_not_by_what_follows_from_it() -> None:
    ends = (
        "[2026-11-20 14:31:50] replica 7 (attempt 1) on w failed: rank 0 (pid 9) exited with code 1: "
        "NCCL error"
    )
    log = f"w NCCL WARN x\n[rank1]:ValueError: x\n{LATER}{ends}"
    assert crash(log) == "process crash: ValueError: x"
    assert crash(log + "\nRuntimeError: CUDA error: y") == "process crash: ValueError: x"
    assert crash(ends).startswith("process crash: rank 0 (pid 9) exited with code 1: NCCL")
    told = ends.replace("NCCL error", "ValueError: x")
    assert "rank 0 (pid 9) exited with code 1: ValueError: x" in crash(f"ValueError: x\n{told}")
    assert crash(f"ValueError: x\n{LATER}MemoryError") == "out of memory: MemoryError"


def test_of_a_rank_that_was_killed_the_others_errors_are_consequences() -> None:
    peer = "[rank0]:RuntimeError: [pair.cc:537] Read error: Connection reset by peer\n"
    for why in ("rank 1 (pid 9) on w was killed by SIGKILL", "rank 1 exited with code -11"):
        ends = f"[2026-11-20 14:31:50] replica 7 (attempt 1) on w failed: {why}"
        assert crash(peer + ends) == f"process crash: {why}"
    killed = "Failures:\nRoot Cause (first observed failure):\n  rank      : 1 (local_rank: 1)\n"
    assert crash(peer + killed + "  exitcode  : -9 (pid: 7144)\n").endswith("exited with code -9")


def test_torchrun_names_the_rank_whose_error_counts() -> None:
    errors = "[rank0]:ValueError: zero\n[rank3]:KeyError: 'three'\n"
    child = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    assert crash(errors + child + summary(3)) == "process crash: KeyError: 'three'"
    assert crash(errors + child + summary(0)) == "process crash: ValueError: zero"
    assert crash(errors + child + summary(5)) == "process crash: ValueError: zero"
    assert crash(child + summary(3)) == "process crash: rank 0 exited with code 1"
    found = [event for event in read(summary(3)) if event.get("root")]
    assert [event.get("rank") for event in found] == [3]


def test_a_heavy_sign_is_kept_however_many_there_were() -> None:
    errors = "".join(f"ValueError: {number}\n" for number in range(60))
    assert crash(errors + "srun: error: Node failure on w") == "node down"
    assert crash(errors) == "process crash: ValueError: 0"


def test_a_task_that_srun_was_told_to_kill_is_no_crash() -> None:
    ends = "[2026-11-20 14:31:50] replica 7 (attempt 1) on w was stopped by SIGTERM"
    assert crash(f"srun: error: w: task 0: Killed\n{ends}") == "unknown: stopped by SIGTERM"
    assert crash("srun: error: w: task 0: Killed") == "process crash: task 0 on w: Killed"


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        ("2025-02-01T12:00:00Z", 1738411200.0),
        ("2025-02-01T12:00:00.250+00:00", 1738411200.25),
        ("[2025-02-01T12:00:00Z INFO torchft::lighthouse] x", 1738411200.0),
        ("2025-02-01 12:00:00,500+0130", 1738405800.5),
        ("2025-02-01T12:00:00.123456-05:00", 1738429200.123),
        ("2025-02-01 12:00:00,500 - root", 1738393200.5),
        ("0001-01-01T00:00:00Z", None),
        ("9999-12-31T23:59:59", None),
        ("2025-13-01T12:00:00", None),
    ],
)
def test_a_stamp_may_name_its_zone(
    monkeypatch: pytest.MonkeyPatch, stamp: str, expected: float | None
) -> None:
    monkeypatch.setenv("TZ", "Etc/GMT-5")  # five hours ahead
    time.tzset()
    clock = Clock()
    assert clock.seconds("2025-02-01T12:00:00") == 1738393200.0
    assert clock.seconds(stamp) == expected
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        (f"torchtitan_ft_0:{UUIDS[0]}", 0),
        (f"train_ddp_12:{UUIDS[0]}", 12),
        (f"3:{UUIDS[0]}", 3),
        (f"my-run_12:{UUIDS[0]}", 12),
        (f"llama-3.1-8b-r1:{UUIDS[0]}", 1),
        (f"exp/run_4:{UUIDS[0]}", 4),
        ("my_model_12", 12),
        (f"torchtitan_ft_0{UUIDS[0]}", 0),
        (f"torchtitan_ft_{'9' * 5000}", 0),
        ("raise:0", None),
        ("", None),
    ],
)
def test_the_number_in_an_id(full: str, expected: int | None) -> None:
    assert Names().of_quorum([full]) == [expected]


@pytest.mark.parametrize("name", ["{}", "my_model:{}", "job_2025111900:{}"])
def test_groups_without_a_number_are_numbered_as_quorums_name_them(name: str) -> None:
    a, b, c, d = (name.format(uuid) for uuid in UUIDS)
    names = Names()
    assert names.known(b) is None
    assert names.of_quorum([b, a]) == [0, 1]
    assert names.of_quorum([a]) == [1]
    assert names.of_quorum([a, c]) == [1, 0], "a new copy has the place of the one that is away"
    assert names.of_quorum([a, c, d]) == [1, 0, 2]
    assert (names.known(a), names.known(c)) == (1, 0)


def test_names_with_one_number_are_told_apart() -> None:
    names = Names()
    zero, one = (f"r{number}-h100:{UUIDS[number]}" for number in (0, 1))
    assert names.of_quorum([zero, one]) == [0, 1]
    assert names.of_quorum([f"r1-h100:{UUIDS[2]}"]) == [1]
    assert names.known("r1-h100") == 1


def test_a_text_log_knows_its_group_from_the_lighthouses() -> None:
    member = 'QuorumMember {{ replica_id: "{}", address: "x", store_address: "x", step: 3 }}'
    quorum = ", ".join(member.format(uuid) for uuid in UUIDS[:2])
    log = f"2026-11-20T14:31:46.888 Quorum! Quorum {{ quorum_id: 4, participants: [{quorum}] }}\n"
    names, state = Names(), RunState(0)
    for event in but_steps(LighthouseReader("l", names).read(0, log.encode())):
        state.apply(event)
    line = f"[{UUIDS[1]}/0 - step 9] should_commit=True enough_replicas=True"
    for event in read(line, 5, names):
        state.apply(event)
    assert (state.groups[1].step, state.groups[0].commits) == (10, 0)
    assert [event.replica for event in read(line, 5)] == [None], "of no group while it is not known"
