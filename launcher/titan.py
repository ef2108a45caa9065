"""torchtitan's settings as it will see them: its config file, and flags that win over it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def setting(settings: Mapping[str, Any], extra: Sequence[str], section: str, key: str) -> Any:
    """``section.key`` as torchtitan will see it: the last flag wins over the file.

    Returns:
        A string from a flag, what TOML made of it from the file; None where neither says it.
    """
    names = (f"--{section}.{key}", f"--{section}.{key.replace('_', '-')}")
    value: Any = None
    for position, flag in enumerate(extra):
        name, separator, rest = flag.partition("=")
        if name in names:
            following = extra[position + 1] if position + 1 < len(extra) else None
            value = rest if separator else following
    return in_file(settings, section, key) if value is None else value


def in_file(settings: Mapping[str, Any], section: str, key: str) -> Any:
    """``section.key`` of the config file; None where it is not said."""
    part = settings.get(section, {})
    return part.get(key) if isinstance(part, Mapping) else None


def switch(
    settings: Mapping[str, Any], extra: Sequence[str], section: str, key: str
) -> bool | None:
    """The same of a setting that is on or off: ``--section.key`` and ``--section.no_key``; None
    when neither file nor flags say anything."""
    told = in_file(settings, section, key)
    on = None if told is None else bool(told)
    for flag in extra:
        name = flag.replace("-", "_").removeprefix("__")
        if name in (f"{section}.{key}", f"{section}.no_{key}"):
            on = name == f"{section}.{key}"
    return on


def whole(
    settings: Mapping[str, Any], extra: Sequence[str], section: str, key: str, default: int
) -> int:
    """The same of a whole number.

    Raises:
        ValueError: it is none; says which setting.
    """
    value = setting(settings, extra, section, key)
    if value is None:
        return default
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"{section}.{key} must be a whole number, not {value!r}") from None
