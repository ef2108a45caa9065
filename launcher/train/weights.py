"""A cheap fingerprint of one rank's share of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


@torch.no_grad()
def weight_hash(model_parts: Iterable[torch.nn.Module]) -> str:
    """Hash of this rank's parameter shards, 16 hexadecimal digits.

    Equal on the same rank of two replica groups exactly when each of their shards
    has the same exclusive-or over its elements' bits (``torch.hash_tensor``), which
    any single differing weight changes. Runs on the device; one small copy to the host.
    """
    shards = []
    for part in model_parts:
        for parameter in part.parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if local.numel():
                shards.append(torch.hash_tensor(local.detach()).view(torch.int64))
    digests = torch.stack(shards).tolist() if shards else []
    return hashlib.blake2b(repr(digests).encode(), digest_size=8).hexdigest()
