"""The configuration files of the sandbox's Slurm."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher.namespaces import Network

CPUS, GPUS, MEMORY_MB = 128, 8, 1_000_000
#: Seconds for which a requeued job waits: ``cred_expire`` plus one. (A cluster's default: 121.)
REQUEUE_DELAY = 6

#: Seconds of silence after which a node is given up, and for which an answer is waited for: a
#: machine at its limits must stay below them, and who cuts a node off on purpose waits for both.
PATIENCE = {"SlurmdTimeout": 15, "MessageTimeout": 10}
NETWORK_PATIENCE = {"SlurmdTimeout": 5, "MessageTimeout": 5}
#: Partition whose jobs take the nodes of others.
URGENT = "urgent"
#: Where slurmd listens on a node that has a network of its own.
NODE_PORT = 6818


def write(
    folder: Path,
    nodes: Sequence[str],
    network: Network | None,
    munge_socket: Path,
    requeue_delay: int = REQUEUE_DELAY,
) -> None:
    """Write ``slurm.conf`` and what belongs to it to ``folder``.

    Without a ``network`` every node is this machine, at another port.
    """
    host = socket.gethostname()
    with _free_ports(len(nodes) + 1) as (port, *ports):
        if network is None:
            login = "127.0.0.1"
            places = [f"{host} NodeAddr={login} Port={number}" for number in ports]
        else:
            login = network.login
            places = [
                f"{node} NodeAddr={network.address(number)} Port={NODE_PORT}"
                for number, node in enumerate(nodes)
            ]
    names = f"worker-[0-{len(nodes) - 1}]" if len(nodes) > 1 else "worker-0"
    patience = NETWORK_PATIENCE if network else PATIENCE
    lines = [
        "ClusterName=tft-sandbox",
        f"SlurmctldHost={host}({login})",
        f"SlurmctldPort={port}",
        f"FirstJobId={1 + int(time.time()) % 10_000_000}",  # never an earlier sandbox's id
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={munge_socket},cred_expire={requeue_delay - 1}",
        f"StateSaveLocation={folder / 'ctld'}",
        f"SlurmdSpoolDir={folder / 'spool' / '%n'}",
        f"SlurmctldPidFile={folder / 'slurmctld.pid'}",
        f"SlurmdPidFile={folder / 'slurmd-%n.pid'}",
        f"SlurmctldLogFile={folder / 'log' / 'slurmctld.log'}",
        f"SlurmdLogFile={folder / 'log' / '%n.log'}",
        "SlurmdParameters=config_overrides",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "GresTypes=gpu",
        "TaskPlugin=task/none",
        "ProctrackType=proctrack/linuxproc",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "MpiDefault=none",
        "SwitchType=switch/none",
        "ReturnToService=1",
        "KillWait=5",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        *(f"{key}={seconds}" for key, seconds in patience.items()),
        "InactiveLimit=0",
        "MinJobAge=3600",
        (
            "SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=1,"
            "bf_interval=1"
        ),
    ]
    for node, place in zip(nodes, places, strict=True):
        lines.append(
            f"NodeName={node} NodeHostname={place} "
            f"CPUs={CPUS} RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN"
        )
    lines.append(f"PartitionName=main Nodes={names} Default=YES MaxTime=INFINITE State=UP")
    # Its jobs preempt those of the other, which are requeued.
    lines.append(f"PartitionName={URGENT} Nodes={names} PriorityTier=10 MaxTime=INFINITE State=UP")
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "gres.conf").write_text(
        f"NodeName={names} Name=gpu File={folder / 'gpus'}/gpu[0-{GPUS - 1}]\n"
    )
    # Tracking by process family only: no cgroup of this machine is touched.
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")


@contextlib.contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    """Ports nobody listens on, held until the block is left."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        yield [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
