"""One rank of torchtitan without this kit, for comparison: ``torchrun -m benchmarks.bare_rank MODE …``.

``titan`` is torchtitan's own trainer, ``ft`` its fault-tolerant one. Both get what they need to run on
CPU at all, and ``ft`` the gradient hook that one rank a group lacks upstream: without it there would
be nothing to compare.
"""

from __future__ import annotations

import dataclasses
import sys


def main() -> None:
    from launcher.train import device

    mode = sys.argv.pop(1)
    device.prepare("cpu")
    import torchtitan.experiments.ft.train as ft_train
    import torchtitan.protocols.train_spec as train_spec
    import torchtitan.train

    from launcher.train import data, spec

    data.register()
    if mode == "titan":
        torchtitan.train.main(torchtitan.train.Trainer)
        return
    original = train_spec.get_train_spec("llama3")
    train_spec._extra_train_specs["llama3"] = dataclasses.replace(
        original, parallelize_fn=spec._parallelize(original.parallelize_fn)
    )
    ft_train.main(ft_train.FTTrainer)


if __name__ == "__main__":
    main()
