"""The monitor's live terminal view."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live

from launcher.interrupts import stop_on_signals
from launcher.monitor import await_start, conclude, line, looks
from launcher.outlets import Outlets
from launcher.rundir import RunDir
from launcher.scheduler import Scheduler
from launcher.screen import view
from launcher.watcher import Watcher
from launcher.witness import Witness

#: Seconds between two pictures while nothing happens, and the part of the time that drawing may take.
DRAW_EVERY, DRAWING = 1.0, 0.01


def follow_live(
    run: RunDir, slurm: Scheduler, outlets: Outlets, console: Console | None = None
) -> None:
    """Show a run until it ends; its story scrolls by above a table that stays.

    Raises:
        UsageError: an outlet cannot be opened.
        CriticalError: the run ended without having finished, or did not start.
        BlindError: at the end, a source could not be read.
    """
    console = console or Console(highlight=False, markup=False, emoji=False)
    await_start(run, say=console.print, slurm=slurm)
    draw_after = 0.0
    with Watcher.of_run(run, slurm) as watcher:
        watcher.witness = Witness(run)
        with (
            stop_on_signals(),  # the terminal gets its cursor back
            outlets.delivering(run, say=console.print) as delivery,
            Live(console=console, auto_refresh=False, transient=True) as live,
        ):
            for notices in looks(watcher, delivery):
                for notice in notices:
                    console.print(line(notice))
                began = time.monotonic()
                if not notices and began < draw_after:
                    continue
                width, height = console.size
                shown = view(watcher, run.name, time.time(), width=width, height=height - 1)
                live.update(shown, refresh=True)
                took = time.monotonic() - began
                draw_after = began + max(DRAW_EVERY, took / DRAWING)
        console.print(view(watcher, run.name, watcher.present))
        conclude(watcher, run)
