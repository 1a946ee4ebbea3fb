"""What `lowband.megatron.Optimizer` keeps, as Megatron's sharded tensors: one checkpoint for any mesh.

Momentum and error are each replica's own: one tensor (replicas, rows, cols). The rest is equal on all replicas and saved
once. A block has the rows of the block, so that it does not matter how tensor parallelism lays gate beside up. What is
updated element by element has no blocks, and is saved as Megatron saves the parameter.
"""

from __future__ import annotations

from typing import Any, Iterator

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map, make_sharded_optimizer_tensor

import lowband
import lowband.torch
from lowband.checkpoint import rectangles
from lowband.optimizer import StatePiece
from lowband.torch import expect_names, tensor_over

_PREFIX = "optimizer.lowband"


def of_parameters(model_sharded_state_dict: Any, parameters: dict[str, torch.nn.Parameter]) -> dict[str, Any]:
    """What Megatron makes of these parameters of the model. Raises: lowband.InvalidArgument, when some are missing."""
    found = get_param_id_to_sharded_param_map(model_sharded_state_dict, iter(parameters.values()))
    missing = [name for i, name in enumerate(parameters) if i not in found]
    if missing:
        raise lowband.InvalidArgument(f"model_sharded_state_dict: found {len(found)} of {len(parameters)} parameters, expected "
                                      f"all, {missing[0]} too: make it by the model's sharded_state_dict")
    return {name: found[i] for i, name in enumerate(parameters)}


def sharded(inner: lowband.torch.Optimizer, parameters: dict[str, torch.nn.Parameter], of_model: dict[str, Any],
            replicas: int) -> dict[str, Any]:
    """`replicas` is how many save, or have saved, the checkpoint; `parameters` are Megatron's, by name."""
    pieces: dict[str, dict[str, Any]] = {}
    for piece in inner.exchange.state():
        if _is_elementwise(piece, inner, parameters):
            name, letter = piece.name.rsplit(".", 1)
            own = tensor_over(piece).view(parameters[name].shape)
            pieces[piece.name] = {"0": make_sharded_optimizer_tensor(of_model[name], own, f"{_PREFIX}.{letter}")}
        else:
            pieces[piece.name] = dict(_sharded_tensors(piece, inner, replicas))
    return {**_facts(inner), "steps": inner._steps, "param_groups": inner.state_dict()["param_groups"], "pieces": pieces}


def load(inner: lowband.torch.Optimizer, parameters: dict[str, torch.nn.Parameter], loaded: dict[str, Any]) -> None:
    """Each replica begins with its own, or with the mean where their number is another. Raises: lowband.InvalidArgument for what
    another optimizer saved, before anything is changed."""
    facts = _facts(inner)
    expect_names("checkpoint", loaded["names"], facts.pop("names"))
    for field, expected in facts.items():
        if loaded[field] != expected:
            raise lowband.InvalidArgument(f"checkpoint, {field}: found {loaded[field]}, expected {expected}")
    for piece in inner.exchange.state():
        saved = loaded["pieces"].get(piece.name, {})
        if _is_elementwise(piece, inner, parameters):
            memory = tensor_over(piece)
            memory.copy_(saved["0"].view(memory.shape))
            continue
        for i, (_, part) in enumerate(rectangles(piece)):
            # The mean of one, of this replica, is that to the last bit.
            part.copy_(saved[str(i)].mean(dim=0) if piece.place.differs_between_replicas else saved[str(i)])
    inner._steps = loaded["steps"]
    for group, saved in zip(inner.param_groups, loaded["param_groups"], strict=True):
        group.update({key: value for key, value in saved.items() if key not in ("params", "blocks")})


def _facts(inner: lowband.torch.Optimizer) -> dict[str, Any]:
    options = inner.exchange.options
    return {"names": list(inner._names), "kind": options.kind, "scalar_kind": options.scalar_kind, "dtype": options.dtype}


def _is_elementwise(piece: StatePiece, inner: lowband.torch.Optimizer, parameters: dict[str, torch.nn.Parameter]) -> bool:
    """Whether it is one of AdamW's, SGD's or Lion's moments, of all that this process has of the parameter."""
    name, letter = piece.name.rsplit(".", 1)
    if letter not in ("m", "v"):
        return False
    shard = inner.exchange.options.mesh.shard
    if shard > 1 and getattr(parameters[name], "partition_stride", 1) > 1:
        raise lowband.InvalidArgument(f"mesh.shard of sharded_state_dict: found {shard} with {name}, whose rows are laid out by "
                                      "tensor parallelism and whose moments shards cut anywhere, expected 1")
    return shard == 1


def _sharded_tensors(piece: StatePiece, inner: lowband.torch.Optimizer, replicas: int) -> Iterator[tuple[str, ShardedTensor]]:
    """By the number of the rectangle."""
    mesh, place, process = inner.exchange.options.mesh, piece.place, inner.world.process
    replica, within = divmod(process, mesh.tensor * mesh.shard)
    now = inner.world.processes // (mesh.tensor * mesh.shard)
    for i, ((row, col), part) in enumerate(rectangles(piece)):
        shape, begin = (place.rows, place.cols), (row, col)
        copy = (replica, within if tuple(part.shape) == shape else 0)  # 0, 0 saves it
        if place.differs_between_replicas:
            shape, copy = (replicas, *shape), (0, copy[1])
            begin = (replica if replicas == now else 0, *begin)
            part = part.unsqueeze(0) if replicas == now else part.new_empty((replicas, *part.shape))
        yield str(i), ShardedTensor(f"{_PREFIX}.{piece.name}", part, part.dtype, tuple(part.shape), shape, begin,
                                    axis_fragmentations=None, replica_id=copy)
