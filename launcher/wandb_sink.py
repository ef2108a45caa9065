"""The controller's run in Weights & Biases, beside the runs of the replica groups.

W&B lives in a child process that reads JSON lines: whatever it does (a slow start, an outage,
a hang), the monitor keeps its pace, its terminal and its own end. Run as a program, this
module is that child.
"""

from __future__ import annotations

import contextlib
import json
import netrc
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import IO, Any

from launcher.alarms import COOLDOWN, Alarm, Cooldown, Due, alarms
from launcher.environment import wandb_project, wandb_run_id, wandb_switch
from launcher.incidents import Incident
from launcher.lock import acquire
from launcher.model import KitError
from launcher.parentage import die_with_parent
from launcher.rundir import Manifest, RunDir
from launcher.sinks import Update
from launcher.snapshot import incident_as_data

#: Seconds between two rows of figures while nothing happens.
LOG_EVERY = 10.0
#: Seconds that the child gets to begin, to upload the rest, and to be gone.
INIT_SECONDS, FINISH_SECONDS, END_SECONDS = 30, 10, 20.0
#: What becomes an alert there. Findings have a row in the figures; the webhook tells of them.
ALERTS = frozenset({"lost", "recovered", "ended early"})
#: Most characters of an alert's title that W&B takes.
TITLE = 63


#: Variables whose value nobody is to see.
SECRETS = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN")


def wanted(env: Mapping[str, str]) -> bool:
    """Whether there is a W&B to log to: a key, a `wandb login`, or offline mode."""
    switch = wandb_switch(env)
    return _logged_in(env) if switch is None else switch


def _logged_in(env: Mapping[str, str]) -> bool:
    host = urllib.parse.urlsplit(env.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    path = env.get("NETRC") or os.path.join(env.get("HOME", ""), ".netrc")
    try:
        return netrc.netrc(path).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_controller(run: RunDir, env: Mapping[str, str]) -> Controller | None:
    """The run's controller run; None while another monitor has it (two would mix their rows)."""
    try:
        held = acquire(run.controller_lock)
    except OSError:
        return Controller(run.manifest(), env, folder="", lock=None)  # of somebody else's run
    if held is None:
        return None
    return Controller(run.manifest(), env, folder=str(run.path), lock=held)


class Controller:
    """Quorum, progress, incidents and alarms of one run, in one W&B run over all monitors."""

    name = "W&B"

    def __init__(
        self,
        manifest: Manifest,
        env: Mapping[str, str],
        *,
        folder: str,
        lock: IO[str] | None,
        cooldown: float = COOLDOWN,
    ) -> None:
        self.run_id = wandb_run_id(manifest, "controller")
        self._created = manifest.created
        self._lock = lock
        self._cooldown: Cooldown[Alarm] = Cooldown(cooldown)
        self._t = self._created
        self._logged_at = float("-inf")
        self._places: dict[str, Any] = {}
        self._secrets = [value for name in SECRETS if (value := env.get(name, ""))]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        child_env = {name: value for name, value in env.items() if name != "TFT_WEBHOOK"}
        child_env |= {"WANDB_SILENT": "true"} | ({"WANDB_DIR": folder} if folder else {})
        child_env.setdefault("WANDB_ERROR_REPORTING", "false")
        self._child = subprocess.Popen(
            [sys.executable, "-m", "launcher.wandb_sink"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            env=child_env,
            start_new_session=True,  # Ctrl-C is for the monitor, which then ends it in order
        )
        self._started = False
        self._init = {
            "id": self.run_id,
            "resume": "allow",
            "project": wandb_project(env),
            "entity": env.get("WANDB_TEAM") or env.get("WANDB_ENTITY") or None,
            "group": env.get("WANDB_RUN_GROUP") or manifest.run,
            "name": f"{manifest.run} controller",
            "job_type": "controller",
            "tags": ["torchft", manifest.run],
            "config": {
                "settings": manifest.settings,
                "extra_args": manifest.extra_args,
                "config_file": manifest.config,
                "script": [manifest.script, *manifest.script_args] if manifest.script else None,
                "versions": manifest.versions,
                "controller": {"node": socket.gethostname()},
                "slurm": {
                    "array_job_id": manifest.array_job_id,
                    "submitted_by": manifest.submitted_by,
                    "group_size": manifest.group_size,
                    "ranks_per_group": manifest.ranks_per_group,
                },
            },
        }

    def deliver(self, update: Update) -> None:
        self._t = update.t
        if not self._started:
            self._started = True
            self._send(init=self._init)
        if (places := _places(update)) != self._places:
            self._places = places
            self._send(config={"replicas": places})
        if update.news or update.t - self._logged_at >= LOG_EVERY:
            self._logged_at = update.t
            rows = _table(update.history) if update.incidents else []
            self._send(log=figures(update), step=self._step(update.t), rows=rows)
        news = (alarm for alarm in alarms(update) if alarm.kind in ALERTS)
        self._alert(self._cooldown.pass_on(news, update.t))

    def _alert(self, news: Iterable[Due[Alarm]]) -> None:
        for due in news:
            text = f"{due.newest.text}{due.summed_up(self._t)}"
            self._send(alert={"title": due.newest.title[:TITLE], "text": text})

    def close(self) -> None:
        """End the child; it has a limited time to upload what it still has."""
        # Where the child is gone already, its exit code will tell.
        with contextlib.suppress(KitError):
            self._alert(self._cooldown.rest())
        with contextlib.suppress(OSError):
            if self._child.stdin is not None:
                self._child.stdin.close()
        try:
            code = self._child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            code = self._child.wait()
        slow = f"did not finish within {END_SECONDS:g} s"
        why = slow if code == -signal.SIGKILL else self._why()
        self._errors.close()
        if self._lock is not None:
            self._lock.close()
        if code != 0:
            raise KitError(why)

    def _step(self, t: float) -> int:
        """Seconds since the run's start: grows over restarts of the monitor, as W&B demands."""
        return max(0, int(t - self._created))

    def _send(self, **message: Any) -> None:
        line = json.dumps(message, default=str, separators=(",", ":")) + "\n"
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(line.encode())
            self._child.stdin.flush()
        except (OSError, ValueError):
            raise KitError(self._why()) from None

    def _why(self) -> str:
        """The child's last words, without a secret that W&B may have put into them."""
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace").strip()
        for secret in self._secrets:
            text = text.replace(secret, "***")
        lines = text.splitlines()
        return lines[-1][:200] if lines else f"ended with code {self._child.poll()}"


def figures(update: Update) -> dict[str, float]:
    """One row of the controller's run."""
    values: dict[str, float | None] = {
        "tft/quorum_members": len(update.members),
        "tft/quorum_id": update.quorum_id,
        "tft/step": update.step,
        "tft/participation": update.figures["participation"],
        "tft/step_efficiency": update.figures["step_efficiency"],
        "tft/time_to_recover_s": update.last_recovery,
        "tft/incidents": sum(update.causes.values()),
        "tft/failed_commits": sum(group.failed_commits for group in update.groups),
        "tft/findings": len(update.findings),
    }
    return {name: value for name, value in values.items() if value is not None}


def _table(incidents: Iterable[Incident]) -> list[dict[str, Any]]:
    return [{**incident_as_data(incident), "host": incident.where} for incident in incidents]


def _places(update: Update) -> dict[str, Any]:
    """Where each replica group runs, and which of its attempts that is."""
    return {
        str(group.replica): {
            "node": ", ".join(group.nodes) or group.host,
            "attempt": group.attempt,
            "array_task": group.task_index,
        }
        for group in update.groups
        if group.attempt
    }


def main() -> None:
    """The child: W&B, told by the monitor what to log."""
    die_with_parent()
    import wandb

    message: dict[str, Any] = json.loads(sys.stdin.readline() or "{}")
    if "init" not in message:
        return
    settings = wandb.Settings(
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_stats=True,  # the login node's load is nobody's business here
    )
    late = ""
    try:
        run = wandb.init(**message["init"], settings=settings)
    except (wandb.Error, OSError) as error:
        wandb.teardown()  # its service still holds the run that did not start
        run = wandb.init(**message["init"], settings=settings, mode="offline")
        late = (
            f"no contact ({type(error).__name__}): upload with `wandb sync {run.settings.sync_dir}`"
        )
    for line in sys.stdin:
        message = json.loads(line)
        if "log" in message:
            row = message["log"]
            if message["rows"]:
                columns = list(message["rows"][0])
                data = [list(entry.values()) for entry in message["rows"]]
                row["tft/incidents_table"] = wandb.Table(columns=columns, data=data)
            run.log(row, step=message["step"])
        elif "config" in message:
            run.config.update(message["config"], allow_val_change=True)
        elif "alert" in message:
            # Equal titles within a minute are dropped there in silence; ours have a cooldown here.
            run.alert(**message["alert"], wait_duration=1)
    run.finish()
    if late:
        print(late, file=sys.stderr, flush=True)
        os._exit(1)  # W&B's exit hook would wait for what it cannot send


if __name__ == "__main__":
    main()
