"""A language model under DDP, with lowband in it.

    torchrun --nproc-per-node 2 plugin/example/ddp.py
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lowband
import lowband.torch
import transformer

torch.set_num_threads(1)
dist.init_process_group("gloo")
model = DistributedDataParallel(transformer.Transformer())
optimizer = lowband.torch.Optimizer(transformer.groups(model), lr=0.005, profile=lowband.uniform(8))
lowband.torch.attach_ddp(model, optimizer)

for step, tokens in zip(range(101), transformer.batches(dist.get_rank())):
    loss = model(tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0 and step % 20 == 0:
        factors, dense = (optimizer.step_bytes(purpose, "replica").payload_bytes for purpose in ("factor", "dense"))
        print(f"step {step:3}  loss {loss.item():.3f}, at best {transformer.BEST_LOSS:.3f}  between replicas "
              f"{factors} bytes of factors, {dense} dense, instead of {sum(4 * p.numel() for p in model.parameters())}")
dist.destroy_process_group()
