"""torchft's lighthouse in a process of its own, without importing torch.

``torchft_lighthouse`` imports the whole of torchft, and with it torch, before it
serves: seconds and hundreds of megabytes on a login node. The server itself is in
torchft's native module, which loads alone in milliseconds. Run by path, with the
flags of ``torchft_lighthouse``::

    python launcher/lighthouse_process.py --bind [::]:29510 --min_replicas 1
"""

import ctypes
import importlib.machinery
import importlib.util
import signal
import sys
from pathlib import Path


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
    module.lighthouse_main()


if __name__ == "__main__":
    main()
