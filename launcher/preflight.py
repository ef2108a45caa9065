"""What must be there before torch is loaded: said in one line when it is not."""

from __future__ import annotations

import importlib.util
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import shards, timeouts
from launcher.config import Site
from launcher.datafiles import PATTERNS, data_files
from launcher.model import UsageError

#: Any one of these makes a folder a tokenizer to torchtitan.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
_NEEDED = {"torch": "torch", "torchft": "torchft-nightly", "torchtitan": "torchtitan"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The parts of a torchtitan configuration that the launcher must know."""

    settings: dict[str, Any]
    """The TOML file as parsed."""
    steps: int | None


def check(site: Site) -> Training:
    """Check environment, config, tokenizer and data of a job on this node.

    Raises:
        UsageError: something is missing; says what, where and how to mend it.
    """
    _check_packages()
    settings = _load(site.config)
    tokenizer = setting(settings, site.extra_args, "model", "hf_assets_path")
    if tokenizer is not None:
        _check_tokenizer(Path(str(tokenizer)), site.config)
    for section in ("training", "validation"):
        if setting(settings, site.extra_args, section, "dataset") == "jsonl":
            path = setting(settings, site.extra_args, section, "dataset_path")
            _check_data(path, f"{section}.dataset_path of {site.config}")
    _check_timeouts(settings, site)
    steps = setting(settings, site.extra_args, "training", "steps")
    return Training(settings=settings, steps=_whole(steps, "training.steps"))


def setting(settings: dict[str, Any], extra: Sequence[str], section: str, key: str) -> Any:
    """``section.key`` as torchtitan will see it: the last flag wins over the file."""
    names = (f"--{section}.{key}", f"--{section}.{key.replace('_', '-')}")
    value: Any = None
    for position, flag in enumerate(extra):
        name, separator, rest = flag.partition("=")
        if name in names:
            following = extra[position + 1] if position + 1 < len(extra) else None
            value = rest if separator else following
    if value is not None:
        return value
    part = settings.get(section, {})
    return part.get(key) if isinstance(part, dict) else None


def _check_packages() -> None:
    missing = [pip for module, pip in _NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(
            f"this environment lacks {', '.join(missing)}: run `make setup`, or point TFT_ENV at "
            "the environment that has them"
        )


def _load(config: Path) -> dict[str, Any]:
    try:
        with config.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UsageError(
            f"config file {config} does not exist (from {Path.cwd()}): set TFT_CONFIG to one of "
            f"{', '.join(sorted(str(p) for p in Path('configs').glob('*.toml'))) or 'configs/*.toml'}"
        ) from None
    except OSError as error:
        raise UsageError(f"config file {config} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"config file {config} is not valid TOML: {error}") from error


def _check_tokenizer(folder: Path, config: Path) -> None:
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return
    remedy = (
        "python -m launcher assets --debug"
        if "debug" in folder.parts
        else "python -m launcher assets"
    )
    raise UsageError(
        f"no tokenizer in {folder} (model.hf_assets_path of {config}): run `{remedy}` on the login "
        "node first"
    )


def _check_data(path: Any, name: str) -> None:
    if not path:
        raise UsageError(f"dataset 'jsonl' needs a {name}")
    place = Path(str(path))
    if shards.is_shard_folder(place):
        if problems := shards.unusable(place):
            raise UsageError(f"{name}: {'; '.join(problems)}")
        return
    if data_files(str(path)):
        return
    raise UsageError(
        f"no {', '.join(PATTERNS)} in {place} ({name}): run `python -m launcher assets --debug` for "
        "the debug corpus, `python -m launcher assets --dataset c4 --shards N` for c4, or mend the path"
    )


def _check_timeouts(settings: dict[str, Any], site: Site) -> None:
    names = {
        "init_timeout_seconds": "comm",
        "train_timeout_seconds": "comm",
        "process_group_timeout_ms": "fault_tolerance",
    }
    known = {
        key: setting(settings, site.extra_args, section, key) for key, section in names.items()
    }
    try:
        found = list(timeouts.problems(known, site.quorum_timeout))
    except (TypeError, ValueError) as error:
        found = [f"a timeout is not a number: {error}"]
    if found:
        raise UsageError(f"{site.config}: {'; '.join(found)}")


def _whole(value: Any, name: str) -> int | None:
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a whole number, not {value!r}") from None
