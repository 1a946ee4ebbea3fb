"""What the Python layer adds to a step of DDP with lowband, at the quick start's size: 3.3 M parameters, 8 sequences of
128 tokens on each of 2 processes, one thread each.

    LOWBAND_LIBRARY=build/release/plugin/liblowband.so PYTHONPATH=plugin/python \
        .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node 2 perf/compare/plugin_overhead.py [--check]

The layer's share of `optimizer.step` is its time less that of the C++ step inside it; that of the hook which keeps DDP from
averaging is the time inside the hook. --check: exit code 1 unless the two are below 1 % of a step.
"""

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import lowband
import lowband.torch

WIDTH, HEADS, FFN, LAYERS, SEQUENCE, SEQUENCES, VOCABULARY = 256, 8, 704, 4, 128, 8, 256


class Block(nn.Module):

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, FFN, bias=False) for _ in range(2))
        self.down = nn.Linear(FFN, WIDTH, bias=False)
        self.before_attention, self.before_mlp = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.before_attention(x)
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        h = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.layers(self.embedding(tokens[:, :-1]))) @ self.embedding.weight.T
        return F.cross_entropy(y.flatten(0, 1), tokens[:, 1:].flatten())


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=40)
parser.add_argument("--check", action="store_true")
arguments = parser.parse_args()

torch.set_num_threads(1)
dist.init_process_group("gloo")
model = DistributedDataParallel(Transformer())
matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
gains = [(n, p) for n, p in model.named_parameters() if p.ndim == 1]
embedding = [(n, p) for n, p in model.named_parameters() if "embedding" in n]
optimizer = lowband.torch.Optimizer([{"params": matrices, "lr": 0.02}, {"params": gains, "lr": 0.002},
                                     {"params": embedding, "lr": 0.002, "role": "embedding"}],
                                    profile=lowband.uniform(24))

in_hook = 0.0
register = model.register_comm_hook


def timed_register(state, hook):
    def timed(state, bucket):
        global in_hook
        begin = time.perf_counter()
        future = hook(state, bucket)
        in_hook += time.perf_counter() - begin
        return future

    register(state, timed)


model.register_comm_hook = timed_register
lowband.torch.attach_ddp(model, optimizer)

draw = torch.Generator().manual_seed(dist.get_rank())
steps, layer, hook = [], [], []
for number in range(arguments.steps + 5):
    tokens = torch.randint(VOCABULARY, (SEQUENCES, SEQUENCE + 1), generator=draw)
    in_hook = 0.0
    begin = time.perf_counter()
    optimizer.zero_grad()
    model(tokens).backward()
    before = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    if number >= 5:
        steps.append(end - begin)
        layer.append(end - before - optimizer.last_report.seconds)
        hook.append(in_hook)

step, own, kept = (statistics.median(x) for x in (steps, layer, hook))
fraction = (own + kept) / step
if dist.get_rank() == 0:
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, torch {torch.__version__}, medians of {arguments.steps} steps: "
          f"{1e3 * step:.1f} ms a step; the Python layer {1e6 * own:.0f} us in optimizer.step and {1e6 * kept:.0f} us in DDP's hook, "
          f"{100 * fraction:.2f} % together")
optimizer.close()
dist.destroy_process_group()
if arguments.check and fraction >= 0.01:
    raise SystemExit("plugin_overhead: found 1 % or more, expected less")
