"""The state of `lowband.torch.Optimizer` in `torch.distributed.checkpoint`: one checkpoint for any mesh.

    state = {"model": get_model_state_dict(model), "optimizer": lowband.checkpoint.State(optimizer)}
    torch.distributed.checkpoint.save(state, checkpoint_id=folder)
    torch.distributed.checkpoint.load(state, checkpoint_id=folder)

Momentum M and error e are each replica's own, so all of them are saved: as one tensor (replicas, rows, cols). The rest is
equal on all replicas and saved once. How many processes shared a replica does not matter: pieces lie in whole tensors.
"""

from __future__ import annotations

from typing import Any, Sequence

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import lowband
from lowband.optimizer import StatePiece
from lowband.torch import Optimizer, expect_names, tensor_over


class State:
    """A Stateful of torch.distributed.checkpoint: `save` reads lowband's memory, `load` overwrites it.

    `saved_replicas`, for `load` alone, says how many replicas wrote the checkpoint, when that is not how many there are now.
    Each then begins with the mean of what was saved, which keeps all that was not sent yet.

    Collective, as `save` and `load`: all processes of the optimizer. Parameters are told apart by their names: give
    `model.named_parameters()` to the optimizer.
    """

    def __init__(self, optimizer: Optimizer, saved_replicas: int | None = None) -> None:
        if not isinstance(optimizer, Optimizer):
            raise lowband.InvalidArgument(f"optimizer: found {type(optimizer).__name__}, expected lowband.torch.Optimizer")
        self._optimizer = optimizer
        mesh = optimizer.exchange.options.mesh
        together = mesh.tensor * mesh.shard
        self._replica, self._replicas = optimizer.world.process // together, optimizer.world.processes // together
        self._saved_replicas = self._replicas if saved_replicas is None else saved_replicas
        if self._saved_replicas < 1:
            raise lowband.InvalidArgument(f"saved_replicas: found {saved_replicas}, expected at least 1")
        self._means: list[tuple[torch.Tensor, torch.Tensor]] = []  # what is read of all replicas, and where it goes

    def state_dict(self) -> dict[str, Any]:
        if not dist.is_initialized():  # every process would take itself for the only one
            raise lowband.InvalidArgument("process group: found torch.distributed not initialised, expected "
                                          "init_process_group before a checkpoint")
        self._means = []
        state = {piece.name: self._whole(piece) for piece in self._optimizer.exchange.state()}
        rates = {f"lr{i}": float(group["lr"]) for i, group in enumerate(self._optimizer.param_groups)}
        return {"state": state, **self._facts(), "steps": self._optimizer._steps, **rates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises: lowband.InvalidArgument for a checkpoint of other numbers, or of parameters that are not here; other
        shapes, and parameters that it lacks, torch refuses before."""
        facts = self._facts()
        expect_names("checkpoint", state_dict["names"], facts.pop("names"))
        for field, expected in facts.items():
            if state_dict[field] != expected:
                raise lowband.InvalidArgument(f"checkpoint, {field}: found {state_dict[field]}, expected {expected}")
        for replicas, kept in self._means:
            kept.copy_(replicas.mean(dim=0))
        self._means = []
        self._optimizer._steps = state_dict["steps"]
        for i, group in enumerate(self._optimizer.param_groups):
            group["lr"] = state_dict[f"lr{i}"]

    def _facts(self) -> dict[str, Any]:
        options = self._optimizer.exchange.options
        facts = {"names": list(self._optimizer._names), "kind": options.kind, "scalar_kind": options.scalar_kind,
                 "dtype": options.dtype}
        blocks = self._optimizer._plain_blocks()
        return facts | {"blocks": blocks} if blocks else facts

    def _whole(self, piece: StatePiece) -> torch.Tensor:
        place = piece.place
        parts, memory = rectangles(piece), tensor_over(piece)
        if not place.differs_between_replicas:
            return _Pieces((place.rows, place.cols), parts, memory.dtype)
        size = (self._saved_replicas, place.rows, place.cols)
        if self._saved_replicas == self._replicas:
            parts = [((self._replica, *begin), part.unsqueeze(0)) for begin, part in parts]
            return _Pieces(size, parts, memory.dtype)
        of_all = []
        for begin, part in parts:
            replicas = part.new_empty((self._saved_replicas, *part.shape))
            self._means.append((replicas, part))
            of_all.append(((0, *begin), replicas))
        return _Pieces(size, of_all, memory.dtype)


def rectangles(piece: StatePiece) -> list[tuple[tuple[int, int], torch.Tensor]]:
    """The piece as rectangles of its whole: where each begins, and its memory. None are empty.

    Elements that begin and end within rows of the block are up to three: the end of a row, whole rows, the beginning of one.
    """
    place, memory = piece.place, tensor_over(piece)
    width = place.col_end - place.col_begin
    count = place.element_end - place.element_begin
    if count == 0:
        return []
    if count == width * (place.row_end - place.row_begin):
        return [((place.row_begin, place.col_begin), memory.view(-1, width) if memory.is_contiguous() else memory)]
    elements = memory.view(-1)
    parts, k = [], place.element_begin
    while k < place.element_end:
        row, col = divmod(k, width)
        rows = (place.element_end - k) // width if col == 0 else 0
        end = k + rows * width if rows else min(place.element_end, (row + 1) * width)
        part = elements[k - place.element_begin:end - place.element_begin]
        parts.append(((place.row_begin + row, place.col_begin + col), part.view(rows or 1, -1)))
        k = end
    return parts


class _Pieces(torch.Tensor):
    """A whole tensor, of which this process holds some rectangles: what torch.distributed.checkpoint asks of tensors."""

    _parts: Sequence[tuple[tuple[int, ...], torch.Tensor]]

    @staticmethod
    def __new__(cls, size: Sequence[int], parts: Sequence[tuple[tuple[int, ...], torch.Tensor]],
                dtype: torch.dtype) -> _Pieces:
        whole = torch.Tensor._make_wrapper_subclass(cls, torch.Size(size), dtype=dtype, device="cpu")
        whole._parts = parts
        return whole

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise lowband.InvalidArgument(f"state for checkpoints: found {function}, expected torch.distributed.checkpoint "
                                      "to read and write it")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"_Pieces(size={tuple(self.size())}, begin={[begin for begin, _ in self._parts]})"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(begin), part.size()) for begin, part in self._parts]

    def __create_write_items__(self, name: str, _whole: Any) -> list[WriteItem]:
        return [WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD,
                          tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(part), self.size()))
                for chunk, (_, part) in zip(self.__create_chunk_list__(), self._parts)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        for begin, part in self._parts:
            if index.offset is not None and tuple(index.offset) == begin:
                return part
        raise lowband.InvalidArgument(f"checkpoint, {index.fqn}: found offset {index.offset}, expected one of "
                                      f"{[begin for begin, _ in self._parts]}")
