"""Looks at everything that a run will need, before it does: machine, training, Slurm, nodes.

Reads, and starts two kinds of small jobs that it ends itself; it changes nothing.
"""

from __future__ import annotations

import dataclasses
import getpass
import json
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher import (
    checks_here,
    checks_node,
    checks_slurm,
    checks_training,
    surroundings,
)
from launcher.checks import Grade, Result, Section, blind, exit_code, failed, passed, warning
from launcher.doctor_job import QUEUE_SECONDS, Errand, Found
from launcher.interrupts import stop_on_signals
from launcher.listener import Listener
from launcher.model import KitError, UsageError
from launcher.opening import TORCHTITAN_JOB
from launcher.rundir import Outputs
from launcher.slurm import Slurm, SlurmError
from launcher.target import Target

if TYPE_CHECKING:
    from rich.console import Console

_STYLE = {
    Grade.PASSED: "green",
    Grade.WARNING: "yellow",
    Grade.FAILED: "bold red",
    Grade.BLIND: "magenta",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """How far the doctor looks."""

    job: bool = True
    """Whether a small job looks at a node."""
    deep: bool = False
    """Whether an all-reduce is run between nodes."""
    nodes: int = 2
    """Over how many."""
    queue_seconds: float = QUEUE_SECONDS
    """How long each job may wait for nodes."""


def examine(
    target: Target,
    scope: Scope,
    slurm: Slurm,
    env: Mapping[str, str],
    say: Callable[[str], None],
) -> list[Section]:
    """Every check, place by place. Takes at most some minutes, with jobs that do not start.

    Args:
        say: told what it waits for.
    """
    token = secrets.token_hex(8)
    outputs = Outputs(target.outputs)
    pinned = checks_here.pins(surroundings.requirements())
    versions = surroundings.versions(pinned)
    known = surroundings.lighthouses(outputs)
    listener = Listener(surroundings.ports(target), token, surroundings.bind(target))
    with stop_on_signals(), listener:
        machine = [
            checks_here.python(
                sys.version_info[:3], surroundings.prefix(), surroundings.environment(target)
            ),
            *checks_here.packages(pinned, versions),
            *_machine(target, env, known, listener),
        ]
        sections = [
            Section(name="this machine", results=machine),
            Section(name="training", results=list(_training(target))),
        ]
        cluster = list(_cluster(target, slurm))
        sections.append(Section(name="Slurm", results=cluster))
        if not scope.job:
            skipped = blind("a node", "--no-job: nothing was submitted", needed=False)
            return [*sections, Section(name="a node", results=[skipped])]
        if any(_stops(result) for result in cluster):
            unasked = blind("a node", "nothing was submitted: Slurm would not take it, see above")
            return [*sections, Section(name="a node", results=[unasked])]
        errand = Errand(target, slurm, token, say)
        places = surroundings.places(target, known, listener.open)
        asked = {"packages": list(pinned), "reach": places, "device": target.device}
        node = _job(
            "a node",
            errand,
            lambda: errand.node(asked, scope.queue_seconds),
            lambda found: checks_node.node(target, found, versions, deep=scope.deep),
        )
        sections.append(Section(name="a node", results=node))
        if scope.deep:
            between = _job(
                "all-reduce",
                errand,
                lambda: errand.deep(scope.nodes, scope.queue_seconds),
                lambda found: checks_node.between(target, found, scope.nodes),
            )
            sections.append(Section(name="between nodes", results=between))
    return sections


def _machine(
    target: Target,
    env: Mapping[str, str],
    known: surroundings.Lighthouses,
    listener: Listener,
) -> Iterator[Result]:
    settings, problem = surroundings.training(target)
    writes = surroundings.writes_checkpoints(target, settings)
    yield checks_here.limits(surroundings.open_files())
    yield checks_here.outputs(target.outputs, *surroundings.space(target.outputs), writes)
    taken = surroundings.holders(listener.taken)
    yield checks_here.ports(target.lighthouse_port, taken, known.own_ports())
    tokenizer = settings is not None and not problem.startswith("no tokenizer")
    yield from checks_here.tokens(surroundings.hub_token(), surroundings.wandb_key(env), tokenizer)
    several = () if target.lighthouse else known.free
    visits = surroundings.old_visits(Outputs(target.outputs))
    yield checks_here.leftovers(known.stale, several, visits)


def _training(target: Target) -> Iterator[Result]:
    settings, problem = surroundings.training(target)
    if problem:
        yield _of_error("configuration", problem)
    else:
        yield passed("configuration", f"{target.config}, its tokenizer and data are there")
    if settings is not None:
        extra = target.extra_args
        yield from checks_training.timeouts_order(settings, extra, target.quorum_timeout)
        yield from checks_training.healing(settings, extra, target.device)


def _cluster(target: Target, slurm: Slurm) -> Iterator[Result]:
    missing = surroundings.missing_commands()
    yield checks_here.commands(missing)
    if missing:
        yield blind("Slurm", "its commands are not here")
        return
    try:
        config = slurm.config()
    except KitError as error:
        yield blind("Slurm", _last_line(error), "`scontrol ping` asks whether its controller is up")
        return
    yield from checks_slurm.settings(config)
    try:
        partitions = slurm.partitions()
        results = list(checks_slurm.partition(target, partitions))
        yield from results
        chosen = checks_slurm.chosen_partition(target, partitions)
        if chosen is None or any(result.grade is Grade.FAILED for result in results):
            return
        yield from checks_slurm.nodes(target, slurm.resources(chosen.name))
    except KitError as error:
        yield blind("partition", _last_line(error))
        return
    there = dataclasses.replace(target, partition=chosen.name)
    try:
        known = slurm.associations(getpass.getuser())
        yield checks_slurm.account(there, config, known)
    except KitError as error:
        yield checks_slurm.account(there, config, _last_line(error))
    yield _job_script(target, slurm)


def _job_script(target: Target, slurm: Slurm) -> Result:
    flags = list(target.job_flags)
    if target.device == "cuda" and not any(f.startswith("--gpus-per-node=") for f in flags):
        flags.append(f"--gpus-per-node={target.ranks_per_node}")
    try:
        said = slurm.would_start(flags, TORCHTITAN_JOB).splitlines()[-1:]
    except SlurmError as error:
        words = str(error).partition(f"{TORCHTITAN_JOB}: ")[2] or str(error)
        return failed(
            "job script",
            f"Slurm would refuse {TORCHTITAN_JOB}: {'; '.join(words.splitlines())}",
            "its header asks for a node of 8 GPUs and 128 CPUs: say gpus_per_node and cpus_per_node in "
            "the profile, or give sbatch flags such as --cpus-per-task=64, which win over it",
        )
    except KitError as error:
        return blind("job script", _last_line(error))
    return passed("job script", f"Slurm would take {TORCHTITAN_JOB} ({''.join(said)[:120]})")


def _stops(result: Result) -> bool:
    """Whether a job cannot be submitted, after what was found of Slurm."""
    if result.grade is Grade.FAILED:
        return result.check in ("commands", "partition", "nodes", "account")
    return result.grade is Grade.BLIND and result.check in ("Slurm", "partition")


def _job(
    check: str,
    errand: Errand,
    look: Callable[[], Found],
    judge: Callable[[Found], Iterable[Result]],
) -> list[Result]:
    try:
        results = list(judge(look()))
    except UsageError as error:
        results = [_of_error(check, str(error))]
    except SlurmError as error:
        said = str(error).rpartition(f"{errand.visit.path}: ")[2]
        results = [blind(check, f"Slurm refuses the job: {said}", "--no-job looks without")]
    except KitError as error:
        results = [blind(check, _last_line(error), "--no-job looks without")]
    if errand.left:
        results.append(warning("clean-up", errand.left, "run that command"))
    return results


def _last_line(error: KitError) -> str:
    """Slurm says what matters last."""
    return str(error).strip().splitlines()[-1]


def _of_error(check: str, message: str) -> Result:
    """A failure from an error's one line, whose end says what to do."""
    match = re.fullmatch(
        r"(.*?)(?:: |, or )((?:run|set|mend|clone|choose)\b.*)", message, re.DOTALL
    )
    if match is None:
        return failed(check, message, "mend that")
    return failed(check, match[1], match[2])


def verdict(sections: Sequence[Section]) -> str:
    """One line of how many checks ended how."""
    results = [result for section in sections for result in section.results]
    counts = [(sum(result.grade is grade for result in results), grade.value) for grade in Grade]
    return ", ".join(f"{count} {word}" for count, word in counts if count)


def as_json(sections: Sequence[Section]) -> str:
    """The same as data; its shape is in docs/doctor.md."""
    results = [result for section in sections for result in section.results]
    value = {
        "exit_code": exit_code(results),
        "sections": [
            {
                "name": section.name,
                "checks": [
                    {
                        "check": result.check,
                        "result": result.grade.value,
                        "found": result.found,
                        "remedy": result.remedy,
                        "needed": result.needed,
                    }
                    for result in section.results
                ],
            }
            for section in sections
        ],
    }
    return json.dumps(value, indent=2)


def lines(sections: Sequence[Section]) -> Iterator[str]:
    """Plain lines, for where there is no terminal."""
    for section in sections:
        yield f"== {section.name}"
        for result in section.results:
            yield f"{result.grade.value:<14} {result.check}: {result.found}"
            if result.remedy:
                yield f"{'':<14}   remedy: {result.remedy}"
    yield f"doctor: {verdict(sections)}"


def show(sections: Sequence[Section], console: Console) -> None:
    """A table, for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("check", min_width=18)
    table.add_column("", min_width=14)
    table.add_column("found", overflow="fold")
    for section in sections:
        table.add_row(Text(section.name, style="bold"))
        for result in section.results:
            found = Text(result.found)
            if result.remedy:
                found.append(f"\n→ {result.remedy}", style="bold")
            style = _STYLE[result.grade]
            table.add_row(f"  {result.check}", Text(result.grade.value, style=style), found)
    console.print(table)
    console.print(f"doctor: {verdict(sections)}")
