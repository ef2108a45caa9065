"""A cheap fingerprint of one rank's share of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


@torch.no_grad()
def weight_hash(weights: Iterable[torch.Tensor]) -> str:
    """Hash of this rank's shards of ``weights``, 16 hexadecimal digits.

    Equal on the same rank of two replica groups exactly when each of their shards
    has the same exclusive-or over its elements' bits (``torch.hash_tensor``), which
    any single differing weight changes. Runs on the device; one small copy to the host.
    """
    shards = []
    for weight in weights:
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if local.numel():
            shards.append(torch.hash_tensor(local.detach()).view(torch.int64))
    digests = torch.stack(shards).tolist() if shards else []
    return hashlib.blake2b(repr(digests).encode(), digest_size=8).hexdigest()
