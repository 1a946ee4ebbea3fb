"""A DDP step with lowband beside plain DDP on gloo, on the layer matrices of the 166M model, steps in turn.

Started by perf/netns/ddp_1gbit, one process on each host, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import argparse
import json
import os
import pathlib
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lowband
import lowband.torch

WIDTH, FFN, LAYERS = 768, 2048, 18


class Layer(torch.nn.Module):
    """The seven matrices of a layer, in an order that gives every one a gradient; no attention, which has none."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (torch.nn.Linear(WIDTH, FFN, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Products of what is not normalised grow from layer to layer, to gradients that are no numbers.
        y = torch.nn.functional.rms_norm(x, (WIDTH,))
        x = x + self.o(torch.tanh(self.q(y)) * self.k(y) + self.v(y))
        y = torch.nn.functional.rms_norm(x, (WIDTH,))
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


def model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(*[Layer() for _ in range(LAYERS)])


def sent_bytes(interface: str) -> int:
    return int(pathlib.Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


class Measured:
    """Times of one of the two, and what its steps sent."""

    def __init__(self, name: str, module: DistributedDataParallel, optimizer: torch.optim.Optimizer) -> None:
        self.name, self.module, self.optimizer = name, module, optimizer
        self.seconds: list[float] = []
        self.bytes: list[int] = []

    def step(self, number: int, interface: str, recorded: bool) -> None:
        generator = torch.Generator().manual_seed(1000 * number + dist.get_rank())
        x = torch.randn(arguments.tokens, WIDTH, generator=generator)
        dist.barrier()
        before, begin = sent_bytes(interface), time.perf_counter()
        self.optimizer.zero_grad()
        self.module(x).square().mean().backward()
        self.optimizer.step()
        seconds = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # the slowest process
        if recorded:
            self.seconds.append(seconds.item())
            self.bytes.append(sent_bytes(interface) - before)

    def replicas_are_equal(self) -> bool:
        """Not when a weight is no number: that equals nothing."""
        own = torch.stack([p.detach().double().sum() for p in self.module.parameters()])
        everybody = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everybody, own)
        return all(torch.equal(own, other) for other in everybody)


parser = argparse.ArgumentParser()
parser.add_argument("--factor-rank", type=int, default=16)
parser.add_argument("--tokens", type=int, default=8, help="rows of a process's batch: little work, as for a slow network")
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--interface", default="eth0")
parser.add_argument("--json", required=True)
arguments = parser.parse_args()

torch.set_num_threads(1)
dist.init_process_group("gloo")
plain_module = DistributedDataParallel(model(), gradient_as_bucket_view=True)
plain = Measured("plain DDP, torch.optim.SGD", plain_module,
                 torch.optim.SGD(plain_module.parameters(), lr=0.01, momentum=0.95, foreach=True))
factored_module = DistributedDataParallel(model(), gradient_as_bucket_view=True)
optimizer = lowband.torch.Optimizer(factored_module.named_parameters(), lr=0.01, kind="dion", clip_norm=0.0,
                                    profile=lowband.uniform(arguments.factor_rank))
lowband.torch.attach_ddp(factored_module, optimizer)
factored = Measured(f"DDP with lowband, Dion at rank {arguments.factor_rank}", factored_module, optimizer)

skipped = 0
for number in range(arguments.steps + 1):  # the first of each is not recorded
    for measured in (plain, factored):
        measured.step(number, arguments.interface, recorded=number > 0)
    skipped += optimizer.last_report.skipped_matrices
planned, _ = optimizer.planned_bytes()
counted = torch.tensor([optimizer.step_bytes("factor", "replica").payload_bytes])
report = {
    "torch": torch.__version__, "processes": dist.get_world_size(), "tokens": arguments.tokens,
    "planned_factor_bytes": planned, "counted_factor_bytes": counted.item(), "skipped_matrices": skipped,
    "lines": [{"name": m.name, "seconds": m.seconds, "interface_bytes": m.bytes,
               "replicas_equal": m.replicas_are_equal()} for m in (plain, factored)],
}
if dist.get_rank() == 0:
    pathlib.Path(arguments.json).write_text(json.dumps(report))
optimizer.close()
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # gloo's threads may outlive their sockets here
