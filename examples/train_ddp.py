"""Fault-tolerant data parallelism in a page: gradients are averaged between replica groups
at every step, and a group that was lost heals from another one.

    python -m launcher lighthouse up --detach
    TFT_RANKS_PER_NODE=1 sbatch --array=0-1 slurm/replica-group.sbatch examples/train_ddp.py
    python -m launcher monitor

On GPUs it uses NCCL, on CPUs (TFT_DEVICE=cpu) gloo. A group may have several ranks: each averages its
gradients with its like in the other groups, and then with the other ranks of its own.
"""

import argparse
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchft import (
    DistributedDataParallel,
    DistributedSampler,
    Manager,
    Optimizer,
    ProcessGroupGloo,
    ProcessGroupNCCL,
)

from launcher.train import tell  # for the monitor; leave it out where this kit is not

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=1000, help="committed steps")
parser.add_argument("--batch", type=int, default=32, help="of one rank")
arguments = parser.parse_args()

group, groups = int(os.environ["REPLICA_GROUP_ID"]), int(os.environ["NUM_REPLICA_GROUPS"])
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
dist.init_process_group()  # the ranks of this group; those of the others are torchft's matter
rank, ranks = dist.get_rank(), dist.get_world_size()

# The same data everywhere; each rank of each group takes its own part.
torch.manual_seed(0)
inputs = torch.randn(4096, 16)
data = TensorDataset(inputs, inputs.sin().sum(dim=1, keepdim=True))
sampler = DistributedSampler(
    data, replica_rank=group, num_replica_groups=groups, group_rank=rank, num_replicas=ranks
)
loader = DataLoader(data, batch_size=arguments.batch, sampler=sampler)

model = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 1)).to(device)
inner = torch.optim.AdamW(model.parameters(), lr=1e-3)


def state() -> dict[str, object]:
    return {"model": model.state_dict(), "optimizer": inner.state_dict()}


def load_state(state: dict[str, dict[str, object]]) -> None:
    model.load_state_dict(state["model"])
    inner.load_state_dict(state["optimizer"])


manager = Manager(
    # A group that hangs is noticed when the others' collective has lasted this long.
    pg=(ProcessGroupNCCL if device.type == "cuda" else ProcessGroupGloo)(timedelta(seconds=30)),
    load_state_dict=load_state,
    state_dict=state,
    min_replica_size=1,  # train on with one group
)
optimizer = Optimizer(manager, inner)  # asks for a quorum in zero_grad, and commits in step
replicated = DistributedDataParallel(manager, model)

epoch = 0
while manager.current_step() < arguments.steps:
    sampler.set_epoch(epoch)
    epoch += 1
    for values, wanted in loader:
        if manager.current_step() >= arguments.steps:
            break
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(replicated(values.to(device)), wanted.to(device))
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= ranks
        optimizer.step()
        step = manager.current_step()
        if step % 10 == 0:
            tell.weights(step, model)
            tell.metrics(step, loss=loss.item())
            print(f"step {step} loss {loss.item():.4f} groups {manager.num_participants()}")

weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
print(f"done at step {manager.current_step()}: weights {torch.hash_tensor(weights).item():016x}")
manager.shutdown()
dist.destroy_process_group()
