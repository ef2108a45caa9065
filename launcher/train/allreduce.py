"""An all-reduce over the ranks of a job, with its bandwidth: what ``launcher doctor --deep`` runs.

Rank 0 writes the figures to the file that is named on the command line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

#: Bytes of the tensor, and how often it is summed for the figure.
BYTES = {"cuda": 512 << 20, "cpu": 32 << 20}
ROUNDS = 5
#: Seconds that a collective may take, the first one with its connections.
PATIENCE = timedelta(seconds=60)


def main(path: str) -> None:
    """Sum a tensor over all ranks, check it, and time it.

    Raises:
        RuntimeError: the ranks cannot reach each other, or not within a minute.
    """
    import torch
    import torch.distributed as dist

    kind = os.environ.get("TFT_DEVICE", "cuda")
    device = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else kind
    if kind == "cuda":
        torch.cuda.set_device(device)
    begun = time.perf_counter()
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        small = torch.full((1,), float(rank + 1), device=device)
        dist.all_reduce(small)
        right = small.item() == ranks * (ranks + 1) / 2
        met = time.perf_counter() - begun
        large = torch.ones(BYTES[kind] // 4, device=device)
        seconds = []
        for _ in range(ROUNDS + 1):  # the first one warms up
            large.fill_(1.0)
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(large)
            if kind == "cuda":
                torch.cuda.synchronize()  # the barrier above has synchronized before
            seconds.append(time.perf_counter() - begun)
        right = right and large[-1].item() == ranks
    finally:
        dist.destroy_process_group()
    if rank == 0:
        best = min(seconds[1:])
        result = {
            "ranks": ranks,
            "backend": "nccl" if kind == "cuda" else "gloo",
            "bytes": BYTES[kind],
            "right": right,
            "met_seconds": met,
            "seconds": best,
            # Bytes that each rank sends and receives in a ring, a second.
            "bus_bytes_per_second": BYTES[kind] * 2 * (ranks - 1) / ranks / best,
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main(sys.argv[1])
