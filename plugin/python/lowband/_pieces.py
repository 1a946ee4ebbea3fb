"""Which piece of a parameter this process holds: plain tensors, and DTensors as FSDP2 and tensor parallelism make them.

A DTensor that is cut along one dimension over a mesh of one dimension is what lowband's tensor axis cuts: every process
holds one piece of weight and gradient, and nobody else in its replica has a gradient of that piece.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

import lowband

_nothing = torch.zeros(1, dtype=torch.float64)  # pieces may be empty, but have an address


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of it, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def address(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() or _nothing.data_ptr()


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Dimensions after the first are taken together; a vector is one row."""
    rows = shape[0] if len(shape) >= 2 else 1
    elements = 1
    for extent in shape:
        elements *= extent
    return rows, elements // rows if rows else 0


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes that hold one replica of the parameters together, in the order of their pieces."""
    size: int
    ranks: tuple[int, ...] | None  # of torch; None where every process holds whole parameters


def team_of(parameters: Sequence[torch.Tensor], names: Sequence[str]) -> Team:
    """Raises: lowband.InvalidArgument, unless all parameters are plain, or all are DTensors on one mesh of one dimension."""
    meshes = [parameter.device_mesh if isinstance(parameter, DTensor) else None for parameter in parameters]
    for parameter, name, mesh in zip(parameters, names, meshes):
        if (mesh is None) != (meshes[0] is None):
            raise lowband.InvalidArgument(
                f"type of {name}: found {type(parameter.data).__name__}, but {names[0]} is "
                f"{type(parameters[0].data).__name__}, expected DTensors or plain tensors only; leave out of the "
                "optimizer what fully_shard ignores")
        if mesh is not None and mesh.ndim != 1:
            advice = ("one kind of pieces within a replica, of FSDP2 or of tensor parallelism"
                      if not any(type(placement) is Replicate for placement in parameter.placements) else
                      "with fully_shard(model, mesh=mesh['shard']) on that dimension of a mesh of two, replicas exchange "
                      "nothing and lowband does")
            raise lowband.InvalidArgument(f"mesh of {name}: found {mesh.ndim} dimensions with placements "
                                          f"{parameter.placements}, expected one: {advice}")
        if mesh != meshes[0]:
            raise lowband.InvalidArgument(f"mesh of {name}: found {mesh}, expected {meshes[0]} as for {names[0]}")
    if meshes[0] is None:
        return Team(1, None)
    return Team(meshes[0].size(), tuple(meshes[0].mesh.tolist()))


def cut_of(parameter: torch.Tensor, name: str) -> str:
    """Raises: lowband.InvalidArgument for pieces that lowband would cut elsewhere, on all processes."""
    if not isinstance(parameter, DTensor):
        return "none"
    placement, pieces = parameter.placements[0], parameter.device_mesh.size()
    if type(placement) is Replicate:
        return "none"
    dimension = placement.dim if type(placement) is Shard else -1
    if dimension not in (0, 1):
        raise lowband.InvalidArgument(f"placement of {name}: found {placement} of shape {tuple(parameter.shape)}, expected "
                                      "Shard(0), Shard(1) or Replicate()")
    cut = "rows" if parameter.ndim >= 2 and dimension == 0 else "cols"
    extent = matrix_shape(parameter.shape)[0 if cut == "rows" else 1]
    inner = extent // parameter.shape[dimension]  # of the dimensions that are taken together
    width = -(-parameter.shape[dimension] // pieces)  # Shard cuts as torch.chunk
    found = [inner * max(0, min(width, parameter.shape[dimension] - i * width)) for i in range(pieces)]
    expected = [extent // pieces + (i < extent % pieces) for i in range(pieces)]
    if found != expected:
        raise lowband.InvalidArgument(
            f"pieces of {name}: found {found} of its {extent} {cut}, expected {expected}; dimension {dimension}, of "
            f"{parameter.shape[dimension]}, always suits when it is a multiple of {pieces}")
    return cut


def local_gradient(parameter: torch.Tensor, name: str) -> torch.Tensor | None:
    """Raises: lowband.InvalidArgument for a gradient that does not lie as its parameter does."""
    gradient = parameter.grad
    if gradient is None:
        return None
    found = gradient.placements if isinstance(gradient, DTensor) else None
    expected = parameter.placements if isinstance(parameter, DTensor) else None
    if found != expected:
        raise lowband.InvalidArgument(f"gradient of {name}: found placements {found}, expected {expected} as its parameter")
    own = local(gradient)
    if own.layout != torch.strided or own.dtype != parameter.dtype:
        raise lowband.InvalidArgument(f"gradient of {name}: found {own.layout}, {own.dtype}, expected a dense "
                                      f"{parameter.dtype}")
    return own.contiguous()


def order_of(group: dist.ProcessGroup, team: Team) -> list[int]:
    """Ranks of `group` by their number in lowband's world: teams side by side, so that pieces are its tensor axis."""
    own = dist.get_process_group_ranks(group)
    if team.ranks is None:
        return list(range(len(own)))
    gathered: list[Any] = [None] * len(own)
    dist.all_gather_object(gathered, team.ranks, group=group)
    ordered = [rank for ranks in sorted(set(gathered)) for rank in ranks]
    if sorted(ordered) != sorted(own):
        raise lowband.InvalidArgument(
            f"process_group: found processes {sorted(own)}, whose parameters are cut over {sorted(set(gathered))}; "
            "expected a group of whole replicas, each process in one of them")
    return [own.index(rank) for rank in ordered]
