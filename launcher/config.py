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


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One environment variable of the kit, as the README documents it."""

    name: str
    default: str
    meaning: str


#: Every variable a site can set. ``${…}`` in a default names where it comes from.
VARIABLES = (
    Variable(
        name="TFT_CONFIG",
        default="configs/llama3.1-8b.toml",
        meaning="torchtitan config file of the training",
    ),
    Variable(
        name="TFT_RANKS_PER_NODE",
        default="${SLURM_GPUS_ON_NODE}, else 8",
        meaning="ranks that torchrun starts on each node",
    ),
    Variable(
        name="TFT_DEVICE",
        default="cuda",
        meaning="`cuda` or `cpu`; a node without its GPUs fails rather than train on CPU",
    ),
    Variable(
        name="TFT_EXTRA_ARGS",
        default="",
        meaning="extra torchtitan flags, shell-quoted, e.g. `--training.steps 200`",
    ),
    Variable(
        name="TFT_METHOD",
        default="hsdp",
        meaning="how replica groups learn together: `hsdp`, `ddp`, `local-sgd` or `diloco` (docs/methods.md)",
    ),
    Variable(
        name="TFT_INTERFACE",
        default="",
        meaning="network interface for NCCL and gloo, e.g. `eth0`",
    ),
    Variable(
        name="TFT_NODE_ADDRESS",
        default="${the node's host name}",
        meaning="address under which other nodes reach this one",
    ),
    Variable(
        name="TFT_ENV",
        default=".env",
        meaning="virtual environment that the job scripts activate (on the shared file system)",
    ),
    Variable(
        name="TFT_OUTPUTS",
        default="outputs",
        meaning="where runs write (on the shared file system)",
    ),
    Variable(
        name="TFT_LIGHTHOUSE_HOST",
        default="${the login node's host name}",
        meaning="address of the login node that `lighthouse up` publishes to the nodes",
    ),
    Variable(
        name="TFT_LIGHTHOUSE_PORT",
        default="29510",
        meaning="port of the lighthouse; its processes use the eight after it",
    ),
    Variable(
        name="TFT_LIGHTHOUSE_NAME",
        default="<host>-<port>",
        meaning="name under which runs find the lighthouse, also after it has moved",
    ),
    Variable(
        name="TFT_TIMEOUTS",
        default="default",
        meaning="`default` or `fast`: how soon the lighthouse gives a silent replica group up",
    ),
    Variable(
        name="TFT_LIGHTHOUSE_BIND",
        default="",
        meaning="address that the lighthouse listens on; default: the published one where that is a private one of its machine, else every interface",
    ),
    Variable(
        name="TFT_WEIGHT_HASH_EVERY",
        default="metrics.log_freq",
        meaning="manager steps between two logged hashes of the weights",
    ),
    Variable(
        name="TFT_DATALOADER_SAVE_EVERY",
        default="10",
        meaning="steps between two saves of a replica group's place in its data",
    ),
    Variable(
        name="TFT_MIN_STEP_SECONDS",
        default="0",
        meaning="a step lasts at least this long (demos and drills on fast machines)",
    ),
    Variable(
        name="TFT_SPARES",
        default="0",
        meaning="how many of the array's tasks stand ready to take a lost replica group's place",
    ),
    Variable(
        name="TFT_MAX_REPLICAS",
        default="${tasks of the array, less spares}",
        meaning="replica groups that the run may grow to; its data is split by it, for good",
    ),
    Variable(
        name="TFT_RUN",
        default="",
        meaning="run that an array's tasks join, e.g. `tft-12`, instead of being one of their own",
    ),
    Variable(
        name="TFT_PROFILE",
        default="",
        meaning="cluster profile of `launcher submit`: a file of configs/clusters, by name",
    ),
    Variable(
        name="TFT_MODULES",
        default="",
        meaning="environment modules that the job scripts load first, e.g. `cuda/12.8`",
    ),
    Variable(
        name="TFT_CONTAINER",
        default="",
        meaning="Apptainer image in which the tasks run; without it, on the node itself",
    ),
    Variable(
        name="TFT_CONTAINER_FLAGS",
        default="--nv",
        meaning="flags of `apptainer exec`, without spaces in them",
    ),
    Variable(
        name="TFT_RELAY",
        default="1",
        meaning="0: managers talk to the lighthouse itself, and die with it or when it moves",
    ),
    Variable(
        name="TFT_RESTARTS",
        default="3",
        meaning="restarts of a crashed replica group in place, on one node in 10 minutes; 0: none",
    ),
    Variable(
        name="TFT_WARM",
        default="1",
        meaning="once it trains, the ranks of a group's next start in place wait beside it, all "
        "imports done (about 0.5 GB of host memory a rank); 0: they do not",
    ),
    Variable(
        name="TFT_REQUEUES",
        default="10",
        meaning="requeues of a replica group in an hour that commits no step; 0: it ends instead",
    ),
    Variable(
        name="TFT_TIME_LIMIT_NOTICE",
        default="600",
        meaning="seconds before its time limit at which Slurm tells a task of it (`submit` sets "
        "sbatch's `--signal` to it; by hand, do so, too): even groups leave then and are requeued, odd "
        "ones at half of it",
    ),
    Variable(
        name="TFT_DRILLS",
        default="0",
        meaning="1: ranks take the signals of the drills `hang` and `oom`",
    ),
    Variable(
        name="TFT_WEBHOOK",
        default="",
        meaning="secret address to which the monitor posts losses, recoveries, alarms and an early end",
    ),
    Variable(
        name="TORCHFT_LIGHTHOUSE",
        default="${what `lighthouse up` published}",
        meaning="lighthouse address, e.g. `http://login-0:29510`",
    ),
    Variable(
        name="TORCHFT_MANAGER_PORT",
        default="0",
        meaning="port of a replica group's manager; 0 takes a free one",
    ),
    Variable(
        name="TORCHFT_QUORUM_TIMEOUT_SEC",
        default="600",
        meaning="how long a replica waits for a quorum before it gives up",
    ),
    Variable(
        name="TORCHFT_QUORUM_RETRIES",
        default="1200",
        meaning="how often it asks again within that time (0: a lighthouse outage kills it)",
    ),
    Variable(
        name="TORCHFT_TIMEOUT_SEC",
        default="120",
        meaning="collectives, commits and state transfer between replica groups",
    ),
    Variable(
        name="TORCHFT_CONNECT_TIMEOUT_SEC",
        default="10",
        meaning="connecting to a manager or to the lighthouse",
    ),
    Variable(
        name="RUST_LOG",
        default="warn",
        meaning="log level of torchft's native part in a replica",
    ),
    Variable(name="RUST_BACKTRACE", default="1", meaning="backtraces of torchft's native part"),
)

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
        for name in ("TFT_RELAY", "TFT_WARM", "TFT_DRILLS"):
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
