"""A language model under FSDP2, two processes to a replica, with lowband between replicas.

    torchrun --nproc-per-node 4 plugin/example/fsdp2.py
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lowband
import lowband.torch
import transformer

torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replica", "shard"))
model = transformer.Transformer()
for layer in model.layers:
    fully_shard(layer, mesh=mesh["shard"])
fully_shard(model, mesh=mesh["shard"])
optimizer = lowband.torch.Optimizer(transformer.groups(model), lr=0.005, profile=lowband.uniform(8))

for step, tokens in zip(range(101), transformer.batches(dist.get_rank())):
    loss = model(tokens)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if dist.get_rank() == 0 and step % 20 == 0:
        factors, dense = optimizer.planned_bytes()
        print(f"step {step:3}  loss {loss.item():.3f}, at best {transformer.BEST_LOSS:.3f}  between replicas "
              f"{factors} bytes of factors, {dense} dense, instead of {sum(4 * p.numel() for p in model.parameters())}")
dist.destroy_process_group()
