"""What training needs besides code: the model's tokenizer, dataset shards, the debug corpus."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher import corpus, shards
from launcher.datafiles import MANIFEST
from launcher.download import SOURCES, fetch
from launcher.hub import Hub, HuggingFace, explained
from launcher.model import BlindError, KitError, UsageError

REPOSITORY = "meta-llama/Llama-3.1-8B"
#: The tokenizer's files in that repository (not the weights: pretraining makes those).
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
#: Exit code of a download that was interrupted: 128 + SIGINT.
INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One asset that was looked at."""

    place: Path
    what: str
    problems: tuple[str, ...]
    """What is wrong and what to do about it; none: it is whole."""


def folder(outputs: Path) -> Path:
    """Where the config files look for assets: below ``outputs/`` of the repository, wherever
    runs themselves may write (``TFT_OUTPUTS``)."""
    return outputs / "assets"


def debug(outputs: Path) -> tuple[Path, bool]:
    """Build the debug corpus and tokenizer; (their folder, whether anything was built)."""
    place = folder(outputs) / "debug"
    return place, corpus.build(place)


def tokenizer(outputs: Path, repository: str = REPOSITORY) -> Path:
    """Download the tokenizer of ``repository``; what is there already is not fetched again.

    The token comes from the environment (``HF_TOKEN``) or from ``hf auth login``; it is
    never an argument, and never printed.

    Raises:
        UsageError: no token, or no access to a gated repository.
        KitError: the hub cannot be reached, or the download broke off.
    """
    from huggingface_hub import snapshot_download

    place = folder(outputs) / repository.rsplit("/", 1)[-1]
    with explained(repository, kind="", by_hand=f", or copy {FILES[0]} into {place}"):
        snapshot_download(repository, allow_patterns=list(FILES), local_dir=place)
    if not (place / FILES[0]).is_file():
        raise KitError(f"{repository} was fetched, but has no {FILES[0]}: is it a Llama 3 model?")
    return place


def dataset(
    outputs: Path,
    name: str,
    count: int | None,
    first: int,
    say: Callable[[str], None],
    hub: Hub | None = None,
) -> None:
    """Fetch ``count`` shards of a dataset from number ``first`` on (``count`` None: complete what
    was begun), and say how to train from them.

    Raises:
        UsageError: there is no such dataset or shard, or too little space.
        KitError: see ``download.fetch``.
        SystemExit: it was interrupted; the same command goes on.
    """
    source = SOURCES.get(name)
    if source is None:
        raise UsageError(f"--dataset {name} is not known here: there are {', '.join(SOURCES)}")
    place = folder(outputs) / name
    try:
        if sys.stdout.isatty():
            with _Bar() as bar:
                fetched = fetch(
                    source, place, hub or HuggingFace(), count=count, first=first,
                    say=bar.say, tick=bar.tick,
                )  # fmt: skip
        else:
            fetched = fetch(source, place, hub or HuggingFace(), count=count, first=first, say=say)
    except KeyboardInterrupt:
        say(
            f"interrupted: what has come is kept; `python -m launcher assets --dataset {name}` goes on"
        )
        raise SystemExit(INTERRUPTED) from None
    say(f"{fetched.summary}: {place}")
    section = "validation" if "validation" in name else "training"
    say(f"to use them: --{section}.dataset jsonl --{section}.dataset_path {place}")


class _Bar:
    """Progress on a terminal: a bar that stays below the lines of what is done."""

    def __init__(self) -> None:
        from rich import progress

        self._progress = progress.Progress(
            progress.BarColumn(),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            transient=True,
        )
        self._task: progress.TaskID | None = None

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def tick(self, done: int, total: int) -> None:
        if self._task is None:
            self._task = self._progress.add_task("", total=total, completed=done)
        self._progress.update(self._task, completed=done)


def check(outputs: Path, deep: bool = False) -> list[Checked]:
    """Look at everything that lies under ``outputs/assets``.

    Sizes, and whether JSON is JSON; ``deep`` reads the dataset's files too.

    Raises:
        KitError: a list of shards cannot be read.
        BlindError: a file cannot be looked at.
    """
    place = folder(outputs)
    try:
        if not place.exists():
            return []
        found = sorted(path for path in place.iterdir() if path.is_dir())
        return [checked for path in found if (checked := _check(path, deep)) is not None]
    except OSError as error:
        raise BlindError(f"{place} cannot be looked at: {error}") from error


def report(outputs: Path, deep: bool, say: Callable[[str], None]) -> None:
    """Say what is there and what is wrong with it.

    Raises:
        KitError: something is wrong, or nothing is there.
    """
    found = check(outputs, deep)
    width = max((len(str(checked.place)) for checked in found), default=0)
    for checked in found:
        verdict = "FAILED" if checked.problems else "ok"
        say(f"{verdict:<7} {checked.place!s:<{width}}  {checked.what}")
        for problem in checked.problems:
            say(f"        {problem}")
    if not found:
        raise KitError(
            f"no tokenizer and no data under {folder(outputs)}: run `python -m launcher assets` (or, "
            "with --debug, for a debug corpus)"
        )
    if failed := [str(checked.place) for checked in found if checked.problems]:
        raise KitError(f"not whole: {', '.join(failed)}")


def _check(place: Path, deep: bool) -> Checked | None:
    if shards.is_shard_folder(place):
        known = shards.read(place / MANIFEST) or shards.read(place / shards.PLAN)
        what = "shards" if known is None else known.summary
        return Checked(place=place, what=what, problems=tuple(shards.verify(place, deep)))
    if (place / "corpus").is_dir() or place.name == "debug":
        return Checked(
            place=place,
            what="debug corpus and tokenizer",
            problems=tuple(_check_debug(place, deep)),
        )
    if any((place / name).exists() for name in (*FILES, ".cache")):
        remedy = f"delete {place}, then run `python -m launcher assets`"
        found = [
            problem
            for name in FILES
            if name == FILES[0] or (place / name).exists()
            if (problem := _not_json(place / name, remedy))
        ]
        return Checked(place=place, what="tokenizer", problems=tuple(found))
    return None


def _check_debug(place: Path, deep: bool) -> list[str]:
    remedy = f"delete {place}, then run `python -m launcher assets --debug`"
    found = [_not_json(place / "tokenizer" / FILES[0], remedy)]
    text = place / "corpus" / "train.jsonl"
    size = shards.size_of(text)
    if size < corpus.CORPUS_CHARACTERS // 10:
        state = "is missing" if size < 0 else f"has {size} bytes only"
        found.append(f"{text} {state}: {remedy}")
    elif deep:
        try:
            for line in text.read_text(encoding="utf-8").splitlines():
                json.loads(line)
        except ValueError:
            found.append(f"{text} is damaged: {remedy}")
    return [problem for problem in found if problem]


def _not_json(path: Path, remedy: str) -> str:
    """What is wrong with a file of JSON; empty: nothing."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path} is missing: {remedy}"
    except OSError as error:
        raise BlindError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError:
        return f"{path} is cut short or damaged: {remedy}"
    return ""
