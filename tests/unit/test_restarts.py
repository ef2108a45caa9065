"""What comes after an attempt that failed: in place, elsewhere, or never; and the timeouts."""

from __future__ import annotations

import pytest

from launcher import restarts, timeouts
from launcher.restarts import UNFIT, Ending, Limits, Next, decide


def end(t: float, reason: str = "rank 0 (pid 7) was killed by SIGKILL", *, trained: bool = True,
        host: str = "w0") -> Ending:  # fmt: skip
    return Ending(t=t, host=host, reason=reason, trained=trained)


def test_a_crash_is_mended_in_place_and_the_budget_refills() -> None:
    endings = []
    for t in (0.0, 10.0, 20.0):
        endings.append(end(t))
        decision = decide(endings, Limits(), t)
        assert (decision.next, decision.pause) == (Next.HERE, 0.0), "it makes progress"
    endings.append(end(30.0))
    assert decide(endings, Limits(), 30.0).next is Next.ELSEWHERE
    endings.append(end(30.0 + restarts.HERE_WINDOW))
    assert decide(endings, Limits(), 30.0 + restarts.HERE_WINDOW).next is Next.HERE


def test_pauses_grow_while_there_is_no_progress() -> None:
    endings = [end(float(t), trained=False) for t in range(5)]
    pauses = [decide(endings[:n], Limits(here=9), 5.0).pause for n in range(1, 6)]
    assert pauses == [2.0, 10.0, 30.0, 30.0, 30.0]
    assert decide([*endings, end(5.0)], Limits(here=9), 5.0).pause == 0.0


def test_many_moves_without_a_step_are_the_end() -> None:
    limits = Limits(here=0, elsewhere=10)
    endings = [end(float(t), host=f"w{t}", trained=False) for t in range(12)]
    assert decide(endings[:10], limits, 10.0).next is Next.ELSEWHERE
    last = decide(endings, limits, 12.0)
    assert last.next is Next.NEVER
    assert "TFT_REQUEUES" in last.why
    # A run that makes progress is never given up, however often it fails.
    assert decide([*endings, end(13.0, host="x")], limits, 13.0).next is Next.ELSEWHERE


def test_the_same_error_twice_before_the_first_step_is_a_mistake() -> None:
    mistake = "rank {} (pid {}) exited with code 1: KeyError: 'dataset'"
    one = end(0.0, mistake.format(0, 100), trained=False)
    other = end(9.0, mistake.format(1, 222), trained=False)
    assert decide([one], Limits(), 0.0).next is Next.HERE
    assert decide([one, other], Limits(), 9.0).next is Next.NEVER
    different = end(9.0, "rank 0 (pid 5) exited with code 1: ValueError: x", trained=False)
    assert decide([one, different], Limits(), 9.0).next is Next.HERE
    assert decide([one, end(9.0, one.reason, trained=True)], Limits(), 9.0).next is Next.HERE


@pytest.mark.parametrize(
    "reason",
    [
        "rank 0 (pid 7) was killed by SIGKILL",
        "w1 has ended its part without a word",
        "w0 has not started its part within 60 s",
        "srun ended with code -9",
        "rank 1 (pid 7) exited with code 1: RuntimeError: Connection reset by peer",
        "rank 1 (pid 7) exited with code 1: RuntimeError: status: DeadlineExceeded, Timeout expired",
        "hung: did not join the quorum that others waited 9 s for",
    ],
)
def test_what_may_pass_is_no_mistake(reason: str) -> None:
    endings = [end(t, reason, trained=False) for t in (0.0, 5.0)]
    assert decide(endings, Limits(), 5.0).next is Next.HERE


def test_a_device_that_fails_twice_is_left() -> None:
    reason = "rank 3 (pid 7) exited with code 1: RuntimeError: CUDA error: an illegal memory access"
    endings = [end(0.0, reason), end(60.0, reason)]
    assert decide(endings[:1], Limits(), 0.0).next is Next.HERE
    assert decide(endings, Limits(), 60.0).next is Next.ELSEWHERE


def test_an_unfit_node_is_left_at_once_and_switches_are_heeded() -> None:
    unfit = [end(0.0, f"{UNFIT}7 GPUs are seen, and 8 are needed", trained=False)]
    assert decide(unfit, Limits(), 0.0).next is Next.ELSEWHERE
    storm = [end(float(t), unfit[0].reason, trained=False) for t in range(11)]
    pauses = [decide(storm[:n], Limits(), 11.0).pause for n in range(1, 6)]
    assert pauses == [0.0, 2.0, 10.0, 30.0, 30.0]
    assert decide(storm, Limits(), 11.0).next is Next.NEVER, "or the check itself is wrong"
    assert decide([end(0.0)], Limits(here=0), 0.0).next is Next.ELSEWHERE
    assert decide([end(0.0)], Limits(here=0, elsewhere=0), 0.0).next is Next.NEVER


def test_the_order_of_timeouts_is_checked() -> None:
    good = {
        "process_group_timeout_ms": 30_000,
        "train_timeout_seconds": 100,
        "init_timeout_seconds": 300,
    }
    assert not list(timeouts.problems(good, 600))
    (problem,) = timeouts.problems(good | {"process_group_timeout_ms": 100_000}, 600)
    assert "process_group_timeout_ms (100 s) must be shorter than train_timeout_seconds" in problem
    (problem,) = timeouts.problems(good, 38)
    assert "must be longer than" in problem
    assert not list(timeouts.problems(dict.fromkeys(good), 600))
