"""Which files ``training.dataset_path`` means: the launcher checks them, the ranks read them."""

from __future__ import annotations

import glob
import json
from pathlib import Path

#: What a folder is read by, plain or compressed: one JSON object with a "text" a line.
PATTERNS = ("*.jsonl", "*.jsonl.gz", "*.json.gz")
#: Says which of a folder's files are the dataset (launcher/shards.py writes it). Others may
#: lie there: of a set that is being made larger.
MANIFEST = "shards.json"


def data_files(path: str) -> list[str]:
    """The files of ``path`` (a file, a folder, or a pattern with ``*``), sorted by name.

    Every rank must find the same: the data is split between them by it.

    Raises:
        ValueError: the list of a folder's files cannot be read.
    """
    place = Path(path)
    if place.is_file():
        return [path]
    if not place.is_dir():
        return sorted(found for found in glob.glob(path) if Path(found).is_file())
    try:
        listed = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        return sorted(str(place / Path(shard["name"]).name) for shard in listed["shards"])
    except FileNotFoundError:
        return sorted({str(found) for pattern in PATTERNS for found in place.glob(pattern)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{place / MANIFEST} cannot be read: {error!r}") from error
