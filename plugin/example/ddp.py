"""A DDP trainer with lowband in it.

    torchrun --nproc-per-node 2 plugin/example/ddp.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lowband
import lowband.torch

dist.init_process_group("gloo")
torch.manual_seed(0)
layers = [torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)]
model = DistributedDataParallel(torch.nn.Sequential(*layers))
optimizer = lowband.torch.Optimizer(model.parameters(), lr=0.02, profile=lowband.uniform(8))
lowband.torch.attach_ddp(model, optimizer)

data = torch.Generator().manual_seed(dist.get_rank())
target = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 8
for step in range(100):
    x = torch.randn(32, 64, generator=data)
    loss = torch.nn.functional.mse_loss(model(x), x @ target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0 and step % 25 == 0:
        factors, dense = (optimizer.step_bytes(purpose, "replica").payload_bytes for purpose in ("factor", "dense"))
        print(f"step {step:3}  loss {loss.item():.4f}  {factors} bytes of factors, {dense} of biases, "
              f"instead of {sum(4 * p.numel() for p in model.parameters())}")
dist.destroy_process_group()
