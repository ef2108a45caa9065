"""torchft's lighthouse in a process of its own, without importing torch.

``torchft_lighthouse`` imports the whole of torchft, and with it torch, before it
serves: seconds and hundreds of megabytes on a login node. The server itself is in
torchft's native module, which loads alone in milliseconds. Run by path, with the
flags of ``torchft_lighthouse``::

    python launcher/lighthouse_process.py --bind [::]:29510 --min_replicas 1
    python launcher/lighthouse_process.py --raise-past 41 http://login-0:29510
"""

import ctypes
import datetime
import importlib.machinery
import importlib.util
import signal
import sys
from pathlib import Path
from typing import Any


def native_module() -> Path:
    """File of torchft's native module.

    Raises:
        FileNotFoundError: torchft is not installed in this environment.
    """
    for entry in sys.path:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            path = Path(entry, "torchft", f"_torchft{suffix}")
            if path.is_file():
                return path
    raise FileNotFoundError("torchft is not installed here: run `make setup` first")


def raise_past(native: Any, quorum_id: int, url: str) -> None:
    """Bring a lighthouse's quorum id past ``quorum_id``, a third of a millisecond each.

    A replica group that exists for this alone says that its commits fail: each time, the
    lighthouse gives out the next id.
    """
    seconds = datetime.timedelta(seconds=5)
    manager = native.ManagerServer(
        replica_id="raise:0",
        lighthouse_addr=url,
        hostname="127.0.0.1",
        bind="127.0.0.1:0",
        store_addr="",
        world_size=1,
        heartbeat_interval=datetime.timedelta(seconds=60),
        connect_timeout=seconds,
        quorum_retries=0,
    )
    client = native.ManagerClient(manager.address(), connect_timeout=seconds)
    reached = 0
    while reached <= quorum_id:
        reached = client._quorum(
            group_rank=0,
            step=0,
            checkpoint_metadata="",
            shrink_only=False,
            timeout=seconds,
            commit_failures=1,
            reconfigure_handle="",
            init_sync=False,
        ).quorum_id
    manager.shutdown()


def main() -> None:
    # PR_SET_PDEATHSIG = 1: end with the supervisor, however it ends.
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
    path = str(native_module())
    loader = importlib.machinery.ExtensionFileLoader("_torchft", path)
    spec = importlib.util.spec_from_file_location("_torchft", path, loader=loader)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:2] == ["--raise-past"]:
        raise_past(module, int(sys.argv[2]), sys.argv[3])
    else:
        module.lighthouse_main()


if __name__ == "__main__":
    main()
