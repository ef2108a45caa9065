"""A lighthouse's log that is set aside, at any size and at any moment: nothing is lost or doubled."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import capped_log, tail
from launcher.capped_log import CappedLog, full_of, older_of, open_log, recover, set_aside
from launcher.compaction import Compaction, first_line
from launcher.lighthouse_log import UTC_MARK, LighthouseReader
from launcher.rundir import Outputs
from launcher.snapshot import as_data
from launcher.watcher import Watcher
from tests.conftest import FIXTURES
from tests.unit.lighthouse_lines import Monitor, append, asked, at, blocked, line, quorum, said

SCENES = sorted(path for path in FIXTURES.iterdir() if (path / "lighthouse.log").exists())


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of logs are set aside here: none needs to survive the machine's end."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@settings(max_examples=12, deadline=None)
@given(
    scene=st.sampled_from(SCENES),
    limit=st.sampled_from([300, 1500, 4000, 15_000, 60_000, 150_000]),
    seed=st.integers(0, 1 << 30),
    often=st.sampled_from([0.0, 0.01, 0.2]),
)
def test_any_size_and_any_looks_give_the_same_events(
    scene: Path, limit: int, seed: int, often: float
) -> None:
    data = (scene / "lighthouse.log").read_bytes()
    chances = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lighthouse.log")
        monitors = [Monitor(path), Monitor(path)]
        for text in data.splitlines(keepends=True):
            append(path, text, limit)
            for monitor in monitors:
                if chances.random() < often:
                    monitor.look()
        expected = said(data)
        assert Monitor.late(path) == expected
        for monitor in monitors:
            assert monitor.look() == expected
            assert monitor.reader.waiting == monitors[0].reader.waiting
            assert monitor.look() == expected
            monitor.tail.close()
        if limit < 60_000:
            assert older_of(path).stat().st_size < len(data) / 3


def test_restarts_and_quorums_said_again_set_aside_anywhere(tmp_path: Path) -> None:
    restart = blocked(0, 1) + line(1, "Lighthouse listening on: http://x:1")
    said_so = [
        *(restart, asked(2, 0), quorum(3, 1, 2), asked(4, 1), quorum(5, 1, 2), asked(6, 0)),
        *(quorum(7, 1, 2), asked(8, 0), blocked(9, 1), restart, asked(12, 1), quorum(13, 1, 2)),
        *(quorum(14, 1, 2), asked(15, 0), quorum(16, 2, 1), asked(17, 0), quorum(18, 2, 1)),
        *(quorum(19, 2, 1), restart, restart, asked(24, 0), quorum(25, 1, 1), quorum(26, 1, 1)),
        *(asked(27, 0), quorum(28, 2, 2), asked(29, 1), blocked(30, 1), asked(31, 0)),
    ]
    parts = [at(part, 10 * n) for n, part in enumerate(said_so)]
    for seed in range(60):
        chances = random.Random(seed)
        path = tmp_path / str(seed) / "lighthouse.log"
        path.parent.mkdir()
        followed, now = Monitor(path), b""
        expected = LighthouseReader("l")
        for part in parts:
            append(path, part, 1 if chances.random() < 0.6 else 1 << 30)
            now += part
            list(expected.read(0, part))
            if chances.random() < 0.25:
                assert followed.look() == said(now)
                assert followed.reader.waiting == expected.waiting
        late = Monitor(path)
        for monitor in (followed, late):
            assert monitor.look() == said(now)
            assert monitor.reader.waiting == expected.waiting
            assert monitor.reader.step == expected.step
            monitor.tail.close()


@pytest.mark.parametrize("scene", SCENES, ids=lambda path: path.name)
@pytest.mark.parametrize("limit", [700, 9000])
def test_a_refolded_run_has_the_same_incidents(scene: Path, limit: int, tmp_path: Path) -> None:
    name = json.loads((scene / "run.json").read_text())["run"]
    runs = [Outputs(tmp_path / side).run_of_array(int(name[4:])) for side in ("plain", "rotated")]
    for run in runs:
        shutil.copytree(scene, run.path)
    path = runs[1].lighthouse_log
    data = path.read_bytes()
    path.unlink()
    for text in data.splitlines(keepends=True):
        append(path, text, limit)
    assert older_of(path).exists()
    stories = []
    for run in runs:
        with Watcher.of_run(run) as watcher:
            watcher.look(final=True)
            stories.append(as_data(watcher.state, []))
    assert stories[0]["incidents"]
    assert stories[1] == stories[0]


def test_without_news_it_does_not_grow(tmp_path: Path) -> None:
    path = tmp_path / "lighthouse.log"
    append(path, line(0, "Lighthouse listening on: http://x:1") + asked(1, 0), 1 << 30)
    sizes = []
    for second in range(2, 400):
        steps = [asked(second, group) for group in range(64)]
        append(path, b"".join(steps) + quorum(second, 1, 64, 1000 + second), 100_000)
        if older_of(path).exists():
            sizes.append(older_of(path).stat().st_size)
    assert sizes
    assert max(sizes) - min(sizes) < 50, "but for saying where the newest log ended"
    assert max(sizes) < 3 * len(quorum(2, 1, 64))
    assert older_of(path).read_bytes().count(UTC_MARK[:-1]) == 1
    assert [kind for _, kind, _ in Monitor.late(path)] == ["listening", "membership"]


def test_a_reader_left_behind_knows_who_had_asked_for_what(tmp_path: Path) -> None:
    """Requests that a quorum answered which is not kept are not those that led to the next one."""
    path = tmp_path / "lighthouse.log"
    monitor = Monitor(path)
    append(path, quorum(0, 1, 2) + asked(1, 0), 1 << 30)
    monitor.look()
    append(path, asked(2, 1) + quorum(3, 1, 2), 1)
    append(path, quorum(4, 1, 2) + asked(60, 1), 1)
    append(path, quorum(61, 2, 1), 1)
    append(path, asked(62, 0), 1)
    monitor.look()
    monitor.tail.close()
    assert monitor.found == Monitor.late(path)
    assert monitor.found[-1][2]["waited"].since == monitor.found[0][0] + 60


class KilledError(BaseException):
    pass


def killed_at(patch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Have the process die before its ``count``-th change of the disk; returns how many there are."""
    done = [0]

    def dying(work: Callable[..., Any]) -> Callable[..., Any]:
        def change(*arguments: Any, **options: Any) -> Any:
            done[0] += 1
            if done[0] == count:
                raise KilledError
            return work(*arguments, **options)

        return change

    patch.setattr(os, "replace", dying(os.replace))
    patch.setattr(capped_log, "_write", dying(capped_log._write))
    patch.setattr(capped_log, "_begin", dying(capped_log._begin))
    patch.setattr(os, "fsync", dying(lambda descriptor: None))
    patch.setattr(Path, "unlink", dying(Path.unlink))
    return done


@pytest.mark.parametrize("earlier", [0, 1, 2], ids="{0} set aside before".format)
def test_killed_at_any_moment_and_read_in_the_middle(
    earlier: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        (blocked(20 * n, 1) + line(20 * n, "Lighthouse listening on: http://x:1")) * (n == 1)
        + quorum(20 * n + 1, n + 1, 2)
        + quorum(20 * n + 2, n + 1, 2)
        + asked(20 * n + 3, n % 2)
        for n in range(5)
    ]
    data = b"".join(parts)
    count, moments = 1, 99
    while count <= moments:
        path = tmp_path / str(count) / "lighthouse.log"
        path.parent.mkdir()
        before = Monitor(path)
        for part in parts[:earlier]:
            append(path, part, 1)
        before.look()
        append(path, parts[earlier], 1 << 30)
        now = b"".join(parts[: earlier + 1])
        with monkeypatch.context() as patch:
            done = killed_at(patch, count)
            try:
                set_aside(path)
            except KilledError:
                pass
            else:
                moments = done[0]
        middle = Monitor(path)
        assert middle.look() == said(now)
        assert before.look() == said(now)
        if count % 2:
            assert recover(path)
            assert not full_of(path).exists()
        assert Monitor.late(path) == said(now)
        for part in parts[earlier + 1 :]:
            append(path, part, 1)
        assert not full_of(path).exists()
        for monitor in (before, middle):
            assert monitor.look() == said(data)
            monitor.tail.close()
        assert Monitor.late(path) == said(data)
        count += 1
    assert moments >= 6


@pytest.mark.parametrize("moment", range(1, 7))
@pytest.mark.parametrize("before", [0, 1])
def test_set_aside_while_a_reader_opens_the_files(
    moment: int, before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lighthouse.log"
    parts = [quorum(n, n + 1, 2) + asked(n, 0) for n in range(5)]
    for part in parts[:before]:
        append(path, part, 1)
    append(path, parts[before], 1 << 30)
    opened = 0

    def opening(path: Path, *flags: int) -> Any:
        nonlocal opened
        opened += 1
        if opened == moment:
            for part in parts[before + 1 :]:
                append(monitor.tail.path, part, 1)
        return open_log(path, *flags)

    monitor = Monitor(path)
    with monitor.tail:
        monkeypatch.setattr(tail, "open_log", opening)
        for _ in range(4):
            monitor.look()
        if opened >= moment:
            assert monitor.found == said(b"".join(parts))
    assert opened >= 3


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[CappedLog]:
    log = CappedLog(lambda: tmp_path / "lighthouse.log", limit=10_000)
    yield log
    log.close()


def written(log: CappedLog) -> None:
    end = time.monotonic() + 5
    while log._waiting and time.monotonic() < end:
        time.sleep(0.001)
    assert log._waiting == 0


def test_what_a_killed_one_left_is_kept_by_the_next(tmp_path: Path, writer: CappedLog) -> None:
    path = tmp_path / "lighthouse.log"
    full_of(path).write_bytes(UTC_MARK + quorum(1, 1, 2))
    writer.write(quorum(2, 2, 1))
    written(writer)
    assert not full_of(path).exists()
    assert path.read_bytes() == first_line(2) + quorum(2, 2, 1)
    assert Monitor.late(path) == said(UTC_MARK + quorum(1, 1, 2) + quorum(2, 2, 1))


def test_it_is_set_aside_when_it_is_as_large_as_what_is_kept(
    tmp_path: Path, writer: CappedLog
) -> None:
    """So that the whole cost of copying is bounded by what is written."""
    path = tmp_path / "lighthouse.log"
    expected, sizes = b"", [0]
    for number in range(1, 700):
        news = quorum(number, number, 2)
        expected += news
        writer.write(news)
        if number % 10 == 0:
            written(writer)
            kept = older_of(path).stat().st_size if older_of(path).exists() else 0
            sizes += [kept] * (kept != sizes[-1])
    assert sum(sizes[:-1]) <= len(expected)
    assert len(sizes) < 8, "not one for every ten thousand bytes"
    assert Monitor.late(path) == said(UTC_MARK + expected)


def test_what_is_settled_is_not_read_again_but_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, fed = tmp_path / "lighthouse.log", 0
    parts = [quorum(n, n + 1, 2) for n in range(30)]
    for part in parts[:-1]:
        append(path, part, 1)
    feed = Compaction.feed

    def count(compaction: Compaction, block: bytes) -> None:
        nonlocal fed
        fed += len(block)
        feed(compaction, block)

    monkeypatch.setattr(Compaction, "feed", count)
    append(path, parts[-1], 1)
    assert fed < 5 * len(parts[0])
    assert Monitor.late(path) == said(b"".join(parts))


def test_lines_without_an_end_and_a_file_that_was_removed(
    tmp_path: Path, writer: CappedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lighthouse.log"
    path.write_bytes(b"killed while it wr")
    writer.write(b"last words")
    writer.write(b"first words\n")
    written(writer)
    assert path.read_bytes() == b"killed while it wr\nlast words\nfirst words\n"
    monkeypatch.setattr(capped_log, "LOOK_EVERY", 0.0)
    path.unlink()
    writer.write(b"on\n")
    written(writer)
    assert path.read_bytes() == first_line(1) + b"on\n"


def test_a_full_disk_loses_no_log_that_was_set_aside(
    tmp_path: Path, writer: CappedLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lighthouse.log"
    tries = []

    def full_disk(*arguments: Any) -> None:
        tries.append(arguments)
        raise OSError(28, "No space left on device")

    parts = [quorum(n, 1 + n // 30, 2) for n in range(200)]
    with monkeypatch.context() as patch:
        patch.setattr(capped_log, "_begin", full_disk)
        for part in parts:
            writer.write(part)
        written(writer)
    assert len(tries) == 1, "it is not tried again with every line"
    assert full_of(path).exists()
    assert Monitor.late(path) == said(UTC_MARK + b"".join(parts))
    assert set_aside(path)
    assert not full_of(path).exists()
    assert Monitor.late(path) == said(UTC_MARK + b"".join(parts))


def test_what_an_earlier_version_left_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "lighthouse.log"
    parts = [quorum(n, n + 1, 2) for n in range(4)]
    older_of(path).write_bytes(UTC_MARK + parts[0])
    monitor = Monitor(path)
    assert monitor.look() == monitor.look() == said(UTC_MARK + parts[0])
    path.write_bytes(UTC_MARK + parts[1])
    append(path, parts[2], 1)
    append(path, parts[3], 1)
    assert monitor.look() == said(UTC_MARK + b"".join(parts)) == Monitor.late(path)
    monitor.tail.close()
