"""How every rank begins, the trainer's and a script's: tied to its launcher, listening, waiting.

A rank that is started to stand ready makes its imports, and waits to be told which replica group
to be.
"""

import faulthandler
import json
import os
import signal
import sys
import time
from collections.abc import Callable

from launcher.parentage import die_with_parent


def begin(load: Callable[[bool], None]) -> float:
    """Do what comes before training.

    Args:
        load: makes the imports; told whether this rank is to wait after them.

    Returns:
        When this start of the rank began, Unix seconds: its process did, or its waiting ended.
    """
    begun = time.time()
    die_with_parent()
    listen_for_drills()
    standby = os.environ.pop("TFT_STANDBY", "")
    if not standby:
        write_stacks_when_asked()
    # torch's import comes after what must not wait for it.
    from launcher.train.device import DeviceError

    try:
        load(bool(standby))
    except DeviceError as error:
        sys.exit(f"error: {error}")
    if standby:
        refuse_a_device_in_use()
        await_assignment(standby)
        begun = time.time()
        write_stacks_when_asked()
    return begun


def write_stacks_when_asked() -> None:
    """On SIGQUIT, write what every thread is doing; the launcher asks before it kills a hung
    replica group. Needs neither the GIL nor a thread that listens."""
    folder = os.environ.get("TFT_STACKS")
    if not folder:
        return
    try:
        file = open(os.path.join(folder, f"stacks.{os.environ.get('RANK', '0')}.txt"), "w")  # noqa: SIM115
    except OSError as error:
        print(f"no stacks will be written: {error}", file=sys.stderr)
        return
    faulthandler.register(signal.SIGQUIT, file=file, all_threads=True)


def listen_for_drills() -> None:
    """Hang on SIGUSR1, and ask for more memory than there is on SIGUSR2, in the thread that
    trains: what a drill cannot do to a rank from outside. Only when the run was submitted so."""
    if os.environ.get("TFT_DRILLS") == "1":
        signal.signal(signal.SIGUSR1, hang_for_a_drill)
        signal.signal(signal.SIGUSR2, exhaust_memory_for_a_drill)


#: Seconds after which a rank without memory asks for some again.
AGAIN_SECONDS = 0.37


def hang_for_a_drill(number: int, frame: object) -> None:
    while True:
        time.sleep(600)


def exhaust_memory_for_a_drill(number: int, frame: object) -> None:
    # torchft takes an exception in a collective for a failed commit, and goes on; memory that is
    # gone stays gone.
    signal.signal(signal.SIGALRM, exhaust_memory_for_a_drill)
    signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
    held = []
    while True:  # up to the limit that the drill has set before
        held.append(bytearray(16 << 20))


def refuse_a_device_in_use() -> None:
    """Ranks that wait beside a training must take none of its GPU's memory."""
    import torch

    if torch.cuda.is_initialized():
        sys.exit("error: the imports of this rank, which is to wait, have taken a CUDA context")


def await_assignment(path: str) -> None:
    """Wait to be told which replica group to be; take on its command line and environment."""
    folder, rank = os.path.dirname(path), os.environ.get("RANK", "0")
    with open(os.path.join(folder, f"ready.{rank}"), "w"):
        pass
    while not (text := _read(path)):
        time.sleep(0.05)
    assignment = json.loads(text)
    os.environ.update(assignment["env"])
    sys.argv[1:] = assignment["flags"]


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        text = file.read()
    return text if text.endswith("}") else ""
