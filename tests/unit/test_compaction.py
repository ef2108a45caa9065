"""What is kept of a lighthouse's logs."""

from __future__ import annotations

from launcher.compaction import Compaction, ended, first_line, number_of
from launcher.lighthouse_log import UTC_MARK, LighthouseReader
from tests.unit.lighthouse_lines import asked, blocked, line, quorum, said


def test_where_nobody_can_meet_it_does_not_grow_either() -> None:
    whole = [quorum(0, 1, 2), asked(1, 0)]
    for second in range(2, 3000):
        whole += [blocked(second, second % 2), asked(second, second % 3)]
        whole += [line(second, "Lighthouse listening on: http://x:1")] * (second == 1500)
    whole.append(asked(3001, 1))
    kept = bytearray()
    compaction = Compaction(kept.extend, whole_bytes=2000)
    for text in whole:
        compaction.feed(text)
    compaction.finish()
    assert len(kept) < 5000
    for after in (b"", asked(3002, 1) + quorum(3003, 2, 2)):
        first, again = LighthouseReader("l"), LighthouseReader("l")
        expected = [(e.t, e.kind, e.fields) for e in first.read(0, b"".join(whole) + after)]
        got = [(e.t, e.kind, e.fields) for e in again.read(0, bytes(kept) + after)]
        assert (got, again.waiting) == (expected, first.waiting)


def test_the_last_line_before_a_restart_stays() -> None:
    whole = b"".join(quorum(second, 1, 2) for second in range(4))
    whole += line(100, "Lighthouse listening on: http://x:1") + quorum(101, 2, 2)
    kept = bytearray()
    compaction = Compaction(kept.extend)
    for text in whole.splitlines(keepends=True):
        compaction.feed(text)
    compaction.finish()
    assert said(bytes(kept)) == said(whole)
    assert kept.count(b"Quorum!") == 3


def test_only_whole_first_lines_say_a_number() -> None:
    whole = first_line(123)
    assert [number_of(whole[:n]) for n in range(len(whole))] == [None] * len(whole)
    assert number_of(whole + b"x\n") == 123
    assert [number_of(s) for s in (UTC_MARK, b"2026", b"\n", ended(3), b"\xff" * 300)] == [0] * 5
    reader = LighthouseReader("l")
    at = quorum(0, 1, 1)
    assert [e.t for e in reader.read(0, whole + at)][:1] == [said(UTC_MARK + at)[0][0]]
