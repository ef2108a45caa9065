"""Entry of the trainer's ranks: ``torchrun … -m launcher.train --job.config_file …``."""

import os

from launcher.train import rank


def load(waits: bool) -> None:
    # The device must be settled before torchtitan is imported: it asks for it
    # at import time, in a module constant.
    from launcher.train import device

    device.prepare(os.environ.get("TFT_DEVICE", "cuda"))

    import launcher.train.trainer  # noqa: F401


def main() -> None:
    begun = rank.begin(load)

    from launcher.train.trainer import run

    run(begun)


if __name__ == "__main__":
    main()
