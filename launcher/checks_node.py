"""What the doctor thinks of what its jobs brought back from the nodes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.checks import Result, blind, failed, passed, warning
from launcher.checks_here import MIN_FILES, is_other
from launcher.doctor_job import Found
from launcher.nodecheck import CLOCK_SKEW
from launcher.target import Target

#: Seconds after which a change of a file should have been answered from a node: the guardian's
#: orders and the leases go that way.
SLOW_FILES = 5.0
#: Bytes of /dev/shm below which NCCL's ranks of one node may fail to talk (containers often
#: give 64 MiB).
MIN_SHM = 1 << 30
#: Oldest driver for the CUDA of a torch build, by CUDA's major version (NVIDIA's table of minor
#: version compatibility).
DRIVERS = {"11": 450, "12": 525, "13": 580}


def node(
    target: Target, found: Found, here: Mapping[str, str], *, deep: bool = False
) -> Iterator[Result]:
    """Everything about one node.

    Args:
        here: versions of the packages on this machine.
        deep: whether a job with GPUs looks at them afterwards.
    """
    if found.refused:
        yield from _refused(found)
        return
    if not found.host and found.wrote:
        yield passed("shared file system", f"{found.ran_on} writes where this machine reads")
        yield failed(
            "environment on a node",
            found.problem,
            "run `srun python -m launcher --help` with that environment, and see what it waits for",
        )
        return
    if not found.host and found.ran_on:
        yield failed(
            "shared file system",
            f"{found.problem}; what it wrote to {target.outputs} is not seen here",
            f"put the repository and {target.outputs} (TFT_OUTPUTS) on a file system that this "
            "machine and all nodes share",
        )
        return
    if not found.host:
        yield blind("a node", found.problem, "try again later, or look without: --no-job")
        return
    yield _files(target, found)
    yield _clock(found)
    if not found.node:
        yield blind("the rest of the node", found.problem or f"{found.host} did not say more")
        return
    yield _environment(found, here)
    yield _lighthouse(target, found)
    yield _interface(target, found)
    yield _driver(target, found, deep)
    yield from _limits(target, found)


def _refused(found: Found) -> Iterator[Result]:
    yield passed("shared file system", f"{found.host} writes where this machine reads")
    yield failed(
        "environment on a node",
        f"{found.host}: {found.refused.removeprefix('error: ')}",
        "make it on the shared file system (`make setup`), or set TFT_ENV to one that nodes have",
    )


def _files(target: Target, found: Found) -> Result:
    if found.round_trip is None and not found.node:
        return blind("shared file system", found.problem or f"{found.host} did not answer")
    if found.round_trip is None:
        return failed(
            "shared file system",
            f"{found.host} reads {target.outputs}, and does not see a change of a file in time",
            "mount it with a shorter attribute cache (NFS: actimeo=3 or less): leases and orders go "
            "through small files",
        )
    said = f"{found.host} answered a change of a file after {_time(found.round_trip)}"
    if found.round_trip > SLOW_FILES:
        return warning(
            "shared file system",
            said,
            "recovery waits for it: mount it with a shorter attribute cache (NFS: actimeo=3 or less)",
        )
    return passed("shared file system", said)


def _clock(found: Found) -> Result:
    if found.clock is None:
        return blind("clocks", "the node did not answer", needed=False)
    least, most = found.clock
    sure = max(least, -most, 0.0)  # at least so far apart
    if sure > CLOCK_SKEW:
        ahead = "ahead of" if least > 0 else "behind"
        return failed(
            "clocks",
            f"{found.host} is at least {sure:.1f} s {ahead} this machine: such a node is refused",
            "have both follow one time server (chrony, ntpd)",
        )
    if sure > 1.0:
        return warning(
            "clocks",
            f"{found.host} and this machine are at least {sure:.1f} s apart: reports mix events up",
            "have both follow one time server (chrony, ntpd)",
        )
    bound = max(abs(least), abs(most))
    return passed("clocks", f"{found.host} and this machine differ by at most {_time(bound)}")


def _environment(found: Found, here: Mapping[str, str]) -> Result:
    imports = found.node["imports"]
    if imports.get("error"):
        return failed(
            "environment on a node",
            f"{found.host}: what training imports is not all there: {imports['error']}",
            "run `make setup` for the nodes' system, on the shared file system",
        )
    there = found.node["versions"]
    differ = [
        f"{name} {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
        for name in sorted({*there, *here})
        if is_other(there.get(name, ""), here.get(name, ""))
    ]
    if differ:
        return failed(
            "environment on a node",
            f"{found.host}: {'; '.join(differ)}",
            "use one environment on both sides (TFT_ENV)",
        )
    return passed(
        "environment on a node",
        f"{found.host}: Python {found.node['python']}, torch {imports['torch']}; what training "
        f"imports took {imports['seconds']:.1f} s",
    )


def _lighthouse(target: Target, found: Found) -> Result:
    reached: Sequence[Mapping[str, Any]] = found.node["reached"]
    if not reached:
        return blind(
            "lighthouse from a node",
            "no port could be opened here to try, and no lighthouse is up",
            "free the ports (see 'ports' above)",
        )
    bad = [one for one in reached if one["error"]]
    if bad:
        places = ", ".join(_place(one) for one in bad[:9])
        return failed(
            "lighthouse from a node",
            f"{found.host} cannot reach {places}: {bad[0]['error']}",
            "publish an address that nodes reach (TFT_LIGHTHOUSE_HOST, `lighthouse up --host`), open "
            f"ports {target.lighthouse_port} to {target.lighthouse_port + 8} to them, or run the "
            "lighthouse as a job: sbatch slurm/lighthouse.sbatch",
        )
    slowest = _time(max(float(one["seconds"]) for one in reached))
    urls = [str(one["url"]) for one in reached if one.get("url")]
    ports = [one for one in reached if not one.get("url")]
    said = [f"the lighthouse {url} answers" for url in urls]
    if ports:
        said.append(f"{len(ports)} ports of {ports[0]['host']} answer")
    return passed("lighthouse from a node", f"{found.host}: {', '.join(said)} within {slowest}")


def _place(one: Mapping[str, Any]) -> str:
    return str(one.get("url") or f"{one['host']}:{one['port']}")


def _interface(target: Target, found: Found) -> Result:
    have: Mapping[str, Sequence[str]] = found.node["interfaces"]
    listed = ", ".join(f"{name} ({have[name][0]})" if have[name] else name for name in have)
    if not target.interface:
        return passed(
            "interface",
            f"TFT_INTERFACE is not set; {found.host} has {listed}: NCCL and gloo choose",
        )
    missing = [name for name in target.interface.split(",") if name not in have]
    if missing:
        return failed(
            "interface",
            f"{found.host} has no {', '.join(missing)} that is up; it has {listed}",
            "set TFT_INTERFACE to one of those that all nodes have",
        )
    bare = [name for name in target.interface.split(",") if not have[name]]
    if bare:
        return failed(
            "interface",
            f"{', '.join(bare)} of {found.host} has no address",
            "set TFT_INTERFACE to one that has: gloo and NCCL meet over IP",
        )
    return passed(
        "interface",
        f"{target.interface} of {found.host}: {have[target.interface.split(',')[0]][0]}",
    )


def _driver(target: Target, found: Found, deep: bool) -> Result:
    if target.device != "cuda":
        return passed("driver and CUDA", "not needed: TFT_DEVICE=cpu")
    cuda, driver = found.node["imports"].get("cuda"), str(found.node["driver"])
    if "error" in found.node["imports"]:
        return blind("driver and CUDA", "torch could not be imported")
    if not cuda:
        return failed(
            "driver and CUDA",
            f"torch {found.node['imports']['torch']} of this environment is built without CUDA",
            "run `make setup` with the index of CUDA wheels, or set TFT_DEVICE=cpu",
        )
    if not driver:
        return blind(
            "driver and CUDA",
            f"{found.host} shows no NVIDIA driver to a job without GPUs",
            "see 'GPUs of a node' below" if deep else "--deep asks for GPUs, and looks",
            needed=not deep,
        )
    least = DRIVERS.get(str(cuda).split(".")[0])
    if least is not None and int(driver.split(".")[0]) < least:
        return failed(
            "driver and CUDA",
            f"driver {driver} of {found.host} is too old for CUDA {cuda} of this torch",
            f"it needs driver {least} or newer; or install a torch that is built for an older CUDA",
        )
    return passed("driver and CUDA", f"driver {driver} of {found.host}, CUDA {cuda} of torch")


def _limits(target: Target, found: Found) -> Iterator[Result]:
    limits: Mapping[str, int] = found.node["limits"]
    problems = []
    if 0 <= limits["nofile"] < MIN_FILES:
        problems.append(f"{limits['nofile']} open files (ulimit -n), and {MIN_FILES} are usual")
    if target.device == "cuda":
        if limits["memlock"] >= 0:
            problems.append(
                f"{limits['memlock'] >> 10} KiB of locked memory: InfiniBand needs more"
            )
        shm = found.node["shm_bytes"]
        if shm is not None and shm < MIN_SHM:
            problems.append(f"{shm >> 20} MiB in /dev/shm, through which NCCL's ranks talk")
    if problems:
        yield warning(
            "limits of a job",
            f"{found.host}: {'; '.join(problems)}",
            "raise them in the shell that submits (Slurm passes its limits on), or ask the cluster's "
            "administrators (LimitMEMLOCK of slurmd, /dev/shm of containers)",
        )
        return
    yield passed("limits of a job", f"{found.host}: {limits['nofile']} open files")


def between(target: Target, found: Found, nodes: int) -> Iterator[Result]:
    """What an all-reduce over ``nodes`` nodes has shown."""
    ran = found.allreduce
    if found.problem and not found.ran_on and not found.parts and not found.refused:
        yield blind("all-reduce", found.problem, "try again when nodes are free, or --nodes 2")
    elif found.refused:
        yield failed("all-reduce", f"{found.host}: {found.refused}", "see 'environment on a node'")
    elif ran is None or found.problem:
        yield failed(
            "all-reduce",
            found.problem or "it did not end",
            "nodes must reach each other on all ports: set TFT_INTERFACE to the network that they "
            "share, and TFT_NODE_ADDRESS where host names do not resolve",
        )
    elif not ran["right"]:
        yield failed(
            "all-reduce",
            f"a wrong sum over {ran['ranks']} ranks by {ran['backend']}",
            "find the node: --deep --nodes 2 on others, and NCCL_DEBUG=INFO",
        )
    else:
        speed = ran["bus_bytes_per_second"] / 1e9
        yield passed(
            "all-reduce",
            f"{ran['ranks']} ranks on {nodes} nodes by {ran['backend']}: {speed:.2f} GB/s "
            f"({ran['bytes'] >> 20} MiB in {_time(ran['seconds'])}; they met in "
            f"{_time(ran['met_seconds'])})",
        )
    if target.device == "cuda":
        yield from _gpus(target, found)


def _gpus(target: Target, found: Found) -> Iterator[Result]:
    for part in found.parts:
        said = part["gpus"]
        if isinstance(said, str):
            yield failed(
                "GPUs of a node",
                f"{part['host']}: nvidia-smi says: {said}",
                f"ask the cluster's administrators about {part['host']}; sbatch "
                f"--exclude={part['host']} leaves it out",
            )
        elif len(said) < target.ranks_per_node:
            yield failed(
                "GPUs of a node",
                f"{part['host']}: {len(said)} GPUs, and {target.ranks_per_node} ranks",
                f"leave it out (sbatch --exclude={part['host']}), or set TFT_RANKS_PER_NODE",
            )
        else:
            what = said[0].partition(", ")[2]
            yield passed("GPUs of a node", f"{part['host']}: {len(said)}, the first is {what}")


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 0.9995 else f"{seconds:.1f} s"
