"""Every environment variable that a site may set, as the README documents it."""

from __future__ import annotations

from dataclasses import dataclass


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
        meaning="port of the lighthouse that `lighthouse up` starts; its processes use the eight after it "
        "(`submit` takes `lighthouse_ports`)",
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
        name="TFT_STAND_IN",
        default="1",
        meaning="when the lighthouse is lost with its host, a replica group's launcher runs one; 0: "
        "they wait",
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
