import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

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
