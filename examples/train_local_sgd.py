"""Fault-tolerant LocalSGD in a page: every replica group trains by itself, and every few steps
their weights are averaged. Little traffic; a group that is lost costs the others nothing until then.

    python -m launcher lighthouse up --detach
    TFT_RANKS_PER_NODE=1 sbatch --array=0-1 slurm/replica-group.sbatch examples/train_local_sgd.py
    python -m launcher monitor

On GPUs it uses NCCL, on CPUs (TFT_DEVICE=cpu) gloo. The manager's step counts synchronisations. A
group waits for its quorum as long as TORCHFT_QUORUM_TIMEOUT_SEC says (600): more than the time
between two of them.
"""

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torchft import Manager, ProcessGroupGloo, ProcessGroupNCCL
from torchft.local_sgd import LocalSGD

from launcher.train import tell  # for the monitor; leave it out where this kit is not

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--syncs", type=int, default=100, help="committed synchronisations")
parser.add_argument("--every", type=int, default=10, help="steps between two of them")
parser.add_argument("--batch", type=int, default=32, help="of one rank")
arguments = parser.parse_args()

group = int(os.environ["REPLICA_GROUP_ID"])
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
dist.init_process_group()  # the ranks of this group; those of the others are torchft's matter
rank, ranks = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same model in every rank of a group; group 0's is everybody's at first
model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 1)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def state() -> dict[str, object]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def load_state(state: dict[str, dict[str, object]]) -> None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


manager = Manager(
    # A group that hangs is noticed when the others' collective has lasted this long.
    pg=(ProcessGroupNCCL if device.type == "cuda" else ProcessGroupGloo)(timedelta(seconds=30)),
    load_state_dict=load_state,
    state_dict=state,
    min_replica_size=1,  # train on with one group
    use_async_quorum=False,  # who joins heals before it takes part in an average
)

# Every rank of every group draws samples of its own.
generator = torch.Generator().manual_seed(1 + group * ranks + rank)
with LocalSGD(manager, model, optimizer, sync_every=arguments.every):
    while manager.current_step() < arguments.syncs:
        synced = manager.current_step()
        values = torch.randn(arguments.batch, 16, generator=generator).to(device)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(values), values.sin().sum(dim=1, keepdim=True))
        loss.backward()
        for parameter in model.parameters():  # within the group, at every step
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
        optimizer.step()  # and between the groups, in every tenth of these
        if manager.current_step() > synced:
            step = manager.current_step()
            tell.weights(step, model)
            tell.metrics(step, loss=loss.item())
            print(f"sync {step} loss {loss.item():.4f} groups {manager.num_participants()}")

weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
print(f"done at sync {manager.current_step()}: weights {torch.hash_tensor(weights).item():016x}")
manager.shutdown()
dist.destroy_process_group()
