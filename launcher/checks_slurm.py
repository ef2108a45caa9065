"""What the doctor thinks of a Slurm's settings, partition and accounts. Pure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence

from launcher import cluster
from launcher.checks import Result, blind, failed, passed, warning
from launcher.cluster import Association, Partition, Resources
from launcher.payload import GRACE
from launcher.target import Target

#: Slurm's own default of AuthInfo's cred_expire, seconds (slurm.conf's manual).
CRED_EXPIRE = 120
#: Slurm's own default of SlurmdTimeout, seconds.
SLURMD_TIMEOUT = 300
#: Oldest release on which this kit was tried, as (year, month).
OLDEST = (22, 5)
#: Exit codes with which a task ends for good (docs/exit-codes.md); Slurm must not start it again.
FINAL_CODES = frozenset({"1", "2"})

_ADMIN = "ask the cluster's administrators"


def settings(config: Mapping[str, str]) -> Iterator[Result]:
    """The settings that recovery rests on, from ``scontrol show config``."""
    yield _version(config)
    yield _requeue(config)
    yield _delay(config)
    yield _kill_wait(config)
    yield _slurmd_timeout(config)
    yield _array(config)
    yield _return(config)
    yield _preemption(config)
    yield _exit_codes(config)
    yield passed(
        "how tasks are held",
        f"TaskPlugin {config.get('TaskPlugin', '(not shown)')}, "
        f"ProctrackType {config.get('ProctrackType', '(not shown)')}, "
        f"MaxBatchRequeue {config.get('MaxBatchRequeue', 'not shown, so 5')} (counts batch jobs "
        "that went missing, not requeues by their owner)",
    )


def _version(config: Mapping[str, str]) -> Result:
    version = config["SLURM_VERSION"]
    numbers = [int(word) for word in re.findall(r"\d+", version)[:2]]
    if len(numbers) < 2 or tuple(numbers) < OLDEST:
        return warning(
            "version", f"Slurm {version}", "22.05 is the oldest that this kit was tried on"
        )
    return passed("version", f"Slurm {version}; the controller answers")


def _requeue(config: Mapping[str, str]) -> Result:
    if config.get("JobRequeue") == "0":
        return warning(
            "JobRequeue",
            "0: only jobs that ask for it are requeued",
            "this kit's job scripts ask (--requeue); put the line into scripts of your own",
        )
    return _known(config, "JobRequeue", "a lost task is requeued")


def _delay(config: Mapping[str, str]) -> Result:
    """A requeued job waits for as long as its old credential is valid, and one second."""
    expire = cluster.option(config.get("AuthInfo", ""), "cred_expire")
    seconds = (int(expire) if expire and expire.isdigit() else CRED_EXPIRE) + 1
    for name in ("SchedulerParameters", "SlurmctldParameters"):  # 25.11 has a setting of its own
        own = cluster.option(config.get(name, ""), "requeue_delay")
        if own and own.isdigit():
            return passed("requeue delay", f"{own} s (requeue_delay); the guardian cuts it short")
    said = f"AuthInfo cred_expire={expire}" if expire else "AuthInfo's default cred_expire"
    return passed("requeue delay", f"{seconds} s ({said}, and 1 s); the guardian cuts it short")


def _kill_wait(config: Mapping[str, str]) -> Result:
    seconds = _seconds(config, "KillWait")
    if seconds is None:
        return _unknown("KillWait", config)
    if seconds <= GRACE:
        return warning(
            "KillWait",
            f"{seconds:g} s, and the launcher gives ranks {GRACE:g} s to end: Slurm kills it "
            "before it can say how they ended, where they do not end at once",
            f"{_ADMIN} for KillWait=30 (Slurm's default) or more",
        )
    return passed("KillWait", f"{seconds:g} s, more than the {GRACE:g} s that ranks get to end")


def _slurmd_timeout(config: Mapping[str, str]) -> Result:
    seconds = _seconds(config, "SlurmdTimeout")
    if seconds is None:
        return _unknown("SlurmdTimeout", config)
    if seconds == 0:
        return failed(
            "SlurmdTimeout",
            "0: a node that dies is never given up, and its task never requeued",
            f"{_ADMIN} for a time (Slurm's default is {SLURMD_TIMEOUT} s)",
        )
    if seconds > SLURMD_TIMEOUT:
        return warning(
            "SlurmdTimeout",
            f"{seconds:g} s: for so long Slurm waits with a node that is dead or cut off, and its "
            "replica group is away; the others train on",
            f"keep a spare (TFT_SPARES), which does not wait; or {_ADMIN} for {SLURMD_TIMEOUT} s",
        )
    return passed(
        "SlurmdTimeout", f"a node that is dead or cut off is given up after {seconds:g} s"
    )


def _array(config: Mapping[str, str]) -> Result:
    value = config.get("MaxArraySize", "")
    if not value.isdigit():
        return _unknown("MaxArraySize", config)
    if int(value) <= 2:
        return failed(
            "MaxArraySize",
            f"{value}: job arrays are off, and every replica group is a task of one",
            f"{_ADMIN} for MaxArraySize=1001 (Slurm's default)",
        )
    return passed("MaxArraySize", f"{int(value) - 1} replica groups and spares at most")


def _return(config: Mapping[str, str]) -> Result:
    if config.get("ReturnToService") == "0":
        return warning(
            "ReturnToService",
            "0: a node that was lost stays DOWN until an operator resumes it",
            f"keep more nodes than replica groups, or {_ADMIN} for ReturnToService=1",
        )
    return _known(config, "ReturnToService", "a node that did not answer comes back by itself")


def _preemption(config: Mapping[str, str]) -> Result:
    mode = config.get("PreemptMode", "OFF")
    return _preempt_mode(mode) or passed(
        "PreemptMode", f"{mode}" + (": a preempted task is requeued" if "REQUEUE" in mode else "")
    )


def _preempt_mode(mode: str) -> Result | None:
    for word, what in (
        ("CANCEL", "a preempted task is cancelled for good, and its replica group with it"),
        ("SUSPEND", "a preempted replica group stops in place, and the guardian kills it as hung"),
        ("GANG", "replica groups are stopped in turns, and the guardian kills them as hung"),
    ):
        if word in mode.split(","):
            return warning(
                "PreemptMode", f"{mode}: {what}", "choose a partition or QOS that is not preempted"
            )
    return None


def _exit_codes(config: Mapping[str, str]) -> Result:
    again = _codes(config.get("RequeueExit", ""))
    held = _codes(config.get("RequeueExitHold", ""))
    if again & FINAL_CODES or held & FINAL_CODES:
        return warning(
            "RequeueExit",
            f"RequeueExit={config.get('RequeueExit')}, RequeueExitHold="
            f"{config.get('RequeueExitHold')}: Slurm starts tasks again that ended for good "
            "(exit codes 1 and 2)",
            f"{_ADMIN} to leave 1 and 2 out; until then cancel such a task by hand",
        )
    return passed("RequeueExit", "none of the exit codes that end a task for good")


def _codes(value: str) -> set[str]:
    """Exit codes of a list such as ``1,10-12``."""
    found: set[str] = set()
    for low, high in re.findall(r"(\d+)(?:-(\d+))?", value):
        found |= {str(code) for code in range(int(low), min(int(high or low), 255) + 1)}
    return found


def partition(target: Target, partitions: Sequence[Partition]) -> Iterator[Result]:
    """Whether the partition that jobs would go to takes them."""
    chosen = chosen_partition(target, partitions)
    names = [one.name for one in partitions]
    if chosen is None and not target.partition:
        yield failed(
            "partition",
            f"none is named, and Slurm has no default (there are {', '.join(names) or 'none'})",
            "name one: --partition, or SBATCH_PARTITION",
        )
        return
    if chosen is None:
        near = difflib.get_close_matches(target.partition, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names) or 'none'}"
        yield failed(
            "partition",
            f"there is no partition {target.partition}, or you may not see it",
            f"{hint}; name one by --partition or SBATCH_PARTITION",
        )
        return
    if chosen.state != "UP":
        yield failed(
            "partition",
            f"{chosen.name} is {chosen.state}: nothing is started there",
            "choose another by --partition, or wait until it is UP",
        )
        return
    allowed = chosen.settings.get("AllowAccounts", "ALL")
    if target.account and allowed != "ALL" and target.account not in allowed.split(","):
        yield failed(
            "partition",
            f"{chosen.name} takes the accounts {allowed} only, and not {target.account}",
            "name one of them: --account, or SBATCH_ACCOUNT",
        )
        return
    which = "" if target.partition else " (Slurm's default)"
    yield passed("partition", f"{chosen.name}{which} is UP, time limit {chosen.max_time}")
    if chosen.max_time not in ("UNLIMITED", "INFINITE") and chosen.max_time.count("-") == 0:
        yield warning(
            "time limit",
            f"{chosen.name} ends every job after {chosen.max_time}, and a run with it",
            "turn checkpoints on (TFT_EXTRA_ARGS=--checkpoint.enable), or choose another partition",
        )
    if (found := _preempt_mode(chosen.settings.get("PreemptMode", ""))) is not None:
        yield found


def chosen_partition(target: Target, partitions: Sequence[Partition]) -> Partition | None:
    """The one that jobs would go to; None when there is no such."""
    for one in partitions:
        if one.name == target.partition or (not target.partition and one.default):
            return one
    return None


def nodes(target: Target, found: Sequence[Resources]) -> Iterator[Result]:
    """Whether a partition has nodes that run, and enough GPUs on them."""
    up = [one for one in found if one.up]
    down = ", ".join(f"{one.name} ({one.state})" for one in found if not one.up)
    said = f"{len(up)} of {len(found)} are up" + (f"; not {down[:200]}" if down else "")
    if not up:
        yield failed("nodes", said, "`sinfo -R` says why; choose another partition, or wait")
    elif len(up) == 1:
        yield warning(
            "nodes",
            said,
            "one node is one replica group, with no peer to heal from: `sinfo -R` says why the "
            "others are not up",
        )
    else:
        yield passed("nodes", said)
    if target.device != "cuda":
        yield passed("GPUs", "not needed: TFT_DEVICE=cpu")
        return
    enough = [one for one in up if one.gpus >= target.ranks_per_node]
    if not enough:
        most = max((one.gpus for one in up), default=0)
        yield failed(
            "GPUs",
            f"no node has the {target.ranks_per_node} that its ranks need; the most is {most}",
            (
                f"set TFT_RANKS_PER_NODE={most} and submit with --gpus-per-node={most}, or choose "
                "another partition"
            )
            if most
            else f"choose another partition; where Slurm does not count GPUs (no GRES), {_ADMIN}",
        )
        return
    yield passed("GPUs", f"{len(enough)} nodes have {target.ranks_per_node} or more")


def account(
    target: Target, config: Mapping[str, str], associations: Sequence[Association] | str
) -> Result:
    """Whether the account and QOS may be used.

    Args:
        associations: those of this user; a text says why they could not be asked for.
    """
    enforced = config.get("AccountingStorageEnforce", "none") not in ("none", "(null)", "")
    if config.get("AccountingStorageType", "").endswith("/none") or not enforced:
        return passed("account", "Slurm does not enforce accounts here")
    if isinstance(associations, str):
        named = bool(target.account or target.qos)
        return blind("account", associations, "`sacctmgr show associations` asks", needed=named)
    if not associations:
        return failed(
            "account", "you may charge none, and Slurm enforces them", f"{_ADMIN} for an account"
        )
    usable = [one for one in associations if target.account in ("", one.account)]
    usable = [one for one in usable if one.partition in ("", target.partition)]
    names = sorted({one.account for one in associations})
    if not usable:
        return failed(
            "account",
            f"you may not charge {target.account or 'any account'}"
            + (f" in partition {target.partition}" if target.partition else ""),
            f"you may charge {', '.join(names)}: --account, or SBATCH_ACCOUNT",
        )
    known = sorted({qos for one in usable for qos in one.qos})
    if target.qos and target.qos not in known:
        return failed(
            "account",
            f"QOS {target.qos} is not among yours",
            f"yours are {', '.join(known) or 'none'}: SBATCH_QOS",
        )
    return passed("account", f"{target.account or 'the default one'}, of {', '.join(names)}")


def _seconds(config: Mapping[str, str], name: str) -> float | None:
    return cluster.seconds(config.get(name, ""))


def _known(config: Mapping[str, str], name: str, meaning: str) -> Result:
    if name not in config:
        return _unknown(name, config)
    return passed(name, f"{config[name]}: {meaning}")


def _unknown(name: str, config: Mapping[str, str]) -> Result:
    said = f"scontrol shows {name} as {config[name]!r}" if name in config else "scontrol hides it"
    return blind(name, said, "look at `scontrol show config` by hand", needed=False)
