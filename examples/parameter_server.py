"""A parameter server in a page: it keeps the weights, and workers come and go. torchft's own
``ParameterServer`` gives every worker a process group of two, so that one that dies takes nobody along.
It needs no lighthouse and no replica groups, and runs plainly, or as jobs of their own:

    python examples/parameter_server.py serve --port 29700
    python examples/parameter_server.py work http://SERVER:29700/new_session    # any number, any time

On GPUs it uses NCCL (server and workers each with a GPU of their own: CUDA_VISIBLE_DEVICES), on CPUs gloo.
"""

import argparse
import os
import threading
import time

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torchft import ProcessGroupGloo, ProcessGroupNCCL
from torchft.parameter_server import ParameterServer
from torchft.process_group import ProcessGroup

SERVER, WORKER = 0, 1  # ranks in a session
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: Seconds that workers get to take the last weights.
LAST_WORDS = 30.0


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 1)).to(DEVICE)


class Server(ParameterServer):
    def __init__(self, port: int, updates: int) -> None:
        self.weights = parameters_to_vector(new_model().parameters()).detach()
        self.optimizer = torch.optim.Adam([self.weights], lr=1e-3)
        self.left = updates
        self.sessions = self.lost = 0
        self.changed = threading.Condition()
        super().__init__(port)

    @classmethod
    def new_process_group(cls) -> ProcessGroup:
        return ProcessGroupNCCL() if DEVICE.type == "cuda" else ProcessGroupGloo()

    def forward(self, session_id: str, pg: ProcessGroup) -> None:
        """One worker, in a thread of its own, until there is nothing left to do. (After it torchft's
        HTTP handler says ``I/O operation on closed file``, which means nothing.)"""
        with self.changed:
            self.sessions += 1
        try:
            while self._turn(pg):
                pass
        except Exception as error:
            print(f"lost a worker: {error!s:.90}")
            self.lost += 1
        # Freed here, in its own thread: while Python ends it would take the server down.
        pg.abort(errored=False)
        with self.changed:
            self.sessions -= 1
            self.changed.notify_all()

    def _turn(self, pg: ProcessGroup) -> bool:
        with self.changed:
            more = self.left > 0
            weights = torch.cat([self.weights, self.weights.new_tensor([float(more)])])
        pg.broadcast_one(weights, root=SERVER).wait()
        if not more:
            return False
        gradient = torch.empty_like(self.weights)
        pg.broadcast_one(gradient, root=WORKER).wait()
        with self.changed:
            if self.left > 0:
                self.weights.grad = gradient
                self.optimizer.step()
                self.left -= 1
                self.changed.notify_all()
        return True


def serve(port: int, updates: int) -> None:
    server = Server(port, updates)
    print(f"serving at {server.address()}")
    with server.changed:
        server.changed.wait_for(lambda: not server.left)
        server.changed.wait_for(lambda: not server.sessions, LAST_WORDS)
    print(f"done: {updates} updates, {server.lost} workers lost", flush=True)
    # A session whose worker died may still be in its process group, which ends an ordinary exit by
    # SIGABRT now and then.
    os._exit(0)


def work(address: str) -> None:
    pg, model = Server.new_session(address), new_model()
    weights = torch.cat(
        [parameters_to_vector(model.parameters()).detach(), torch.ones(1).to(DEVICE)]
    )
    generator, steps, since = torch.Generator().manual_seed(os.getpid()), 0, time.monotonic()
    while True:
        pg.broadcast_one(weights, root=SERVER).wait()
        if not weights[-1]:
            break
        vector_to_parameters(weights[:-1], model.parameters())
        values = torch.randn(32, 16, generator=generator).to(DEVICE)
        loss = nn.functional.mse_loss(model(values), values.sin().sum(dim=1, keepdim=True))
        gradient = parameters_to_vector(torch.autograd.grad(loss, list(model.parameters())))
        pg.broadcast_one(gradient, root=WORKER).wait()
        steps += 1
        if steps % 100 == 0:
            print(f"step {steps} loss {loss.item():.4f}")
    print(f"done after {steps} steps, {time.monotonic() - since:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    roles = parser.add_subparsers(dest="role", required=True)
    serving = roles.add_parser("serve")
    serving.add_argument("--port", type=int, default=29700)
    serving.add_argument("--updates", type=int, default=10_000, help="gradients to take in all")
    roles.add_parser("work").add_argument("address")
    arguments = parser.parse_args()
    if arguments.role == "serve":
        serve(arguments.port, arguments.updates)
    else:
        work(arguments.address)
