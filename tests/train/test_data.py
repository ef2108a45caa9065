"""Text from files, through torchtitan's own data loader: split between ranks, and resumed."""

from __future__ import annotations

import copy
import gzip
import json
import socket
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("default")]

#: Samples of one file; sample n is SEQUENCE tokens n, so that a row is a sample.
SAMPLES = 20
SEQUENCE = 4


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    from launcher.train import device

    device.prepare("cpu")
    import torchtitan.hf_datasets.text_datasets as text_datasets

    upstream = text_datasets.HuggingFaceTextDataset
    from launcher.train import data

    data.register()
    yield
    text_datasets.HuggingFaceTextDataset = upstream


@pytest.fixture
def folder(hostile: Path) -> Path:
    return hostile


def write(folder: Path, files: int, suffix: str = ".json.gz") -> None:
    for number in range(files):
        lines = [
            json.dumps({"text": str(number * SAMPLES + sample), "url": "https://a.invalid"})
            for sample in range(SAMPLES)
        ]
        text = ("\n".join(lines) + "\n").encode()
        path = folder / f"part-{number:03d}{suffix}"
        path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)


class Tokenizer:
    """Makes of the text "7" as many tokens 7 as a row of a batch takes, and one in between."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(text)] * (SEQUENCE + 1)


def loader(
    path: Path | str, rank: int = 0, ranks: int = 1, *, infinite: bool = False, batch: int = 1
) -> Any:
    from torchtitan.config import JobConfig
    from torchtitan.hf_datasets.text_datasets import build_text_dataloader

    config = JobConfig()
    config.training.dataset = "jsonl"
    config.training.dataset_path = str(path)
    config.training.seq_len = SEQUENCE
    config.training.local_batch_size = batch
    tokenizer: Any = Tokenizer()
    return build_text_dataloader(ranks, rank, tokenizer, config, infinite=infinite)


def samples(batches: Any) -> list[int]:
    """Which samples the rows of some batches are."""
    found = []
    for inputs, labels in batches:
        assert inputs["input"].shape == labels.shape == (labels.shape[0], SEQUENCE)
        assert (inputs["input"] == labels).all()
        found += [int(row[0]) for row in labels]
    return found


@pytest.mark.parametrize(
    ("files", "ranks"),
    [(1, 1), (2, 2), (4, 2), (3, 2), (1, 2), (2, 4), (3, 5)],
)
def test_every_sample_goes_to_one_rank(folder: Path, files: int, ranks: int) -> None:
    """Also with fewer files than ranks, and where one does not divide the other."""
    write(folder, files)
    shares = [samples(loader(folder, rank, ranks)) for rank in range(ranks)]
    assert sorted(chain.from_iterable(shares)) == list(range(files * SAMPLES))
    assert {len(share) for share in shares} <= {
        files * SAMPLES // ranks, -(-files * SAMPLES // ranks),
    }  # fmt: skip


def test_a_rank_reads_its_own_files_where_they_divide(folder: Path) -> None:
    write(folder, 4)
    assert samples(loader(folder, 1, 2)) == [*range(20, 40), *range(60, 80)]


def test_more_files_of_the_same_multiple_move_no_file_to_another_rank(folder: Path) -> None:
    write(folder, 2)
    before = samples(loader(folder, 1, 2))
    write(folder, 6)
    assert samples(loader(folder, 1, 2))[: len(before)] == before


@pytest.mark.parametrize(("files", "ranks"), [(2, 1), (4, 2), (3, 2)])
@pytest.mark.parametrize("passes", [0, 1, 2])
def test_a_new_process_goes_on_where_the_old_one_was(
    folder: Path, files: int, ranks: int, passes: int
) -> None:
    """Also in the second and third pass over the data."""
    write(folder, files)
    share = files * SAMPLES // ranks
    old = loader(folder, 0, ranks, infinite=True, batch=2)
    iterator = iter(old)
    seen = samples(islice(iterator, (passes * share + share // 2) // 2))
    state = old.state_dict()
    expected = samples(islice(iterator, share))
    new = loader(folder, 0, ranks, infinite=True, batch=2)
    new.load_state_dict(state)
    assert samples(islice(iter(new), share)) == expected
    assert set(seen[-2:]).isdisjoint(expected[:2])


def test_upstream_forgets_its_place_after_the_first_pass(folder: Path) -> None:
    """When this fails, upstream is mended, and TextDataset.load_state_dict can go."""
    from launcher.train.data import TextDataset

    write(folder, 2)
    upstream = TextDataset.__mro__[1]

    def dataset() -> Any:
        tokenizer: Any = Tokenizer()
        return upstream("jsonl", str(folder), tokenizer, SEQUENCE, infinite=True)

    old = dataset()
    iterator = iter(old)
    for _ in range(2 * SAMPLES + 7):
        next(iterator)
    state = copy.deepcopy(old.state_dict())
    new = dataset()
    new.load_state_dict(state)
    assert int(next(iter(new))[1][0]) != int(next(iterator)[1][0])


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.gz"])
def test_a_file_a_folder_and_a_pattern(folder: Path, suffix: str) -> None:
    write(folder, 3, suffix)
    assert len(samples(loader(folder / f"part-001{suffix}"))) == SAMPLES
    assert len(samples(loader(folder))) == 3 * SAMPLES
    assert len(samples(loader(f"{folder}/part-00[12]*"))) == 2 * SAMPLES


def test_only_files_of_the_list_are_read_where_there_is_one(folder: Path) -> None:
    write(folder, 3)
    listed = {"shards": [{"name": f"en/part-00{number}.json.gz"} for number in (2, 0)]}
    (folder / "shards.json").write_text(json.dumps(listed))
    assert samples(loader(folder)) == [*range(20), *range(40, 60)]


def test_neither_the_network_nor_a_cache_is_used(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def refuse(*_: object) -> None:
        raise AssertionError("no connections")

    write(folder, 1)
    cache = tmp_path / "cache"
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HOME", str(cache))
    assert len(samples(loader(folder))) == SAMPLES
    assert not cache.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (gzip.compress(b'{"text": "1"}\n' * 9)[:-9], "cannot be read .*--check --deep"),
        (b"not gzip at all", "cannot be read after line 0 .*--check --deep"),
        (gzip.compress(b'{"text": "1"}\n{"text'), 'line 2, is no JSON object with a "text"'),
        (gzip.compress(b'{"text": "1"}\n\n{"url": "1"}\n'), "line 3, is no JSON object"),
        (gzip.compress(b"[1]\n"), "line 1, is no JSON object"),
    ],
)
def test_a_damaged_file_is_named(folder: Path, content: bytes, says: str) -> None:
    path = folder / "part-000.json.gz"
    path.write_bytes(content)
    with pytest.raises(RuntimeError, match=f"part-000.json.gz.*{says}"):
        samples(loader(folder))


def test_files_that_cannot_be_split_evenly_are_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchtitan.tools.logging import logger

    said: list[str] = []
    monkeypatch.setattr(logger, "warning", said.append)
    write(folder, 3)
    loader(folder, 0, 3)
    loader(folder, 1, 2)
    assert said == []
    loader(folder, 0, 2)
    assert "3 files of text are no multiple of 2 data-parallel ranks" in said[0]
