"""Text from files on disk: no hub is asked, and nothing is converted or cached first."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from typing import Any

import torchtitan.hf_datasets.text_datasets as text_datasets
from datasets.iterable_dataset import ExamplesIterable, IterableDataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.tools.logging import logger

from launcher.datafiles import PATTERNS, data_files


def register() -> None:
    """Make ``training.dataset = "jsonl"`` with ``training.dataset_path`` (a file, a folder of
    such, or a pattern) known to torchtitan, and have its text datasets resume rightly."""
    text_datasets.DATASETS.setdefault(
        "jsonl",
        DatasetConfig(path="", loader=_load, sample_processor=lambda sample: sample["text"]),
    )
    text_datasets.HuggingFaceTextDataset = TextDataset  # type: ignore[misc]


class TextDataset(text_datasets.HuggingFaceTextDataset):
    """torchtitan's text dataset.

    Works around, in torchtitan 0.2.2 with datasets 5.2.0: the place in streamed data is
    restored only if the dataset is at the epoch in which it was saved, and a new process is at
    epoch 0. From the second pass over its data on, every restart began the data anew.
    """

    def __init__(self, *args: Any, dp_rank: int = 0, dp_world_size: int = 1, **kwargs: Any) -> None:
        super().__init__(*args, dp_rank=dp_rank, dp_world_size=dp_world_size, **kwargs)
        if isinstance(self._data, IterableDataset) and dp_rank == 0:
            self._say_split(self._data._ex_iterable.num_shards, dp_world_size)

    def _say_split(self, files: int, ranks: int) -> None:
        if files % ranks and files > 1:
            logger.warning(
                f"{files} files of text are no multiple of {ranks} data-parallel ranks: each rank reads "
                f"all of them and keeps one of {ranks} samples (of a multiple it reads its own files)"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if isinstance(self._data, IterableDataset):
            self._data.set_epoch(state_dict["data"]["epoch"])
        super().load_state_dict(state_dict)


def _load(path: str) -> IterableDataset:
    # Not load_dataset("json"): it makes a cache in the home directory, with locks that all ranks
    # take, and tries to reach the hub to be counted, at every start of every rank.
    files = data_files(path)
    if not files:
        raise ValueError(f"no {' or '.join(PATTERNS)} in training.dataset_path {path!r}")
    return IterableDataset(ExamplesIterable(_samples, {"files": files}))


def _samples(files: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(key, sample) of every line; ``datasets`` splits the list of files between ranks."""
    for path in files:
        number = 0
        try:
            with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.isspace():
                        yield f"{path}:{number}", {"text": json.loads(line)["text"]}
        except (ValueError, KeyError, TypeError) as error:
            raise RuntimeError(
                f'{path}, line {number}, is no JSON object with a "text" ({error!r})'
            ) from error
        except Exception as error:
            raise RuntimeError(
                f"{path} cannot be read after line {number} ({error}): if it was fetched with "
                "`python -m launcher assets`, look at it with `--check --deep`"
            ) from error
