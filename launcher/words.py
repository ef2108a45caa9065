"""Numbers, times and texts from logs, as a person reads them. Pure."""

from __future__ import annotations

import datetime

#: Characters of one text that came from a log.
MOST_CHARACTERS = 600


def clean(text: str) -> str:
    """``text`` on one line, bounded, without what cannot be printed."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text.strip())
    return shown if len(shown) <= MOST_CHARACTERS else shown[: MOST_CHARACTERS - 1] + "…"


def clock(t: float, *, date: bool = False) -> str:
    """Local time of day, to the second; with the day where that must be said."""
    return datetime.datetime.fromtimestamp(t).strftime("%Y-%m-%d %H:%M:%S" if date else "%H:%M:%S")


def zone(start: float, end: float) -> str:
    """Which zone the local times between two moments (Unix seconds) are in: ``UTC+01:00 (CET)``.

    Both of them where the clocks were changed in between.
    """
    first, last = (_zone(datetime.datetime.fromtimestamp(t).astimezone()) for t in (start, end))
    return first if first == last else f"{first}, at the end {last}"


def _zone(local: datetime.datetime) -> str:
    offset, name = local.strftime("%z"), local.tzname() or ""
    offset = f"UTC{offset[:3]}:{offset[3:5]}"
    if name == "UTC":
        return name
    # (Some zones have no name but their offset.)
    return f"{offset} ({name})" if name.isalpha() else offset


def seconds(value: float) -> str:
    """A duration in the two units that say most."""
    if value < 59.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(value / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


def plural(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def ago(duration: float) -> str:
    """A duration in one unit, for a narrow column."""
    duration = max(0.0, duration)
    if duration < 100:
        return f"{duration:.0f} s"
    if duration < 6000:
        return f"{duration / 60:.0f} min"
    return f"{duration / 3600:.1f} h"
