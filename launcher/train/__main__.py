"""Entry of every rank: ``torchrun … -m launcher.train --job.config_file …``."""

import os
import sys

from launcher.parentage import die_with_parent


def main() -> None:
    die_with_parent()
    # The device must be settled before torchtitan is imported: it asks for it
    # at import time, in a module constant.
    from launcher.train import device

    try:
        device.prepare(os.environ.get("TFT_DEVICE", "cuda"))
    except device.DeviceError as error:
        sys.exit(f"error: {error}")

    from launcher.train.trainer import run

    run()


if __name__ == "__main__":
    main()
