"""Reads the layers of settings, checks them all, and lays them over each other.

Command line over environment over run file over cluster profile over default. Profile and run
file are YAML with the keys of `settings.SETTINGS`; every problem of every layer is told at once,
with file and line.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import reprlib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from launcher.model import UsageError
from launcher.settings import BY_KEY, SETTINGS, Resolved, Setting, ports
from launcher.variables import VARIABLES

#: Folder of the cluster profiles, from the repository's root.
PROFILES = Path("configs/clusters")
#: What a run file says of itself.
PROFILE_KEY = "profile"
#: Keys that name something secret: a file that is shared is no place for those.
_SECRET = re.compile(
    r"(^|_)(TOKEN|SECRET|PASS(WORD|WD)?|PAT|KEY|WEBHOOK|CREDENTIALS?)(_|$)", re.IGNORECASE
)
#: Flags of sbatch that are not a site's to give; shorter forms of them are refused, too.
_TAKEN = (
    "array", "export", "export-file", "parsable", "wrap", "output", "error", "requeue", "no-requeue",
    "wait", "test-only", "signal", "open-mode", "chdir", "nodes", "ntasks", "ntasks-per-node",
    "gpus", "gpus-per-node", "gpus-per-task", "cpus-per-task", "clusters", "job-name",
)  # fmt: skip
#: Names of environment variables.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Layer:
    """What one place says."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]
    """For each key, where it is said."""


def resolve(
    flags: Mapping[str, Any],
    env: Mapping[str, str],
    *,
    run_file: Path | None = None,
    profile: str = "",
) -> Resolved:
    """Lay the layers over each other.

    Args:
        flags: what the command line says, by key; None and empty lists are not said.
        profile: name of a cluster profile, or its path; empty: the environment's
            (``TFT_PROFILE``), the run file's, or none.

    Raises:
        UsageError: names every problem of every layer.
    """
    problems: list[str] = []
    layers = [_of_flags(flags, problems), _of_environment(env, problems)]
    choices = [(profile, "command line"), (env.get("TFT_PROFILE", ""), "$TFT_PROFILE")]
    if run_file is not None:
        layer, named = _of_file(run_file, problems, of_a_run=True)
        layers.append(layer)
        choices.append((named, str(run_file)))
    chosen = next((choice for choice in choices if choice[0]), None)
    known = ("-", "default")
    if chosen is not None:
        try:
            path = profile_path(chosen[0])
            layers.append(_of_file(path, problems, of_a_run=False)[0])
            known = str(path), chosen[1]
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n  ".join(["these settings are wrong:", *problems]))
    return dataclasses.replace(_merged(layers), profile=known)


def profile_path(name: str) -> Path:
    """The file of a cluster profile.

    Raises:
        UsageError: there is none of that name; lists those there are.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if path.is_file():
        return path
    known = sorted(each.stem for each in PROFILES.glob("*.yaml"))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {near[0]}?" if near else f"; there are {', '.join(known) or 'none'}"
    raise UsageError(f"no cluster profile {path}{hint}")


def _merged(layers: Sequence[Layer]) -> Resolved:
    """``layers``: strongest first."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in reversed(layers):
        for key, value in layer.values.items():
            before = values.get(key)
            if BY_KEY[key].adds_up and before:
                value = before | value if isinstance(value, dict) else [*before, *value]
                sources[key] = f"{sources[key]}, {layer.sources[key]}"
            else:
                sources[key] = layer.sources[key]
            values[key] = value
    return Resolved(values, sources)


# -- one layer each ------------------------------------------------------------------


def _of_flags(flags: Mapping[str, Any], problems: list[str]) -> Layer:
    said = {key: value for key, value in flags.items() if value not in (None, "", [], ())}
    sources = dict.fromkeys(said, "command line")
    names = {key: f"--{key.replace('_', '-')}" for key in said} | {"sbatch_flags": "--sbatch"}
    return _checked(said, sources, names, problems)


def _of_environment(env: Mapping[str, str], problems: list[str]) -> Layer:
    said: dict[str, Any] = {}
    for setting in SETTINGS:
        if setting.variable and (text := env.get(setting.variable)):
            try:
                said[setting.key] = _from_text(setting, text)
            except ValueError as error:
                problems.append(f"{setting.variable}: {error}")
    names = {key: BY_KEY[key].variable for key in said}
    return _checked(said, {key: f"${name}" for key, name in names.items()}, names, problems)


def _of_file(path: Path, problems: list[str], *, of_a_run: bool) -> tuple[Layer, str]:
    """A YAML file as a layer, and the profile that it names."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except FileNotFoundError:
        problems.append(f"{path} does not exist")
        return Layer({}, {}), ""
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path} cannot be read: {error}")
        return Layer({}, {}), ""
    except RecursionError:
        problems.append(f"{path}: not valid YAML: it is nested too deeply")
        return Layer({}, {}), ""
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        problems.append(f"{path}{where}: not valid YAML: {why}")
        return Layer({}, {}), ""
    if raw is None:
        return Layer({}, {}), ""
    if not isinstance(raw, dict) or not isinstance(tree, yaml.MappingNode):
        problems.append(f"{path}: must be keys and values, like `partition: h100`")
        return Layer({}, {}), ""
    lines: dict[str, int] = {}
    for key_node, _ in tree.value:
        key, line = str(key_node.value), key_node.start_mark.line + 1
        if key_node.tag != "tag:yaml.org,2002:str":
            problems.append(f"{path}:{line}: {key} is no text, as every key must be")
            return Layer({}, {}), ""
        if key in lines:
            problems.append(f"{path}:{line}: {key} is said twice (line {lines[key]})")
        lines[key] = line
    said = {key: value for key, value in raw.items() if value is not None}
    named = str(said.pop(PROFILE_KEY, "") if of_a_run else "")
    for key in [key for key in said if key in BY_KEY]:
        if BY_KEY[key].of_a_run and not of_a_run:
            problems.append(
                f"{path}:{lines[key]}: {key} is a run's own, not a cluster's: put it into a run file"
            )
            del said[key]
    names = {key: f"{path}:{lines[key]}: {key}" for key in said}
    return _checked(said, {key: f"{path}:{lines[key]}" for key in said}, names, problems), named


def _checked(
    said: Mapping[str, Any],
    sources: Mapping[str, str],
    names: Mapping[str, str],
    problems: list[str],
) -> Layer:
    """Check types and values; ``names`` is how a problem of a key begins."""
    from pydantic import TypeAdapter, ValidationError

    kinds, values = _kinds(), {}
    for key, value in said.items():
        if key not in BY_KEY:
            known = [*BY_KEY, PROFILE_KEY]
            near = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            problems.append(f"{names[key]} is not a setting{hint}")
            continue
        kind, words = kinds[BY_KEY[key].kind]
        try:
            values[key] = TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError:
            # (What variables hold may be secret.)
            what = "" if key == "variables" else f", not {reprlib.repr(value)}"
            problems.append(f"{names[key]} must be {words}{what}")
            continue
        problems += _more_problems(key, values[key], names[key])
    return Layer(values, sources)


def _more_problems(key: str, value: Any, name: str) -> Iterator[str]:
    if key == "lighthouse_ports":
        first, last = ports(value)
        if not 1024 <= first <= last - 8 <= 65527:
            yield f"{name}: {value} is no range of at least nine ports from 1024 up"
    if key == "sbatch_flags":
        for flag in value:
            word = flag.partition("=")[0].removeprefix("--")
            taken = [own for own in _TAKEN if word and own.startswith(word)]
            if taken or not flag.startswith("--") or not word:
                why = f"the launcher sets --{taken[0]} itself" if taken else "flags begin with --"
                yield f"{name}: {flag!r} cannot be given: {why}"
    if key == "variables":
        settings = {s.variable: s.key for s in SETTINGS if s.variable}
        known = {v.name for v in VARIABLES}
        for variable in value:
            if not _NAME.fullmatch(variable):
                yield f"{name}: {variable!r} is not the name of a variable"
            elif _SECRET.search(variable):
                yield f"{name}: {variable} is a secret: export it in your shell, keep it out of files"
            elif variable in settings or variable == "TFT_RUN":
                yield f"{name}: {variable} cannot be set here: say {settings.get(variable, 'nothing')}"
            elif variable.startswith("TFT_") and variable not in known:
                near = difflib.get_close_matches(variable, sorted(known), n=1)
                hint = f": did you mean {near[0]}?" if near else ""
                yield f"{name}: {variable} is not a variable of this kit{hint}"


def _kinds() -> dict[str, tuple[Any, str]]:
    """Types by name, as pydantic checks them, and what they are in words."""
    from pydantic import Field, StringConstraints

    def text(pattern: str) -> Any:
        return Annotated[str, StringConstraints(pattern=pattern)]

    line = text(r"^[^\x00-\x1f\x7f]+$")
    return {
        "text": (text(r"^[^\x00]+$"), "text"),
        "name": (line, "text in one line (in quotes where YAML takes it for something else)"),
        "count": (Annotated[int, Field(ge=1, le=100_000)], "a whole number from 1 up"),
        "whole": (Annotated[int, Field(ge=0, le=100_000)], "a whole number from 0 up"),
        "list": (_list_of(text(r"^[^\x00]+$")), "a list of words"),
        "words": (_list_of(text(r"^[^\x00-\x20\x7f]+$")), "a list of words without spaces"),
        "device": (Literal["cuda", "cpu"], "cuda or cpu"),
        "timeouts": (Literal["default", "fast"], "default or fast"),
        "method": (
            Literal["hsdp", "ddp", "local-sgd", "diloco"],
            "hsdp, ddp, local-sgd or diloco",
        ),
        "duration": (
            text(r"^(\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}|UNLIMITED|infinite)$"),
            "a time as sbatch takes it, in quotes: '24:00:00' or '7-00:00:00'",
        ),
        "memory": (text(r"^\d+[KMGT]?$"), "an amount as sbatch takes it, in quotes: '512G' or '0'"),
        "url": (text(r"^https?://[^\s/]+:\d+/?$"), "an address like http://login-0:29510"),
        "ports": (text(r"^\d{1,5}-\d{1,5}$"), "a range like 29510-29699"),
        "variables": (dict[str, str], "names with texts (numbers in quotes)"),
    }


def _list_of(kind: Any) -> Any:
    return list[kind]


def _from_text(setting: Setting, text: str) -> Any:
    if setting.kind in ("count", "whole"):
        if not re.fullmatch(r"\d{1,6}", text):
            raise ValueError(f"must be a whole number, not {text!r}")
        return int(text)
    if setting.kind == "words":
        return text.split()
    if setting.kind == "list":
        try:
            return shlex.split(text)
        except ValueError as error:
            raise ValueError(f"is not a well-quoted list ({error})") from None
    return text
