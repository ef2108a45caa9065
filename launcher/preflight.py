"""What must be there before torch is loaded: said in one line when it is not."""

from __future__ import annotations

import ast
import importlib.util
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import gpus, methods, shards, timeouts, titan_names
from launcher.batches import Batches, Layout, batches
from launcher.config import Site
from launcher.datafiles import PATTERNS, data_files
from launcher.methods import HSDP, Learning, Method, Schedule
from launcher.model import UsageError
from launcher.titan import setting, switch

#: Any one of these makes a folder a tokenizer to torchtitan.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
_NEEDED = {"torch": "torch", "torchft": "torchft-nightly", "torchtitan": "torchtitan"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """The parts of a torchtitan configuration that the launcher must know."""

    settings: dict[str, Any]
    """The TOML file as parsed."""
    steps: int | None
    method: Method = HSDP
    schedule: Schedule | None = None
    """When replica groups meet; None: at every step."""
    batches: Batches | None = None
    """Batch sizes; None for a job without replica groups."""

    @property
    def lines(self) -> list[str]:
        """How the run learns, for a person."""
        if self.batches is None:
            return []
        return methods.lines(self.method, self.schedule, self.batches)


def check(site: Site, groups: int = 0, nodes: int = 1, *, on_node: bool = True) -> Training:
    """Check environment, config, tokenizer and data of a job on this node.

    Args:
        groups: replica groups of the run; 0 for a job without them.
        nodes: nodes of each of them.
        on_node: whether this machine's GPUs are those that train.

    Raises:
        UsageError: something is missing; says what, where and how to mend it.
    """
    _check_packages(*_NEEDED)
    settings = load(site.config)
    problems = titan_names.problems(settings, site.extra_args, site.config)
    try:
        check_assets(settings, site.extra_args, site.config)
    except UsageError as error:
        problems.append(str(error))
    if problems:
        raise UsageError("; ".join(problems))
    steps = _whole(setting(settings, site.extra_args, "training", "steps"), "training.steps")
    if not groups:
        _refuse(site.config, _timeouts(settings, site, HSDP))
        return Training(settings=settings, steps=steps)
    try:
        return _learning(settings, site, groups, nodes, steps, on_node)
    except ValueError as error:
        raise UsageError(f"{site.config}: {error}") from error


def check_script(site: Site, script: str) -> Training:
    """Check what a script of the user's own needs on this node.

    Raises:
        UsageError: something is missing; names every problem at once.
    """
    problems = []
    try:
        ast.parse(Path(script).read_bytes(), script)
    except OSError as error:
        problems.append(
            f"the script {script!r} cannot be read here ({error.strerror}, from {Path.cwd()}): give "
            "its path from the root of the repository, or an absolute one, on the shared file system"
        )
    except (SyntaxError, ValueError) as error:
        problems.append(f"the script {script!r} is not Python: {error}")
    if site.extra_args:
        problems.append(
            "TFT_EXTRA_ARGS is for torchtitan: unset it, and give a script its flags after its name"
        )
    try:
        _check_packages("torch", "torchft")
    except UsageError as error:
        problems.append(str(error))
    if problems:
        raise UsageError("; ".join(problems))
    return Training(settings={}, steps=None, method=methods.METHODS[site.method or HSDP.name])


def check_assets(settings: dict[str, Any], extra: Sequence[str], config: Path) -> None:
    """Check that the tokenizer and the data of ``config`` are there.

    Raises:
        UsageError: they are not; says how to get them.
    """
    tokenizer = setting(settings, extra, "model", "hf_assets_path")
    if tokenizer is not None:
        _check_tokenizer(Path(str(tokenizer)), config)
    for section in ("training", "validation"):
        if setting(settings, extra, section, "dataset") == "jsonl":
            path = setting(settings, extra, section, "dataset_path")
            _check_data(path, f"{section}.dataset_path of {config}")


def _learning(
    settings: dict[str, Any],
    site: Site,
    groups: int,
    nodes: int,
    steps: int | None,
    on_node: bool,
) -> Training:
    """How replica groups learn together.

    Raises:
        UsageError: they cannot, with every reason.
        ValueError: a setting is not what it should be.
    """
    extra = site.extra_args
    method = methods.resolve(site.method, settings, extra)
    schedule = methods.schedule(method, settings, extra)
    layout = Layout.of(settings, extra, site.ranks_per_node * nodes)
    interval = _whole(setting(settings, extra, "checkpoint", "interval"), "checkpoint.interval")
    capability = None
    if schedule is not None and schedule.quantize:
        capability = gpus.capability() if on_node else methods.FP8_CAPABILITY
    learning = Learning(
        method=method,
        schedule=schedule,
        layout=layout,
        steps=steps,
        device=site.device,
        process_group=str(setting(settings, extra, "fault_tolerance", "process_group") or "gloo"),
        capability=capability,
        checkpoint_interval=interval if switch(settings, extra, "checkpoint", "enable") else None,
    )
    found = [*learning.problems(), *_timeouts(settings, site, method)]
    sizes = None
    if not any(layout.problems()):
        try:
            sizes = batches(settings, extra, layout, groups)
        except ValueError as error:
            found.append(str(error))
    _refuse(site.config, found)
    return Training(settings=settings, steps=steps, method=method, schedule=schedule, batches=sizes)


def _refuse(config: Path, problems: Iterable[str]) -> None:
    if found := list(problems):
        raise UsageError(f"{config}: {'; '.join(found)}")


def _check_packages(*modules: str) -> None:
    missing = [_NEEDED[name] for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"this environment lacks {', '.join(missing)}: run `make setup`, or point TFT_ENV at "
            "the environment that has them"
        )


def load(config: Path) -> dict[str, Any]:
    """The torchtitan file ``config`` as parsed.

    Raises:
        UsageError: it is not there, cannot be read, or is not TOML.
    """
    try:
        with config.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise UsageError(
            f"config file {config} does not exist (from {Path.cwd()}): name (TFT_CONFIG) one of "
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


def _timeouts(settings: dict[str, Any], site: Site, method: Method) -> Iterator[str]:
    names = {
        "init_timeout_seconds": "comm",
        "train_timeout_seconds": "comm",
        "process_group_timeout_ms": "fault_tolerance",
    }
    known = {
        key: setting(settings, site.extra_args, section, key) for key, section in names.items()
    }
    quorum = method.quorum_timeout if site.quorum_timeout is None else site.quorum_timeout
    try:
        yield from timeouts.problems(known, quorum)
    except (TypeError, ValueError) as error:
        yield f"a timeout is not a number: {error}"


def _whole(value: Any, name: str) -> int | None:
    if value is None:
        return None
    try:
        return int(value)
    except (TypeError, ValueError):
        raise UsageError(f"{name} must be a whole number, not {value!r}") from None
