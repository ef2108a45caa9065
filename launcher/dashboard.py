"""A workspace in Weights & Biases for a run, or for all runs of a project, built in code.

Only what `wandb-workspaces` publishes as its model is used; a dry run needs no network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from launcher.environment import wandb_project
from launcher.model import KitError, UsageError

#: Title and x axis, then (panel, what it plots) of each section. Names that begin with ``tft/``
#: are the controller's (``launcher/wandb_sink.py``), the others torchtitan's.
SECTIONS: tuple[tuple[str, str, tuple[tuple[str, tuple[str, ...]], ...]], ...] = (
    (
        "Training",
        "Step",
        (
            ("Loss", ("loss_metrics/global_avg_loss",)),
            ("Tokens per second and device", ("throughput(tps)",)),
            ("MFU (%)", ("mfu(%)",)),
            ("Gradient norm", ("grad_norm",)),
        ),
    ),
    (
        "Fault tolerance",
        "Seconds since the run's start",
        (
            ("Quorum size", ("tft/quorum_members",)),
            ("Incidents", ("tft/incidents",)),
            ("Step", ("tft/step",)),
            ("Participation and step efficiency", ("tft/participation", "tft/step_efficiency")),
            ("Time to recover (s)", ("tft/time_to_recover_s",)),
            ("Failed commits", ("tft/failed_commits",)),
        ),
    ),
)
#: The same for each replica group, a line each.
REPLICA_PANELS = (
    ("Loss by replica group", "loss_metrics/global_avg_loss"),
    ("Tokens per second and device by replica group", "throughput(tps)"),
    ("MFU by replica group (%)", "mfu(%)"),
    ("Memory by replica group (GiB)", "memory/max_reserved(GiB)"),
)


def run_dashboard(
    run: str,
    *,
    entity: str,
    project: str,
    dry_run: bool,
    env: Mapping[str, str],
    say: Callable[[str], None],
) -> None:
    """Save the workspace and say its address, or only say what it would be, as JSON.

    Raises:
        UsageError: it is not known whose workspace it is, or ``run`` is no run's name.
        KitError: W&B did not take it.
    """
    if run.isascii() and run.isdigit():
        run = f"tft-{run}"  # named by its array job, as everywhere
    if run and not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", run):
        raise UsageError(
            f"{run!r} is no run's name: letters, digits, dots and dashes, as in tft-12"
        )
    project = project or wandb_project(env)
    entity = entity or env.get("WANDB_TEAM") or env.get("WANDB_ENTITY") or ""
    if not entity and not dry_run:
        raise UsageError("whose workspace is it? Give --entity, or set WANDB_ENTITY")
    workspace = build(entity, project, run)
    if dry_run:
        say(json.dumps(spec(workspace), indent=2))
        return
    import requests
    import wandb

    try:
        workspace.save()
    except (wandb.Error, requests.RequestException, ValueError) as error:
        raise KitError(
            f"W&B did not take the workspace for {entity}/{project}: {error}; "
            "is WANDB_API_KEY set, and does the project exist?"
        ) from error
    say(f"dashboard: {workspace.url}")


def build(entity: str, project: str, run: str = "") -> Any:
    """The workspace of one run (a group of W&B runs); without ``run``, of the whole project."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    sections = [
        workspaces.Section(
            name=name,
            is_open=True,
            panels=[
                reports.LinePlot(title=title, x="Step", title_x=x, y=list(y)) for title, y in panels
            ],
        )
        for name, x, panels in SECTIONS
    ]
    replicas = workspaces.Section(
        name="Replica groups",
        is_open=True,
        panels=[
            # The name of a W&B run names the replica group.
            reports.LinePlot(title=title, x="Step", y=[y], groupby=reports.Metric("Name"))
            for title, y in REPLICA_PANELS
        ],
    )
    group = workspaces.Metric("Group")
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"torchft {run}".strip(),
        sections=[*sections, replicas],
        runset_settings=workspaces.RunsetSettings(
            groupby=[group], filters=[group == run] if run else []
        ),
    )


def spec(workspace: Any) -> dict[str, Any]:
    """What W&B would be sent."""
    model: dict[str, Any] = workspace._to_model().model_dump(by_alias=True, exclude_none=True)
    return model
