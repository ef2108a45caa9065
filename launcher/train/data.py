"""Datasets that need no hub: JSON-lines files of ``{"text": …}`` on disk."""

from __future__ import annotations

from typing import Any

from datasets import load_dataset
from torchtitan.hf_datasets import DatasetConfig
from torchtitan.hf_datasets.text_datasets import DATASETS


def register() -> None:
    """Make ``training.dataset = "jsonl"`` with ``training.dataset_path`` (a file, or a
    folder of ``*.jsonl``) known to torchtitan."""
    DATASETS.setdefault(
        "jsonl",
        DatasetConfig(path="", loader=_load, sample_processor=lambda sample: sample["text"]),
    )


def _load(path: str) -> Any:
    return load_dataset("json", data_files=_files(path), split="train")


def _files(path: str) -> str:
    return path if path.endswith(".jsonl") else f"{path}/*.jsonl"
