import contextlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import tail as module
from launcher.capped_log import full_of, identity, older_of, set_aside
from launcher.compaction import ended, first_line
from launcher.tail import Tail


def texts(tail: Tail) -> list[bytes]:
    return [line for _, line in tail.lines()]


def test_a_file_that_appears_later_with_half_lines(hostile: Path) -> None:
    path = hostile / "log"
    with Tail(path) as tail:
        assert texts(tail) == []
        path.write_bytes(b"one\ntw")
        assert texts(tail) == [b"one"]
        with path.open("ab") as file:
            file.write(b"o\n\xff\xfe\n")
        assert list(tail.lines()) == [(4, b"two"), (8, b"\xff\xfe")]
        assert texts(tail) == []


def test_truncation_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nhalf")
    with Tail(path) as tail:
        assert texts(tail) == [b"one", b"two"]
        path.write_bytes(b"new\n")
        assert texts(tail) == [b"new"]


def test_rotation_loses_nothing_of_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    with Tail(path) as tail:
        assert texts(tail) == [b"one"]
        with path.open("ab") as file:
            file.write(b"last words\n")
        os.replace(path, tmp_path / "log.1")
        path.write_bytes(b"fresh\n")
        assert texts(tail) == [b"last words", b"fresh"]
        path.unlink()
        assert texts(tail) == []


def test_a_file_set_aside_is_read_first_and_only_once(tmp_path: Path) -> None:
    path, older = tmp_path / "log", tmp_path / "log.1"
    older.write_bytes(b"zero\n")
    path.write_bytes(b"one\n")
    with Tail(path, older) as tail:
        assert texts(tail) == [b"zero", b"one"]
        os.replace(path, older)
        path.write_bytes(b"two\n")
        assert texts(tail) == [b"two"]
        assert texts(tail) == []


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=6))
def test_any_bytes_cut_anywhere_give_the_same_lines(data: bytes, cuts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log")
        tail, got, start = Tail(path), [], 0
        for end in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
            with path.open("ab") as file:
                file.write(data[start:end])
            start = end
            got += texts(tail)
        tail.close()
    assert got == data.split(b"\n")[:-1]


def test_the_rest_is_given_and_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with Tail(path) as tail:
        assert tail.rest() is None
        path.write_bytes(b"one\nkilled while it wr")
        assert list(tail.blocks()) == [(0, b"one\n")]
        assert tail.rest() == tail.rest() == (4, b"killed while it wr")
        assert list(tail.blocks()) == []
        with path.open("ab") as file:
            file.write(b"ote\n")
        assert list(tail.blocks()) == [(4, b"killed while it wrote\n")]
        assert tail.rest() is None


def test_the_last_line_of_a_file_that_was_replaced_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\nlast wor")
    with Tail(path) as tail:
        assert texts(tail) == [b"one"]
        (tmp_path / "new").write_bytes(b"fresh\n")
        os.replace(tmp_path / "new", path)
        assert list(tail.lines()) == [(4, b"last wor"), (0, b"fresh")]


def test_what_is_written_just_before_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the old file was read to what seemed its end, and before the new one is seen."""
    path = tmp_path / "log"
    path.write_bytes(b"one\n")

    def replaced_now(asked: Path | int) -> tuple[int, int] | None:
        monkeypatch.setattr(module, "identity", identity)
        with path.open("ab") as file:
            file.write(b"two\n")
        os.replace(path, tmp_path / "log.old")
        path.write_bytes(b"three\n")
        return identity(asked)

    monkeypatch.setattr(module, "identity", replaced_now)
    with Tail(path) as tail:
        assert texts(tail) + texts(tail) == [b"one", b"two", b"three"]


def test_a_replaced_file_that_can_be_read_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, when another machine has removed it: said once, and gone on with the next."""
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    with Tail(path) as tail:
        assert texts(tail) == [b"one"]
        (tmp_path / "new").write_bytes(b"two\n")
        os.replace(tmp_path / "new", path)
        assert tail._at is not None
        monkeypatch.setattr(tail._at, "blocks", lambda chunk: os.stat("/gone"))
        with pytest.raises(OSError, match="No such file"):
            texts(tail)
        assert texts(tail) == [b"two"]


def test_what_was_set_aside_is_read_on_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log"
    older_of(path).write_bytes(b"0123456\n" * 3)
    read, left = os.pread, 4

    def failing(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal left
        left -= count == 8
        if left == 1:
            raise OSError(5, "Input/output error")
        return read(descriptor, count, offset)

    monkeypatch.setattr(os, "pread", failing)
    got = []
    with Tail(path, older_of(path), chunk=8) as tail:
        for _ in range(2):
            with contextlib.suppress(OSError):
                for offset, _ in tail.blocks():
                    got.append(offset)
    assert (got, left < 1) == ([0, 8, 16], True)


def test_emptied_and_grown_beyond_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\n")
    with Tail(path) as tail:
        assert texts(tail) == [b"one", b"two"]
        path.write_bytes(b"quite another one\n")
        assert texts(tail) == [b"quite another one"]
        path.write_bytes(b"")
        assert texts(tail) == []
        path.write_bytes(b"x\n")
        assert texts(tail) == [b"x"]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"0123456\n" * 4)
    with Tail(path, chunk=8) as tail:
        blocks = tail.blocks()
        assert next(blocks) == (0, b"0123456\n")
        os.truncate(path, 4)
        assert list(blocks) == []
        assert list(tail.blocks()) == []
        assert tail.rest() == (0, b"0123")


def test_a_line_that_is_too_long_is_dropped_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_LINE", 50)
    path = tmp_path / "log"
    path.write_bytes(b"one\n" + b"x" * 95 + b"\ntwo\nhalf")
    with Tail(path, chunk=20) as tail:
        assert list(tail.lines()) == [(0, b"one"), (100, b"two")]
        assert tail.rest() == (104, b"half")


@pytest.mark.parametrize("what", ["pipe", "folder", "device", "loop"])
@pytest.mark.parametrize("name", ["log", "log.1", "log.full"])
def test_what_is_no_file_is_refused_and_never_waited_for(
    what: str, name: str, hostile: Path
) -> None:
    path, strange = hostile / "log", hostile / name
    if what == "pipe":
        os.mkfifo(strange)
    elif what == "folder":
        strange.mkdir()
    else:
        strange.symlink_to("/dev/zero" if what == "device" else strange)
    says = "symbolic" if what == "loop" else f"a {what}, not a regular file"
    with Tail(path, older_of(path)) as tail:
        for _ in range(2):
            with pytest.raises(OSError, match=says):
                texts(tail)
        strange.rmdir() if what == "folder" else strange.unlink()
        path.write_bytes(b"one\n")
        assert texts(tail) == [b"one"]


def test_a_link_is_followed_also_to_another_file(hostile: Path) -> None:
    path, first, second = hostile / "log", hostile / "first", hostile / "second"
    path.symlink_to(first)
    with Tail(path) as tail:
        assert texts(tail) == []
        first.write_bytes(b"one\n")
        assert texts(tail) == [b"one"]
        second.write_bytes(b"two\n")
        path.unlink()
        assert texts(tail) == []
        path.symlink_to(second)
        assert texts(tail) == [b"two"]


def test_what_was_set_aside_is_read_once_and_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "log"
    older_of(path).write_bytes(b"zero\n" + ended(1))
    with Tail(path, older_of(path)) as tail:
        assert texts(tail)[:1] == [b"zero"]
        assert tail.current == "log.1"
        assert texts(tail) == texts(tail) == []
        path.write_bytes(first_line(2)[:-3])
        assert texts(tail) == []
        path.write_bytes(first_line(2) + b"one\n")
        assert texts(tail)[1:] == [b"one"]
        assert tail.current == "log"


def test_each_block_says_of_which_file_it_is(tmp_path: Path) -> None:
    path = tmp_path / "log"
    older_of(path).write_bytes(b"zero\n" + ended(1))
    full_of(path).write_bytes(first_line(2) + b"one\n")
    path.write_bytes(first_line(3) + b"two\n")
    found = []
    with Tail(path, older_of(path)) as tail:
        for offset, block in tail.blocks():
            text = path.with_name(tail.current).read_bytes()
            assert text[offset : offset + len(block)] == block
            found.append((tail.current, block.split(b"\n")[-2][-4:]))
    assert [name for name, _ in found] == ["log.1", "log.full", "log"]
    assert [last for _, last in found][1:] == [b"one", b"two"]


def test_no_file_is_left_open(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(first_line(1) + b"one\n")
    before = len(os.listdir("/proc/self/fd"))
    with Tail(path, older_of(path)) as tail:
        for _ in range(5):
            assert set_aside(path)
            texts(tail)
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before
