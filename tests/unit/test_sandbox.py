"""The sandbox touches only folders of its own; what it starts is in tests/e2e."""

from pathlib import Path

import pytest

from launcher.model import UsageError
from launcher.sandbox import Sandbox


@pytest.fixture(autouse=True)
def _as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda program: program)


def test_a_folder_that_is_not_a_sandboxs_is_neither_used_nor_removed(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    for act in (Sandbox(mine).down, Sandbox(mine).up):
        with pytest.raises(UsageError, match="is no sandbox's"):
            act()
    for act in (Sandbox(mine / "thesis.tex").down, Sandbox(mine / "thesis.tex").up):
        with pytest.raises(UsageError, match="is no sandbox's"):
            act()
    assert (mine / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("name", ["with space", "quo'te", "new\nline", "$(touch x)"])
def test_paths_that_slurms_configuration_cannot_hold_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="plain paths only"):
        Sandbox(tmp_path / name).up()


def test_no_sandbox_is_nothing_to_end(tmp_path: Path) -> None:
    assert Sandbox(tmp_path / "none").down() is False
