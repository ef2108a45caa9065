"""Which settings torchtitan has, read from its source: importing it would load torch.

A mistake in a flag or a config file is told before anything is submitted, with the name that was
perhaps meant; torchtitan itself would tell it in every rank of every replica group.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from launcher.titan import setting

#: Where torchtitan 0.2.2 keeps its settings, and those of torchft's methods.
_FILES = ("config/job_config.py", "components/ft/config/job_config.py")
#: The ``job.custom_config_module`` that adds the latter; the launcher sets it where a method needs it.
_OF_METHODS = "torchtitan.components.ft.config"
#: Name of a setting, to its type as the source has it.
Names = Mapping[str, str]


def problems(settings: Mapping[str, Any], extra: Sequence[str], config: object) -> list[str]:
    """What torchtitan would refuse in a config file and in flags, by name or type.

    Empty when its settings are not known: torchtitan is not here, or a config module of the user's own
    adds to them.

    Args:
        settings: the file as parsed.
        config: its path, for the messages.
    """
    module = str(setting(settings, extra, "job", "custom_config_module") or "")
    known = _known() if module in ("", _OF_METHODS) else {}
    if not known:
        return []
    return [*_in_file(settings, known, config), *_in_flags(extra, known)]


def _in_file(settings: Mapping[str, Any], known: Names, config: object) -> Iterator[str]:
    for name, value in _leaves(settings, known):
        if name not in known:
            yield f"{config}: torchtitan has no setting {name}{_near(name, known)}"
        elif problem := _misfit(known[name], value):
            yield f"{config}: {name} must be {problem}, not {value!r}"


def _in_flags(extra: Sequence[str], known: Names) -> Iterator[str]:
    words = list(extra)
    while words:
        word = words.pop(0)
        told, separator, value = word.removeprefix("--").partition("=")
        name = told.replace("-", "_")
        section, _, leaf = name.rpartition(".")
        negated = f"{section}.{leaf.removeprefix('no_')}"
        if not word.startswith("--"):
            yield f"{word!r} stands after no flag that takes a value"
        elif name not in known and leaf.startswith("no_") and known.get(negated) == "bool":
            if separator:
                yield f"--{told} is a switch, and takes no value"
        elif name not in known:
            yield f"torchtitan has no flag --{told}{_near(name, known, '--')}"
            words = _from_next_flag(words)
        elif known[name] == "bool":
            if separator:
                yield f"--{told} is a switch: --{told}, or --{section}.no_{leaf}, without a value"
        elif not separator and (not words or words[0].startswith("--")):
            yield f"--{told} needs a value"
        else:
            value = value if separator else words.pop(0)
            if problem := _misfit(known[name], value):
                yield f"--{told} must be {problem}, not {value!r}"
            if known[name].startswith("list["):
                words = _from_next_flag(words)


def _from_next_flag(words: list[str]) -> list[str]:
    return list(itertools.dropwhile(lambda word: not word.startswith("--"), words))


def _leaves(part: Mapping[str, Any], known: Names, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in part.items():
        name = f"{path}{key}"
        is_section = any(other.startswith(f"{name}.") for other in known)
        if isinstance(value, Mapping) and (is_section or name not in known):
            yield from _leaves(value, known, f"{name}.")
        else:
            yield name, value


def _misfit(kind: str, value: Any) -> str:
    """What a value must be, in words, when it is not; only where that is certain."""
    kinds = [each.strip() for each in kind.split(" | ")]
    if "None" in kinds and value in (None, "None"):
        return ""
    if kinds[0].startswith("Literal["):
        choices = [str(each) for each in ast.literal_eval(kinds[0][len("Literal") :])]
        return "" if str(value) in choices else f"one of {', '.join(choices)}"
    for numeric, convert, words in (
        ("float", float, "a number"),
        ("int", int, "a whole number"),
        ("bool", _switch, "true or false"),
    ):
        if numeric in kinds:
            try:
                convert(value)
            except (TypeError, ValueError):
                return words
            return ""
    return ""


def _switch(value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(value)


def _near(name: str, known: Names, prefix: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    # The right name in the wrong section is as usual as a slip of the keys.
    near = near or [each for each in known if each.rpartition(".")[2] == name.rpartition(".")[2]]
    return f": is {prefix}{near[0]} meant?" if near else ""


@cache
def _known() -> Names:
    """Every setting; empty when they cannot be read."""
    package = importlib.util.find_spec("torchtitan")
    if package is None or not package.submodule_search_locations:
        return {}
    root = Path(next(iter(package.submodule_search_locations)))
    names: dict[str, str] = {}
    try:
        for file in _FILES:
            names |= _named(_classes((root / file).read_text(encoding="utf-8")), "JobConfig", "")
    except (OSError, SyntaxError, KeyError):
        return {}
    return names


def _named(
    classes: Mapping[str, Mapping[str, str]], owner: str, path: str
) -> Iterator[tuple[str, str]]:
    for field, kind in classes[owner].items():
        if kind in classes:
            yield from _named(classes, kind, f"{path}{field}.")
        else:
            yield f"{path}{field}", kind


def _classes(source: str) -> dict[str, dict[str, str]]:
    """Fields of each class, with their annotations."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                line.target.id: ast.unparse(line.annotation)
                for line in node.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            }
    return found
