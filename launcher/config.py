"""What a site may set: environment variables with documented defaults, checked at once."""

from __future__ import annotations

import difflib
import re
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.methods import METHODS
from launcher.model import UsageError
from launcher.restarts import Limits
from launcher.variables import VARIABLES

DEFAULT_CONFIG = "configs/llama3.1-8b.toml"
DEFAULT_RANKS = 8

#: What torchtitan flags can never be set by hand: the launcher decides them.
_OURS = (
    "--fault_tolerance.enable",
    "--fault_tolerance.no_enable",
    "--fault_tolerance.replica_id",
    "--fault_tolerance.group_size",
    "--job.config_file",
    "--job.dump_folder",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """The settings of one site or shell, from its environment."""

    config: Path
    """torchtitan TOML file."""
    outputs: Path
    """Root of what runs write."""
    ranks_per_node: int
    device: str
    extra_args: tuple[str, ...]
    method: str
    """Of ``methods.METHODS``; empty: what the configuration says, else hsdp."""
    interface: str
    node_address: str
    """Address of this node for the others."""
    lighthouse: str
    """URL set by hand; empty: the published one."""
    quorum_timeout: float | None
    """Seconds for which a replica group waits for a quorum; None: as its method does."""
    relay: bool
    """Whether managers reach the lighthouse through their launcher."""
    stand_in: bool
    """Whether its launcher runs a lighthouse when the login node's is lost."""
    warm: bool
    """Whether the ranks of a group's next start in place wait beside it."""
    spares: int
    """Array tasks beyond the replica groups, that stand ready to replace one."""
    max_replicas: int
    """Replica groups that the run may grow to; 0: those that it starts with."""
    run: str
    """Run to join; empty: the array is one of its own."""
    notice: float
    """Seconds before a task's time limit at which Slurm tells of it."""
    limits: Limits
    """How often a failing replica group is started again."""

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> Site:
        """Read and check every variable.

        Raises:
            UsageError: names every problem at once.
        """
        problems: list[str] = list(_misspelled(env))
        try:
            extra = tuple(shlex.split(env.get("TFT_EXTRA_ARGS", "")))
        except ValueError as error:
            problems.append(f"TFT_EXTRA_ARGS is not a well-quoted list of flags ({error})")
            extra = ()
        for flag in extra:
            name = flag.split("=", 1)[0].replace("-", "_").replace("__", "--", 1)
            if name in _OURS:
                problems.append(f"flags (TFT_EXTRA_ARGS) must not set {name}: the launcher sets it")
        device = env.get("TFT_DEVICE") or "cuda"
        if device not in ("cuda", "cpu"):
            problems.append(f"TFT_DEVICE must be 'cuda' or 'cpu', not {device!r}")
        method = env.get("TFT_METHOD", "")
        if method and method not in METHODS:
            problems.append(f"TFT_METHOD must be one of {', '.join(METHODS)}, not {method!r}")
        ranks = _ranks(env, problems)
        for name in (
            "TORCHFT_QUORUM_TIMEOUT_SEC",
            "TORCHFT_QUORUM_RETRIES",
            "TORCHFT_TIMEOUT_SEC",
            "TORCHFT_CONNECT_TIMEOUT_SEC",
            "TORCHFT_MANAGER_PORT",
            "TFT_LIGHTHOUSE_PORT",
            "TFT_WEIGHT_HASH_EVERY",
            "TFT_DATALOADER_SAVE_EVERY",
            "TFT_SPARES",
            "TFT_MAX_REPLICAS",
            "TFT_TIME_LIMIT_NOTICE",
            "TFT_RESTARTS",
            "TFT_REQUEUES",
        ):
            if env.get(name) and not re.fullmatch(r"\d{1,6}", env[name]):
                problems.append(f"{name} must be a whole number below a million, not {env[name]!r}")
        for name in ("TFT_RELAY", "TFT_STAND_IN", "TFT_WARM", "TFT_DRILLS"):
            if env.get(name) not in (None, "", "0", "1"):
                problems.append(f"{name} must be 0 or 1, not {env[name]!r}")
        if env.get("TFT_DATALOADER_SAVE_EVERY") == "0":
            problems.append("TFT_DATALOADER_SAVE_EVERY must be at least 1")
        if env.get("TFT_MIN_STEP_SECONDS") and not _is_number(env["TFT_MIN_STEP_SECONDS"]):
            problems.append("TFT_MIN_STEP_SECONDS must be a number of seconds")
        if env.get("TFT_RUN") and not re.fullmatch(r"tft-\d+", env["TFT_RUN"]):
            problems.append(f"TFT_RUN must be a run's name like tft-12, not {env['TFT_RUN']!r}")
        lighthouse = env.get("TORCHFT_LIGHTHOUSE", "")
        if lighthouse and not re.fullmatch(r"https?://[^\s/]+:\d+/?", lighthouse):
            problems.append(
                f"TORCHFT_LIGHTHOUSE must look like http://host:29510, not {lighthouse!r}"
            )
        if problems:
            raise UsageError("; ".join(problems))
        return cls(
            config=Path(env.get("TFT_CONFIG") or DEFAULT_CONFIG),
            outputs=Path(env.get("TFT_OUTPUTS") or "outputs"),
            ranks_per_node=ranks,
            device=device,
            extra_args=extra,
            method=method,
            interface=env.get("TFT_INTERFACE", ""),
            # Said always: torchrun's own choice for a single node is "localhost".
            node_address=env.get("TFT_NODE_ADDRESS") or socket.gethostname(),
            lighthouse=lighthouse.rstrip("/"),
            quorum_timeout=(
                float(env["TORCHFT_QUORUM_TIMEOUT_SEC"])
                if env.get("TORCHFT_QUORUM_TIMEOUT_SEC")
                else None
            ),
            relay=env.get("TFT_RELAY") != "0",
            stand_in=env.get("TFT_STAND_IN") != "0",
            warm=env.get("TFT_WARM") != "0",
            spares=int(env.get("TFT_SPARES") or 0),
            max_replicas=int(env.get("TFT_MAX_REPLICAS") or 0),
            run=env.get("TFT_RUN", ""),
            notice=float(env.get("TFT_TIME_LIMIT_NOTICE") or 600),
            limits=Limits(
                here=int(env.get("TFT_RESTARTS") or Limits().here),
                elsewhere=int(env.get("TFT_REQUEUES") or Limits().elsewhere),
            ),
        )


def _misspelled(env: Mapping[str, str]) -> list[str]:
    known = [variable.name for variable in VARIABLES if variable.name.startswith("TFT_")]
    internal = {
        "TFT_EVENTS",
        "TFT_ATTEMPT",
        "TFT_FAILURES",
        "TFT_FINISHED",
        "TFT_LAUNCHER",
        "TFT_LEADER",
        "TFT_LEADER_KEY",
        "TFT_STACKS",
        "TFT_LEAVE",
        "TFT_STANDBY",
    }
    found = []
    for name in env:
        if name.startswith("TFT_") and name not in known and name not in internal:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f": did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            found.append(f"{name} is not a variable of this kit{hint}")
    return found


def _ranks(env: Mapping[str, str], problems: list[str]) -> int:
    for name in ("TFT_RANKS_PER_NODE", "SLURM_GPUS_ON_NODE"):
        value = env.get(name)
        if not value:
            continue
        if re.fullmatch(r"[1-9]\d*", value):
            return int(value)
        problems.append(f"{name} must be a number of ranks from 1 up, not {value!r}")
    return DEFAULT_RANKS


def _is_number(text: str) -> bool:
    try:
        return 0 <= float(text) < 1e6
    except ValueError:
        return False
