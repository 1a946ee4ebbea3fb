"""Which piece of a parameter this process holds: plain tensors, and DTensors as FSDP2 and tensor parallelism make them.

The processes of a DTensor's mesh hold one replica of the parameters together, each a rectangle of every matrix, and nobody
else in their replica has a gradient of it. They are lowband's tensor axis, which cuts rows or columns into consecutive
pieces; rectangles that are others move there (`_moves`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

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
class Rectangle:
    """Rows and columns of a matrix."""
    row_begin: int
    row_end: int
    col_begin: int
    col_end: int

    def intersection(self, other: Rectangle) -> Rectangle:
        row_begin, col_begin = max(self.row_begin, other.row_begin), max(self.col_begin, other.col_begin)
        return Rectangle(row_begin, max(row_begin, min(self.row_end, other.row_end)), col_begin,
                         max(col_begin, min(self.col_end, other.col_end)))

    @property
    def shape(self) -> tuple[int, int]:
        return self.row_end - self.row_begin, self.col_end - self.col_begin

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    def of(self, tensor: torch.Tensor, held: Rectangle) -> torch.Tensor:
        """These rows and columns of what `held` shows, a contiguous tensor of any dimensions; in the same memory."""
        rows = slice(self.row_begin - held.row_begin, self.row_end - held.row_begin)
        return tensor.view(held.shape)[rows, self.col_begin - held.col_begin:self.col_end - held.col_begin]


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes that hold one replica of the parameters together."""
    grid: tuple[tuple[int, ...], ...] | None  # ranks of torch by fsdp and tensor axis; None: each holds whole parameters

    @property
    def size(self) -> int:
        return len(self.ranks) if self.grid else 1

    @property
    def ranks(self) -> tuple[int, ...]:
        """In the order of lowband's tensor axis: what FSDP2 cuts out of the same tensor-parallel piece is side by side."""
        return tuple(rank for column in zip(*(self.grid or ())) for rank in column)

    def placements(self, parameter: DTensor) -> tuple[Any, Any]:
        """On the fsdp axis, and on the tensor axis."""
        if parameter.device_mesh.ndim == 2:
            return parameter.placements
        line, placement = tuple(parameter.device_mesh.mesh.tolist()), parameter.placements[0]
        return (placement, Replicate()) if line in zip(*self.grid) else (Replicate(), placement)


def team_of(parameters: Sequence[torch.Tensor], names: Sequence[str]) -> Team:
    """Raises: lowband.InvalidArgument, unless all parameters are plain, or all are DTensors on one mesh: of one dimension, or
    of FSDP2's and tensor parallelism's, where some parameters may be on one of the two alone."""
    meshes = [parameter.device_mesh if isinstance(parameter, DTensor) else None for parameter in parameters]
    for parameter, name, mesh in zip(parameters, names, meshes):
        if (mesh is None) != (meshes[0] is None):
            raise lowband.InvalidArgument(
                f"type of {name}: found {type(parameter.data).__name__}, but {names[0]} is "
                f"{type(parameters[0].data).__name__}, expected DTensors or plain tensors only; leave out of the "
                "optimizer what fully_shard ignores")
        if mesh is not None and (mesh.ndim > 2 or mesh.ndim == 2 and type(parameter.placements[0]) is Replicate):
            raise lowband.InvalidArgument(
                f"mesh of {name}: found {mesh.ndim} dimensions with placements {parameter.placements}, expected one that FSDP2 "
                "cuts, and one of tensor parallelism: with fully_shard(model, mesh=mesh['shard']) on that dimension of a "
                "mesh, replicas exchange nothing and lowband does")
    if meshes[0] is None:
        return Team(None)
    whole = max(range(len(meshes)), key=lambda i: meshes[i].ndim)
    ranks = meshes[whole].mesh
    grid = ranks.unsqueeze(1) if ranks.ndim == 1 else ranks
    lines = [*grid.tolist(), *grid.T.tolist()] if ranks.ndim == 2 else []
    for name, mesh in zip(names, meshes):
        if mesh != meshes[whole] and mesh.mesh.tolist() not in lines:
            raise lowband.InvalidArgument(f"mesh of {name}: found {mesh}, expected {meshes[whole]} as for {names[whole]}"
                                          f"{', or one of its dimensions' if lines else ''}")
    return Team(tuple(tuple(row) for row in grid.tolist()))


def held_by_each(parameter: torch.Tensor, name: str, team: Team) -> list[Rectangle]:
    """By process of the team. Raises: lowband.InvalidArgument naming what places the parameter otherwise."""
    rows, cols = matrix_shape(parameter.shape)
    if team.grid is None:
        return [Rectangle(0, rows, 0, cols)]
    fsdp, tensor = team.placements(parameter)
    sizes = {"fsdp": len(team.grid), "tensor": len(team.grid[0])}
    cuts = []  # the axis and the dimension that it cuts, the first to cut first
    for axis, placement in (("fsdp", fsdp), ("tensor", tensor)):
        if type(placement) is Replicate:
            continue
        strided = axis == "fsdp" and isinstance(placement, _StridedShard)
        if not (strided or type(placement) is Shard) or placement.dim not in (0, 1):
            raise lowband.InvalidArgument(
                f"placement of {name}: found {placement} of shape {tuple(parameter.shape)}, expected Shard(0), Shard(1) or "
                "Replicate()")
        cuts.append((axis, placement.dim))
        if strided:
            cut_before = getattr(tensor, "dim", None) == placement.dim
            if placement.split_factor != (sizes["tensor"] if cut_before else 1):
                raise lowband.InvalidArgument(
                    f"placement of {name}: found {placement} beside {tensor}, expected what FSDP2 makes of it on a mesh of "
                    f"{sizes['fsdp']} x {sizes['tensor']}")
    if isinstance(fsdp, _StridedShard):
        cuts.reverse()  # which says that FSDP2 cut what tensor parallelism had cut
    held = []
    for i in range(team.size):
        position = {"fsdp": i % sizes["fsdp"], "tensor": i // sizes["fsdp"]}
        ranges = [[0, rows], [0, parameter.shape[1] if parameter.ndim >= 2 else cols]]
        for axis, dimension in cuts:
            found = ranges[dimension if parameter.ndim >= 2 else 1]
            width = -(-(found[1] - found[0]) // sizes[axis])  # as torch.chunk
            begin = min(found[1], found[0] + position[axis] * width)
            found[:] = begin, min(found[1], begin + width)
        inner = math.prod(parameter.shape[2:])  # of the dimensions that are taken together
        held.append(Rectangle(*ranges[0], *(inner * col for col in ranges[1])))
    own = held[team.ranks.index(dist.get_rank())]
    if own.elements != local(parameter).numel():
        raise lowband.InvalidArgument(f"piece of {name}: found {tuple(local(parameter).shape)} with placements "
                                      f"{parameter.placements}, expected {own}")
    return held


def cut_of(parameter: torch.Tensor, held: Sequence[Rectangle], must_be_cut: bool) -> tuple[str, list[Rectangle]]:
    """Which of lowband's cuts `held` is, or else the one where it moves with least; and the pieces of that."""
    (rows, cols), pieces = matrix_shape(parameter.shape), len(held)
    cuts = {"none": [Rectangle(0, rows, 0, cols)] * pieces}
    if pieces > 1 and parameter.ndim >= 2:
        cuts["rows"] = [Rectangle(begin, end, 0, cols) for begin, end in _split(rows, pieces)]
    if pieces > 1:
        cuts["cols"] = [Rectangle(0, rows, begin, end) for begin, end in _split(cols, pieces)]
    if must_be_cut and pieces > 1:
        del cuts["none"]
    for cut, of_each in cuts.items():
        if of_each == list(held):
            return cut, of_each
    stays = {cut: sum(one.intersection(other).elements for one, other in zip(held, of_each))
             for cut, of_each in cuts.items() if cut != "none"}
    cut = max(stays, key=lambda cut: stays[cut])
    return cut, cuts[cut]


def _split(extent: int, pieces: int) -> list[tuple[int, int]]:
    """Consecutive, the larger ones first."""
    begins = [i * (extent // pieces) + min(i, extent % pieces) for i in range(pieces + 1)]
    return list(zip(begins, begins[1:]))


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
    if team.grid is None:
        return list(range(len(own)))
    gathered: list[Any] = [None] * len(own)
    dist.all_gather_object(gathered, team.ranks, group=group)
    ordered = [rank for ranks in sorted(set(gathered)) for rank in ranks]
    if sorted(ordered) != sorted(own):
        raise lowband.InvalidArgument(
            f"process_group: found processes {sorted(own)}, whose parameters are cut over {sorted(set(gathered))}; "
            "expected a group of whole replicas, each process in one of them")
    return [own.index(rank) for rank in ordered]
