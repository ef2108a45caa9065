"""What a start says of data that is not there, or not whole."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from launcher import preflight
from launcher.config import Site
from launcher.datafiles import MANIFEST
from launcher.model import UsageError
from launcher.shards import PLAN, Shard, ShardSet

CONFIG = """
[training]
dataset = "jsonl"
dataset_path = "{path}"
"""


def shard_set(*names: str) -> ShardSet:
    hashed = hashlib.sha256(b"some").hexdigest()
    return ShardSet(
        dataset="c4",
        repository="allenai/c4",
        commit="0",
        shards=tuple(Shard(name=f"en/{name}", size=4, sha256=hashed) for name in names),
    )


@pytest.fixture
def c4(tmp_path: Path) -> Path:
    place = tmp_path / "c4"
    place.mkdir()
    for name in ("a.json.gz", "b.json.gz"):
        (place / name).write_bytes(b"some")
    shard_set("a.json.gz", "b.json.gz").write(place / MANIFEST)
    return place


def check(place: Path | str, extra: str = "", config: str = CONFIG) -> None:
    file = Path(place).parent / "config.toml"
    file.write_text(config.format(path=place))
    preflight.check(Site.from_environment({"TFT_CONFIG": str(file), "TFT_EXTRA_ARGS": extra}))


def test_whole_shards_are_fine(c4: Path) -> None:
    check(c4)


def test_a_shard_that_is_missing_or_cut_short_is_said(c4: Path) -> None:
    (c4 / "a.json.gz").unlink()
    (c4 / "b.json.gz").write_bytes(b"so")
    with pytest.raises(
        UsageError,
        match=r"a\.json\.gz is missing, b\.json\.gz has 2 of 4 bytes.*assets --dataset c4",
    ):
        check(c4)


def test_a_set_that_was_never_whole_is_refused(c4: Path) -> None:
    (c4 / MANIFEST).rename(c4 / PLAN)
    (c4 / "b.json.gz").unlink()
    with pytest.raises(UsageError, match=r"half fetched \(1 of 2 .*assets --dataset c4` goes on"):
        check(c4)


def test_a_set_that_is_made_larger_keeps_nobody_from_starting(c4: Path) -> None:
    shard_set("a.json.gz", "b.json.gz", "c.json.gz").write(c4 / PLAN)
    check(c4)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json.gz"])
def test_files_of_ones_own_are_found(tmp_path: Path, name: str) -> None:
    place = tmp_path / "own"
    place.mkdir()
    with pytest.raises(UsageError, match=r"assets --debug.*assets --dataset c4 --shards N.*mend"):
        check(place)
    (place / name).touch()
    check(place)
    check(place / name)
    check(place / "x.*")
    with pytest.raises(UsageError, match=r"in .*y"):
        check(place / "y.*")


def test_validation_data_is_looked_at_too(c4: Path) -> None:
    flags = "--validation.dataset jsonl --validation.dataset_path"
    check(c4, f"{flags} {c4}")
    with pytest.raises(UsageError, match=r"gone .validation.dataset_path of"):
        check(c4, f"{flags} gone")
    with pytest.raises(UsageError, match=r"needs a training\.dataset_path of"):
        check(c4, config='[training]\ndataset = "jsonl"\n')
