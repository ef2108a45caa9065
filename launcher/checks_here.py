"""What the doctor thinks of the machine it runs on. Pure: what is read comes as arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from launcher.checks import Result, blind, failed, passed, warning

#: Versions of Python on which the pinned packages install and are tested.
PYTHONS = ((3, 11), (3, 13))
#: Packages without which nothing trains.
VITAL = ("torch", "torchft-nightly", "torchtitan")
#: What a version older than the pin means, where it is known.
OLDER = {
    "torchft-nightly": "an older one may not survive a restart of the lighthouse (the reference "
    "recipe's dies of it)",
}
#: Soft limit of open files below which a job's ranks may run out (Linux's own default).
MIN_FILES = 1024
#: Bytes that the logs and events of some runs take.
MIN_FREE = 1 << 30
#: A checkpoint of Llama 3.1 8B: 8.03e9 parameters, each with two moments, 4 bytes each.
CHECKPOINT_BYTES = 96e9


def python(version: Sequence[int], prefix: Path, environment: Path | None) -> Result:
    """The interpreter. ``prefix`` is its environment, ``environment`` that of the job scripts (None:
    it is not there); both with links followed."""
    said = f"Python {'.'.join(map(str, version[:3]))}"
    if not PYTHONS[0] <= tuple(version[:2]) <= PYTHONS[1]:
        return failed(
            "Python",
            f"{said}; the pinned packages are for 3.11 to 3.13",
            "make the environment anew with one of those: make setup PYTHON=python3.11",
        )
    if environment is None:
        return failed(
            "Python",
            f"{said}; the environment that the job scripts activate is not there (TFT_ENV)",
            "run `make setup`, or set TFT_ENV to one that is",
        )
    if prefix != environment:
        return warning(
            "Python",
            f"{said} of {prefix}; the job scripts activate {environment} (TFT_ENV)",
            "activate that one here as well, or set TFT_ENV",
        )
    return passed("Python", f"{said} of {prefix}")


def pins(text: str) -> dict[str, str]:
    """Exact versions in a requirements file, by package."""
    return dict(re.findall(r"^([\w.-]+)==([\w.+-]+)", text, re.MULTILINE))


def packages(pinned: Mapping[str, str], installed: Mapping[str, str]) -> Iterator[Result]:
    """Installed versions against the pins."""
    if not pinned:
        yield blind("packages", "requirements.txt names no versions", "run `git checkout` for it")
        return
    remedy = "run `make setup`"
    others = [name for name in pinned if is_other(installed.get(name, ""), pinned[name])]
    for name in others:
        have = installed.get(name)
        said = f"{name} {have}, and {pinned[name]} is pinned" if have else f"{name} is missing"
        if have and name in OLDER and _numbers(have) < _numbers(pinned[name]):
            said += f": {OLDER[name]}"
        make = failed if name in VITAL or not have else warning
        yield make("packages", said, remedy)
    if len(others) < len(pinned):
        vital = ", ".join(f"{name} {installed[name]}" for name in VITAL if name not in others)
        count = len(pinned) - len(others)
        yield passed("packages", f"{count} of {len(pinned)} as pinned ({vital or 'no torch'})")


def is_other(version: str, pinned: str) -> bool:
    """Whether two versions differ; a build's own suffix (``2.13.0+cu130``) does not count."""
    return version.partition("+")[0] != pinned.partition("+")[0]


def _numbers(version: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", version.partition("+")[0])]


def commands(missing: Sequence[str]) -> Result:
    if missing:
        return failed(
            "commands",
            f"not on PATH: {', '.join(missing)}",
            "run this on a login node of the cluster, or try the kit without one: README.md, "
            "'Without a cluster'",
        )
    return passed("commands", "Slurm's are there")


def limits(files: int) -> Result:
    """``files``: soft limit of open files; -1: none."""
    if 0 <= files < MIN_FILES:
        return warning(
            "open files",
            f"{files} (ulimit -n); Slurm passes the limit on to jobs, and {MIN_FILES} are usual",
            f"ulimit -n {MIN_FILES} before you submit",
        )
    return passed("open files", "no limit" if files < 0 else f"{files} (ulimit -n)")


def outputs(folder: Path, problem: str, free: int, checkpoints: bool) -> Result:
    """The folder of runs. ``problem``: why it cannot be written; empty when it can. ``free``:
    bytes."""
    if problem:
        return failed(
            "outputs",
            f"{folder} cannot be written: {problem}",
            "set TFT_OUTPUTS to a folder of yours on the shared file system",
        )
    said = f"{folder} can be written; {free / 1e9:.1f} GB are free"
    if free < MIN_FREE:
        return failed("outputs", said, "free some: logs of a run need about a gigabyte")
    if checkpoints and free < CHECKPOINT_BYTES:
        return warning(
            "outputs",
            f"{said}; one checkpoint of Llama 3.1 8B takes about {CHECKPOINT_BYTES / 1e9:.0f} GB",
            "free some, or set TFT_OUTPUTS to a larger file system",
        )
    return passed("outputs", said)


def ports(first: int, taken: Mapping[int, str], own: Sequence[int]) -> Result:
    """Ports of a lighthouse here.

    Args:
        first: its own; its processes take one of the eight after it.
        taken: who holds them, in words, of those that cannot be opened.
        own: those held by our lighthouse.
    """
    strange = {port: holder for port, holder in taken.items() if port not in own}
    if first in strange:
        return failed(
            "ports",
            f"{first} cannot be opened: {strange[first]}",
            "set TFT_LIGHTHOUSE_PORT to another (ten apart from others' is a good distance)",
        )
    after = [port for port in strange if port != first]
    if len(after) >= 8:
        return warning(
            "ports",
            f"all eight after {first} are taken: the lighthouse uses any free port instead",
            "set TFT_LIGHTHOUSE_PORT to another, if nodes reach only some ports of this machine",
        )
    ours = f", {len(own)} by our lighthouse" if own else ""
    return passed("ports", f"{9 - len(taken)} of {first} to {first + 8} are free{ours}")


def tokens(hub: bool, wandb: bool, tokenizer: bool) -> Iterator[Result]:
    """Whether there are tokens (never which)."""
    if not hub and not tokenizer:
        yield warning(
            "Hugging Face token",
            "absent, and the tokenizer is not here yet",
            "accept the licence of the model, then `hf auth login`, or set HF_TOKEN",
        )
    else:
        yield passed("Hugging Face token", "present" if hub else "absent; the tokenizer is here")
    said = "present: training logs there" if wandb else "absent: training does not log there"
    yield passed("W&B key", said)


def leftovers(stale: Sequence[str], several: Sequence[str], visits: Sequence[Path]) -> Result:
    """What earlier lighthouses and doctors have left.

    Args:
        stale: published lighthouses that do not run, in words.
        several: URLs, where more than one is published and none is chosen.
        visits: folders of doctors that did not end well.
    """
    if len(several) > 1:
        return failed(
            "leftovers",
            f"several lighthouses are published: {', '.join(several)}",
            "set TORCHFT_LIGHTHOUSE to one of them, or end those that serve nobody (`lighthouse "
            "status` and `down`)",
        )
    if stale:
        return warning(
            "leftovers",
            f"published, and not up: {'; '.join(stale)}",
            "`lighthouse up` starts it again; delete its folder below lighthouses/ if it is not wanted",
        )
    if visits:
        return warning(
            "leftovers",
            f"{len(visits)} folders of a doctor that was killed, such as {visits[0]}",
            "delete them",
        )
    return passed("leftovers", "none: no lighthouse is published that does not run")
