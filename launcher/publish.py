"""Reads a run to its end and writes its report."""

from __future__ import annotations

from pathlib import Path

from launcher.files import replace
from launcher.history import History
from launcher.model import ReportFormat, UsageError
from launcher.report import render
from launcher.rundir import RunDir
from launcher.scheduler import scheduler_of
from launcher.watcher import Watcher


def publish(run: RunDir, shape: ReportFormat, output: Path | None = None) -> Path:
    """Write the report of a run as it stands now; returns where it is.

    Args:
        output: the file to write; by default ``report.*`` in the run's directory.

    Raises:
        UsageError: ``output`` cannot be a file.
    """
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"cannot write {output}: {output.parent} is not a folder, make it first")
    if output is not None and output.is_dir():
        raise UsageError(f"cannot write {output}: it is a folder, name a file in it")
    history = History()
    with Watcher.of_run(run, scheduler_of(run)) as watcher:
        watcher.on_event = history.note
        watcher.look(final=True)
        return write(run, watcher, history, shape, output)


def write(
    run: RunDir,
    watcher: Watcher,
    history: History,
    shape: ReportFormat,
    output: Path | None = None,
) -> Path:
    """Write the report of a run that has been watched; returns where it is."""
    state = watcher.state
    history.check(state)
    if state.finished:
        watcher.blind.pop(state.scheduler, None)  # nothing is left that it could tell
    end = state.last_event if state.finished else watcher.present
    path = output or run.report(shape.suffix)
    text = render(shape, run.manifest(), state, history, watcher.findings(end), end)
    replace(path, text)
    return path
