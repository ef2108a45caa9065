"""Everything that can be set of a submission: one table, and what became of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.variables import VARIABLES


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One thing that can be set."""

    key: str
    kind: str
    """Its type: a key of `layers._kinds`."""
    meaning: str
    variable: str = ""
    """Environment variable that sets it, too, and that hands it to the run's tasks."""
    sbatch: str = ""
    """sbatch's flag that it becomes."""
    default: str = ""
    """What holds where nobody says anything, in words; empty: nothing."""
    of_a_run: bool = False
    """Whether a cluster profile must not say it: it is one run's own."""
    adds_up: bool = False
    """Whether layers add to each other (the later, stronger one last) instead of replacing."""


#: Where lighthouses listen when nobody says.
DEFAULT_PORTS = "29510-29699"
_DEFAULTS = {variable.name: variable.default for variable in VARIABLES}
_HEADER = "the job script's header"

#: Everything that a profile, a run file or a flag of `launcher submit` can say.
SETTINGS = (
    Setting(key="config", kind="text", variable="TFT_CONFIG", of_a_run=True,
            default=_DEFAULTS["TFT_CONFIG"], meaning="torchtitan config file of the training"),
    Setting(key="script", kind="text", of_a_run=True,
            meaning="training script of your own, in place of a torchtitan config"),
    Setting(key="flags", kind="list", variable="TFT_EXTRA_ARGS", of_a_run=True, adds_up=True,
            meaning="flags for torchtitan, or for a script of your own"),
    Setting(key="method", kind="method", variable="TFT_METHOD", default="hsdp", of_a_run=True,
            meaning="how replica groups train together"),
    Setting(key="name", kind="name", sbatch="--job-name", default="tft", of_a_run=True,
            meaning="the job's name for Slurm's tools"),
    Setting(key="comment", kind="name", sbatch="--comment", of_a_run=True,
            meaning="the job's comment for Slurm's tools"),
    Setting(key="dependency", kind="name", sbatch="--dependency", of_a_run=True,
            meaning="what the job waits for, as sbatch takes it"),
    Setting(key="replicas", kind="count", of_a_run=True, meaning="replica groups at the start"),
    Setting(key="max_replicas", kind="count", variable="TFT_MAX_REPLICAS", of_a_run=True,
            default="replicas",
            meaning="replica groups that the run may grow to; its data is split by it"),
    Setting(key="nodes_per_replica", kind="count", default="1",
            meaning="nodes of each replica group"),
    Setting(key="spares", kind="whole", variable="TFT_SPARES", default=_DEFAULTS["TFT_SPARES"],
            meaning="tasks that stand ready to take a lost replica group's place"),
    Setting(key="partition", kind="name", variable="SBATCH_PARTITION", sbatch="--partition",
            default="Slurm's own", meaning="partition"),
    Setting(key="account", kind="name", variable="SBATCH_ACCOUNT", sbatch="--account",
            default="Slurm's own", meaning="account that is charged"),
    Setting(key="qos", kind="name", variable="SBATCH_QOS", sbatch="--qos",
            default="Slurm's own", meaning="quality of service"),
    Setting(key="constraint", kind="name", variable="SBATCH_CONSTRAINT", sbatch="--constraint",
            meaning="features that nodes must have"),
    Setting(key="exclude", kind="name", variable="SBATCH_EXCLUDE", sbatch="--exclude",
            meaning="nodes that are left out"),
    Setting(key="time_limit", kind="duration", variable="SBATCH_TIMELIMIT", sbatch="--time",
            default="the partition's", meaning="time limit of each start of a task"),
    Setting(key="gpus_per_node", kind="count", default=_HEADER, meaning="GPUs of each node"),
    Setting(key="cpus_per_node", kind="count", default=_HEADER,
            meaning="CPUs of each node"),
    Setting(key="memory", kind="memory", sbatch="--mem", default="Slurm's own",
            meaning="memory of each node, as sbatch takes it: 512G, or 0 for all of it"),
    Setting(key="sbatch_flags", kind="list", adds_up=True,
            meaning="further flags for sbatch, put last"),
    Setting(key="ranks_per_node", kind="count", variable="TFT_RANKS_PER_NODE",
            default=_DEFAULTS["TFT_RANKS_PER_NODE"], meaning="ranks on each node"),
    Setting(key="device", kind="device", variable="TFT_DEVICE", default=_DEFAULTS["TFT_DEVICE"],
            meaning="cuda or cpu"),
    Setting(key="interface", kind="name", variable="TFT_INTERFACE",
            meaning="network interface of NCCL and gloo"),
    Setting(key="environment", kind="text", variable="TFT_ENV", default=_DEFAULTS["TFT_ENV"],
            meaning="virtual environment, on the shared file system"),
    Setting(key="modules", kind="words", variable="TFT_MODULES",
            meaning="environment modules that tasks load"),
    Setting(key="container", kind="text", variable="TFT_CONTAINER",
            meaning="Apptainer image in which tasks run"),
    Setting(key="container_flags", kind="words", variable="TFT_CONTAINER_FLAGS", default="--nv",
            meaning="flags of `apptainer exec`"),
    Setting(key="outputs", kind="text", variable="TFT_OUTPUTS", default=_DEFAULTS["TFT_OUTPUTS"],
            meaning="where runs write, on the shared file system"),
    Setting(key="lighthouse", kind="url", variable="TORCHFT_LIGHTHOUSE", of_a_run=True,
            default="a free one, else one of its own",
            meaning="address of the lighthouse to use"),
    Setting(key="lighthouse_host", kind="name", variable="TFT_LIGHTHOUSE_HOST",
            default="this machine's host name",
            meaning="address of this machine that the nodes can reach"),
    Setting(key="lighthouse_bind", kind="name", variable="TFT_LIGHTHOUSE_BIND",
            default="lighthouse_host, if private", meaning="address that the lighthouse listens on"),
    Setting(key="lighthouse_ports", kind="ports", default=DEFAULT_PORTS,
            meaning="ports for lighthouses, nine for each"),
    Setting(key="timeouts", kind="timeouts", variable="TFT_TIMEOUTS",
            default=_DEFAULTS["TFT_TIMEOUTS"],
            meaning="how soon a silent replica group is given up: default or fast"),
    Setting(key="wandb_project", kind="name", variable="WANDB_PROJECT", default="torchtitan",
            meaning="Weights & Biases project"),
    Setting(key="wandb_entity", kind="name", variable="WANDB_ENTITY",
            meaning="Weights & Biases user or team"),
    Setting(key="variables", kind="variables", adds_up=True,
            meaning="further environment variables for the tasks"),
)  # fmt: skip
#: The same by key.
BY_KEY = {setting.key: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Resolved:
    """What holds, and where each value comes from."""

    values: Mapping[str, Any] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    profile: tuple[str, str] = ("-", "default")
    """File of the cluster profile, and who chose it."""

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a setting; ``default`` where nobody has said anything."""
        assert key in BY_KEY, key
        return self.values.get(key, default)

    def environment(self) -> dict[str, str]:
        """Environment variables that hand the settings to a run's tasks."""
        found = dict(self.values.get("variables", {}))
        for setting in SETTINGS:
            value = self.values.get(setting.key)
            handed = setting.variable and not setting.variable.startswith("SBATCH_")
            if handed and value not in (None, [], ""):
                found[setting.variable] = _as_text(setting, value)
        return found

    def sbatch_flags(self) -> list[str]:
        """sbatch's flags for settings that become one each; further ones last."""
        found = [
            f"{setting.sbatch}={self.values[setting.key]}"
            for setting in SETTINGS
            if setting.sbatch and setting.key in self.values
        ]
        return [*found, *self.values.get("sbatch_flags", ())]

    def explain(self) -> list[tuple[str, str, str]]:
        """(key, value, where from) of every setting, in the order of the table."""
        return [("profile", *self.profile)] + [
            (
                setting.key,
                _shown(setting, self.values[setting.key])
                if setting.key in self.values
                else setting.default or "-",
                self.sources.get(setting.key, "default"),
            )
            for setting in SETTINGS
        ]


def ports(text: str) -> tuple[int, int]:
    """First and last of a range like ``29510-29699``."""
    first, _, last = text.partition("-")
    return int(first), int(last)


def _as_text(setting: Setting, value: Any) -> str:
    if setting.kind == "words":
        return " ".join(value)
    return shlex.join(value) if setting.kind == "list" else str(value)


def _shown(setting: Setting, value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={shlex.quote(text)}" for name, text in value.items())
    return _as_text(setting, value)
