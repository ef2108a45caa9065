"""The vocabulary of replica groups' text logs: each kind of line, with samples of every form. Pure.

A sample says what is known of it: the version whose print was recorded, or whose source was read.
(That of the lighthouse's log is in ``launcher/lighthouse_log.py``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Sample(NamedTuple):
    """One line of a log."""

    line: str
    seen: str
    """Version of the program that printed it, or in whose source it stands ("source of")."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """One kind of line that means something."""

    kind: str
    regex: str
    """Named groups become fields; ``name`` is what torchft calls the replica group, ``replica`` its
    number, ``time`` the time. Where there is no ``text``, that is the whole message."""
    samples: tuple[Sample, ...]
    """One for every alternative of the pattern."""
    calm: bool = True
    """Whether a line of level INFO or DEBUG can say so too."""
    is_text: bool = False
    """Whether the whole message is the event's ``text``."""


#: torchft's manager: of Python, and of Rust since 2025-03 (the part before the colon, or a bare uuid).
_ID = r"\[(?P<name>[^\s\[\]]{1,200})/(?P<rank>\d{1,6}) - step (?P<step>\d{1,15})\] "
_RUST = r"(?:\[Replica (?P<name>[^\]]{1,200})\] )?"
_TIME = r"(?P<time>\d{4}-\d\d-\d\dT[\d:]{8})"
_FT = "torchft-nightly 2026.10.26"
_FT_SOURCE = "source of torchft, "
_SLURM, _SLURM_SOURCE = "Slurm 22.05.8", "source of Slurm 22.05"
_QUOTED = "not printed here: as others quote it"
_PY = (
    "[titan] 2026-11-20 14:31:46,890 - torchft.manager - INFO - [torchtitan_ft_0:99-c/0 - step 10] "
)
_RS = "2026-11-20T14:31:46.888 [INFO] [torchft::manager] - [Replica torchtitan_ft_1] "
_CANCELLED = "slurmstepd: error: *** JOB 5185080 ON worker-1 CANCELLED AT 2026-11-20T14:31:46"

#: The vocabulary of replica groups' text logs, in the order in which it is tried. Numbers of any
#: length are bounded: what is longer is none.
PATTERNS = (
    Pattern(
        kind="commit",
        regex=_ID + r"should_commit=(?P<committed>True|False) enough_replicas=",
        samples=(
            Sample(_PY + "should_commit=False enough_replicas=True, errored=Read error", _FT),
            Sample(_PY + "should_commit=True enough_replicas=True, errored=None", _FT),
            Sample(
                "INFO:torchft.manager:[93cb4be4-a05f-4e59-a477-7a4dead2f25a/0 - step 46] "
                "should_commit=True enough_replicas=True, errored=None",
                _FT,
            ),
            Sample(
                "INFO:torchft.manager:[train_ddp_1e2bec276-13c7-484c-bd4e-f3442c74af1d/0 - step 4] "
                "should_commit=True enough_replicas=True, errored=None",
                _FT_SOURCE + "before 2025-03",
            ),
        ),
    ),
    Pattern(
        kind="metrics",
        regex=r"\bstep: +(?P<titan_step>\d{1,15}) +loss: +(?P<loss>-?(?:\d[\d.]{0,20}(?:e[-+]?\d{1,3})?"
        r"|inf|nan))(?!\S).{0,300}?\btps: (?P<tokens_per_second>\d[\d,]{0,20})",
        samples=(
            Sample(
                "[titan] 2026-11-20 13:59:24,073 - root - INFO - step: 36  loss:  6.04175  "
                "grad_norm:  0.8876  memory: -0.00GiB(-0.00%)  tps: 1,609  tflops: 0.02  mfu: 0.01%",
                "torchtitan 0.2.2",
            ),
            Sample(
                "[titan] 2026-11-20 13:59:24,073 - root - INFO - step: 37  loss:      nan  "
                "grad_norm:     nan  memory: -0.00GiB(-0.00%)  tps: 609  tflops: 0.02  mfu: 0.01%",
                "source of torchtitan 0.2.2",
            ),
        ),
    ),
    Pattern(
        kind="end",
        regex=r"- INFO - Training completed$",
        samples=(
            Sample(
                "[titan] 2026-11-20 15:25:31,910 - root - INFO - Training completed",
                "torchtitan 0.2.2",
            ),
        ),
    ),
    Pattern(
        kind="launch",
        regex=r"^\[[-\d]+ [:\d]+\] launching replica (?P<replica>\d{1,6}) "
        r"\(attempt (?P<attempt>\d{1,9})\) on (?P<host>\S+)",
        samples=(
            Sample(
                "[2026-11-20 14:31:20] launching replica 0 (attempt 1) on worker-0", "this kit 0.1"
            ),
        ),
    ),
    Pattern(
        kind="exit",
        regex=r"^\[[-\d]+ [:\d]+\] replica (?P<replica>\d{1,6}) \(attempt (?P<attempt>\d{1,9})\) on "
        r"(?P<host>\S+) (?P<reason>(?:failed: |was stopped by |finished).*?)"
        r"(?:; every rank's output.*| \(node down.*)?$",
        samples=(
            Sample(
                "[2026-11-20 14:31:47] replica 1 (attempt 1) on worker-1 was stopped by SIGTERM "
                "(node down, requeue, time limit or cancel)",
                "this kit 0.1",
            ),
            Sample(
                "[2026-11-20 15:24:41] replica 1 (attempt 1) on worker-1 failed: rank 0 (pid 12671) "
                "was killed by SIGKILL; every rank's output: outputs/torchft/tft-5188040/ranks/1.1",
                "this kit 0.1",
            ),
            Sample(
                "[2026-11-20 15:25:32] replica 0 (attempt 1) on worker-0 finished", "this kit 0.1"
            ),
        ),
    ),
    Pattern(
        kind="quorum",
        regex=_ID + r"reconfiguring for quorum_id=(?P<quorum_id>\d{1,15})",
        samples=(Sample(_PY + "reconfiguring for quorum_id=2", _FT),),
    ),
    Pattern(
        kind="healing",
        regex=_ID + r"healing required, fetching checkpoint metadata from .{0,400}?"
        r"max_step=(?P<max_step>\d{1,15})",
        samples=(
            Sample(
                _PY + "healing required, fetching checkpoint metadata from "
                "recover_src_manager_address='http://worker-0:40989' max_step=34",
                _FT,
            ),
        ),
    ),
    Pattern(
        kind="healing",
        regex=_RUST
        + r"healing is required step=(?P<step>\d{1,15}), max_step=(?P<max_step>\d{1,15})",
        samples=(
            Sample(
                _RS + "healing is required step=0, max_step=164, recover_src_replica_rank=0", _FT
            ),
            Sample(
                "2025-02-01T12:00:00.123+00:00 - INFO - healing is required step=0, max_step=164, "
                "recover_src_rank=0",
                _FT_SOURCE + "before 2025-03",
            ),
        ),
    ),
    Pattern(
        kind="healed",
        regex=_ID + r"Loaded state dict\.",
        samples=(Sample(_PY + "Loaded state dict.", _FT),),
    ),
    Pattern(
        kind="slurm_cancelled",
        # A step that is cancelled for no reason is one whose srun our own launcher has killed.
        regex=r"(?:slurmstepd|tft-local)\S*: error: \*\*\* (?:JOB|STEP(?=.* DUE TO )) \S+ ON "
        r"(?P<host>\S+) CANCELLED AT " + _TIME + r"(?: DUE to SIGNAL \w+"
        r"| DUE TO (?P<due>[A-Z ]+?))?(?:,.*)? \*\*\*",
        samples=(
            Sample(
                "slurmstepd-worker-1: error: *** JOB 5185080 ON worker-1 CANCELLED AT "
                "2026-11-20T14:31:46 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***",
                _SLURM,
            ),
            Sample(_CANCELLED + " DUE TO JOB REQUEUE ***", _SLURM),
            Sample(_CANCELLED + " DUE TO PREEMPTION ***", _SLURM_SOURCE),
            Sample(_CANCELLED + " DUE TO TIME LIMIT ***", _SLURM_SOURCE),
            Sample(_CANCELLED + " ***", _SLURM_SOURCE),
            Sample(_CANCELLED + " DUE to SIGNAL Terminated ***", _QUOTED),
            Sample(
                "slurmstepd-w: error: *** STEP 5280600.3 ON worker-2 CANCELLED AT "
                "2026-11-20T14:31:46 DUE TO TIME LIMIT ***",
                _SLURM_SOURCE,
            ),
            Sample(
                "tft-local: error: *** JOB 7 ON gpu-0 CANCELLED AT 2026-11-20T14:31:46 DUE TO JOB "
                "REQUEUE ***",
                "this kit 0.1",
            ),
        ),
    ),
    Pattern(
        kind="node_failed",
        regex=r"srun: error: Node failure on (?P<host>\S+)",
        samples=(Sample("srun: error: Node failure on worker-1", _SLURM_SOURCE),),
    ),
    Pattern(
        kind="kill_request",
        regex=r"torchft::manager\b[^:]{0,40}?" + _RUST + r"got kill request: (?P<text>.*)",
        samples=(
            Sample(
                "2026-11-20T14:31:46.888 [WARN] [torchft::manager] - got kill request: killed from "
                "dashboard",
                _FT,
            ),
            Sample(
                _RS.replace("INFO", "WARN") + "got kill request: killed from dashboard",
                "no version known: as its other lines are printed",
            ),
        ),
    ),
    Pattern(
        kind="heartbeat_failed",
        regex=_RUST + r"Failed to send heartbeat to lighthouse: (?P<text>.*)",
        samples=(Sample(_RS + "Failed to send heartbeat to lighthouse: status: Unavailable", _FT),),
    ),
    Pattern(
        kind="quorum_failed",
        regex=_RUST + r"lighthouse quorum (?:failed\. error: |(?=timeout\. error: ))(?P<text>.*)",
        samples=(
            Sample(_RS + "lighthouse quorum failed. error: status: Unavailable", _FT),
            Sample(
                _RS + "lighthouse quorum timeout. error: status: Cancelled",
                _FT_SOURCE + "since 2025-09",
            ),
        ),
    ),
    Pattern(
        kind="out_of_memory",
        calm=False,
        is_text=True,
        regex=r"OutOfMemoryError|CUDA out of memory|CUDA error: out of memory|\boom[-_]kill|"
        r"Out Of Memory|Out of memory: Kill|(?:annot|can't) allocate memory|^MemoryError\b|"
        r"std::bad_alloc|exceeded (?:step |job )?(?:virtual )?memory limit.{0,60}being killed",
        samples=(
            Sample("torch.OutOfMemoryError: CUDA out of memory. Tried 2.00 GiB.", "torch 2.13.0"),
            Sample(
                "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB", "source of torch 1"
            ),
            Sample("RuntimeError: CUDA error: out of memory", _QUOTED),
            Sample(
                "slurmstepd: error: Detected 1 oom-kill event(s) in step 1.batch cgroup.", _QUOTED
            ),
            Sample(
                "slurmstepd: error: Detected 1 oom_kill event in StepId=1234.0. Some of the step "
                "tasks have been OOM Killed.",
                _QUOTED,
            ),
            Sample("srun: error: worker-1: task 0: Out Of Memory", _QUOTED),
            Sample("[1.2] Out of memory: Killed process 99 (python)", "source of Linux 5"),
            Sample("OSError: [Errno 12] Cannot allocate memory", "Python 3.11"),
            Sample(
                "RuntimeError: [enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
                "can't allocate memory: you tried to allocate 3409920 bytes.",
                "torch 2.13.0",
            ),
            Sample("MemoryError", "Python 3.11"),
            Sample("  what():  std::bad_alloc", "libstdc++ 12"),
            Sample(
                "slurmstepd: error: StepId=7.batch exceeded memory limit (734003200 > 52428800), "
                "being killed",
                "source of Slurm",
            ),
        ),
    ),
    Pattern(
        kind="device_error",
        calm=False,
        is_text=True,
        regex=r"\bXid\b.{0,40}?: (?P<xid>\d{1,9})\b|\bCUDA error: |[Uu]ncorrectable ECC|"
        r"fallen off the bus|UNCORRECTABLE MEMORY ERROR",
        samples=(
            Sample(
                "[ 1234.5] NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.",
                _QUOTED,
            ),
            Sample("RuntimeError: CUDA error: an illegal memory access was encountered", _QUOTED),
            Sample("RuntimeError: CUDA: uncorrectable ECC error encountered", _QUOTED),
            Sample("NVRM: GPU 0000:01:00.0: GPU has fallen off the bus.", _QUOTED),
            Sample(
                "slurmstepd: error: *** JOB 7 ON worker-1 UNCORRECTABLE MEMORY ERROR AT "
                "2026-11-20T14:31:46 ***",
                _SLURM_SOURCE,
            ),
        ),
    ),
    Pattern(
        kind="nccl_error",
        calm=False,
        is_text=True,
        regex=r"NCCL error|Watchdog caught collective operation timeout|(?P<warning>NCCL WARN )|"
        r"\bnccl(?:System|Internal|Remote|UnhandledCuda)Error",
        samples=(
            Sample(
                "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3690, "
                "unhandled cuda error, NCCL version 2.27.3",
                "source of torch 2.13",
            ),
            Sample(
                "[rank3]:[E1121 23:17:50.1 ProcessGroupNCCL.cpp:632] [Rank 3] Watchdog caught "
                "collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE) ran for 100003 "
                "milliseconds before timing out.",
                _QUOTED,
            ),
            Sample("w-1:17:99 [0] net.cc:537 NCCL WARN Connect to 10.0.0.1 failed", _QUOTED),
            Sample("ncclSystemError: System call or external library call failed", _QUOTED),
            Sample("ncclInternalError: Internal check failed.", _QUOTED),
            Sample("ncclRemoteError: A call failed possibly due to a network error", _QUOTED),
            Sample("ncclUnhandledCudaError: Call to CUDA function failed.", _QUOTED),
        ),
    ),
    Pattern(
        kind="rank_failed",
        regex=r"exitcode +: (?P<exit_code>-?\d{1,9}) +\(pid: (?P<pid>\d{1,15})\)",
        samples=(Sample("  exitcode  : -9 (pid: 7144)  (SIGKILL)", "torch 2.13.0"),),
    ),
    Pattern(
        kind="rank_failed",
        regex=r"failed \(exitcode: (?P<exit_code>-?\d{1,9})\) local_rank: (?P<rank>\d{1,6}) "
        r"\(pid: (?P<pid>\d{1,15})\)",
        samples=(
            Sample(
                "E1120 15:24:41.189000 12656 torch/distributed/elastic/multiprocessing/api.py:1002] "
                "failed (exitcode: -9) local_rank: 3 (pid: 12671) of binary: bin/python",
                "torch 2.13.0",
            ),
        ),
    ),
    Pattern(
        kind="rank_failed",
        regex=r"^ *traceback : (?P<text>Signal \d{1,3} \(\S+\) received by PID "
        r"(?P<pid>\d{1,15}))",
        samples=(Sample("  traceback : Signal 9 (SIGKILL) received by PID 12671", "torch 2.13.0"),),
    ),
    Pattern(
        kind="task_failed",
        regex=r"srun: error: (?P<host>\S+): tasks? (?P<task>[-\d,]{1,80}): "
        r"(?P<text>(?!Terminated|Exited with exit code 0\b)\S.*)",
        samples=(
            Sample("srun: error: worker-1: task 3: Killed", _QUOTED),
            Sample("srun: error: worker-1: tasks 0-3: Exited with exit code 1", _QUOTED),
        ),
    ),
    Pattern(
        kind="fatal",
        regex=r"^(?P<text>Fatal Python error: .*|terminate called after throwing .*|"
        r"(?:Segmentation fault|Bus error|Aborted|Illegal instruction)(?: \(core dumped\))?)$",
        samples=(
            Sample("Fatal Python error: Segmentation fault", "Python 3.11"),
            Sample("terminate called after throwing an instance of 'c10::Error'", "libstdc++ 12"),
            Sample("Segmentation fault (core dumped)", "glibc 2.36"),
            Sample("Bus error", "glibc 2.36"),
            Sample("Aborted (core dumped)", "glibc 2.36"),
            Sample("Illegal instruction", "glibc 2.36"),
        ),
    ),
    Pattern(
        kind="exception",
        regex=r"^(?P<text>[A-Za-z_][\w.]{0,200}?(?:Error|Exception|Interrupt)(?![\w.])(?::.*)?)$",
        samples=(
            Sample("RuntimeError: [pair.cc:537] Read error: Connection reset by peer.", "Python 3"),
            Sample("AssertionError", "Python 3.11"),
            Sample(
                "torch.distributed.elastic.multiprocessing.api.SignalException: x", "torch 2.13"
            ),
            Sample("KeyboardInterrupt", "Python 3.11"),
        ),
    ),
)
