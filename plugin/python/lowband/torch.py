"""lowband as a `torch.optim.Optimizer`, and in place of DDP's gradient synchronisation."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import hashlib
import math
import sys
from typing import Any, Callable, Iterable

import torch
import torch.distributed as dist

import lowband
from lowband import _pieces
from lowband._moves import Moves
from lowband.optimizer import ELEMENTWISE_KINDS, is_matrix

_DTYPES = {torch.float32: "float32", torch.float64: "float64"}
_SCALAR_TYPES = {"float32": (torch.float32, 4), "float64": (torch.float64, 8)}


def world_of(group: dist.ProcessGroup | None = None) -> lowband.World:
    """A world of lowband's own (UCX) between the processes of `group`, which carries a few addresses and no data.

    Collective: all processes of `group`, torch's default one when it is None.
    """
    group = _initialised(group)
    return _world_of(group, list(range(dist.get_world_size(group))))


def _initialised(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    if not dist.is_available() or not dist.is_initialized():
        raise lowband.InvalidArgument(
            "process group: found torch.distributed not initialised, expected init_process_group before")
    return group if group is not None else dist.group.WORLD


def _world_of(group: dist.ProcessGroup, order: list[int]) -> lowband.World:
    """Process i of it is rank order[i] of `group`."""

    def all_gather(own: bytes) -> list[bytes]:
        parts: list[Any] = [None] * len(order)
        dist.all_gather_object(parts, own, group=group)
        return [parts[rank] for rank in order]

    return lowband.World.from_all_gather(order.index(dist.get_rank(group)), len(order), all_gather)


class Optimizer(torch.optim.Optimizer):
    """Dion or PowerSGD for matrices, AdamW, SGD or Lion for the rest (or for everything), between the processes of a
    process group: it exchanges what its update needs, so that gradients are to stay as each process computed them.

    Gradients are the mean over a process's own data, as DDP's and plain `backward` give them; `attach_ddp` keeps DDP
    from averaging them. Averaged gradients give the same update, at the cost of DDP's traffic. `step` may leave
    anything in them.

    `params` is what torch's optimizers take: parameters, (name, parameter) pairs, or groups. A group has, besides
    "params":
        lr            equal in all groups of matrices, and in all groups of the rest; schedulers may change it
        role          "matrix", "query", ... "embedding", "head", "norm"; without it "matrix" where a parameter has two
                      dimensions or more, else "norm". Dimensions after the first are taken together.
        blocks        the matrices that each of its parameters is made of, as `lowband.Block`s: so many rows of each, by turns.
                      Each is then a matrix of its own. Not with kinds that update element by element. For heads of
                      head_dim rows: [Block("query", head_dim)] * heads; for torch.nn.MultiheadAttention.in_proj_weight:
                      [Block("query", width), Block("key", width), Block("value", width)]; for gate above up:
                      [Block("gate", ffn), Block("up", ffn)]. Lines are those of whole parameters, however they are cut.
        blocks_of     "rows", or "cols" where the blocks are columns, as heads are in an output projection
        weight_decay  decoupled; one value, or 0 for what is no matrix (which "norm" implies)
    Names are those of (name, parameter) pairs, else "param0", "param1", ...

    A step waits `deadline_seconds` for a process that is silent, as while it writes a checkpoint; one that is gone is
    noticed at once. The other arguments are those of `lowband.Options`; `clip_norm` clips by the norm of the mean gradient, which
    `torch.nn.utils.clip_grad_norm_` does not know here.

    DTensors, all on one mesh of one dimension, as `fully_shard` on the shard dimension of a mesh of two makes them: the
    processes of that mesh are one replica, each with its piece of every parameter, and gradients are the mean over the
    replica's data, as FSDP2 gives them. They form `mesh.tensor`, which need not be said. With `overlap=True` the exchange
    of a gradient starts when the backward pass, and FSDP2's reduction, are done with it: once for every step.

    DTensors of FSDP2 over tensor parallelism, on a mesh of both dimensions or, what only one of them cuts, on that one:
    likewise, and all processes of the two form `mesh.tensor`. What they do not cut into consecutive rows or columns, as
    matrices that one cuts by rows and the other by columns, moves within the replica for every step, gradient and weight
    there, weight back, by torch's own process group; it is exchanged in `step`, whatever `overlap` says.

    Shapes: dense tensors without gaps, all on the CPU, float32 or float64, or all on one CUDA device, float32. There the
    update is computed and its state kept, in the order of torch's current stream, and `overlap` is refused.
    Collective: all processes of `process_group` construct it, and call `step`, together.
    Raises: lowband.InvalidArgument naming the field, on all processes.
    """

    # GradScaler leaves it to `step` to skip, which all processes do together.
    _step_supports_amp_scaling = True

    def __init__(self, params: Iterable[Any], lr: float | torch.Tensor = 0.01, *, kind: str = "dion",
                 profile: lowband.Profile | None = None, weight_decay: float = 0.01,
                 mesh: lowband.Mesh = lowband.Mesh(), budget: int | None = None,
                 process_group: dist.ProcessGroup | None = None, deadline_seconds: float = 120.0,
                 **options: Any) -> None:
        self._open = True
        super().__init__(params, {"lr": lr, "role": None, "blocks": (), "blocks_of": "rows", "weight_decay": weight_decay})
        self._open = False
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self._position = {p: i for i, p in enumerate(self._parameters)}
        self._roles = [role for group in self.param_groups for role in _roles(group)]
        blocks = [b for group in self.param_groups for b in [_blocks(group)] * len(group["params"])]
        blocks_of = [group["blocks_of"] for group in self.param_groups for _ in group["params"]]
        self._names = _names(self.param_groups)
        team = self._team = _pieces.team_of(self._parameters, self._names)
        dtype = self._checked_dtype()
        self.device = self._parameters[0].device
        self._held = [_pieces.held_by_each(p, name, team) for p, name in zip(self._parameters, self._names)]
        of_matrices = kind not in ELEMENTWISE_KINDS
        cuts, updated = zip(*(_pieces.cut_of(parameter, held, of_matrices and is_matrix(role))
                              for parameter, held, role in zip(self._parameters, self._held, self._roles)))
        if not 0 < deadline_seconds < math.inf:
            raise lowband.InvalidArgument(f"deadline_seconds: found {deadline_seconds}, expected a positive number")
        if mesh.tensor not in (1, team.size):
            raise lowband.InvalidArgument(f"mesh.tensor: found {mesh.tensor}, expected {team.size}, the processes that "
                                          "hold one replica of the parameters together")
        mesh = dataclasses.replace(mesh, tensor=team.size)
        known = {field.name for field in dataclasses.fields(lowband.Options)} - {"dtype", "device"}
        for name in options:
            if name not in known:
                raise lowband.InvalidArgument(f"{name}: found it as an argument, expected one of {sorted(known)}")
        self._weight_decay = self._checked_weight_decay()
        self._zeros: dict[torch.Tensor, torch.Tensor] = {}
        self._announced: dict[int, torch.Tensor] = {}  # gradients, alive until the step has used them
        self._steps = 0
        self._weights_compared = self._is_closed = False
        self._last_report: lowband.StepReport | None = None
        self._report_is_due = False

        moved = [i for i, (held, pieces) in enumerate(zip(self._held, updated)) if held != pieces]
        # Weights and gradients that are updated, of parameters whose pieces lie otherwise.
        self._moved = {self._parameters[i]: self._updated_there(i, updated[i]) for i in moved}
        described = []
        for parameter, *description in zip(self._parameters, self._names, self._roles, cuts, blocks, blocks_of):
            name, role, *cuts_and_blocks = description
            rows, cols = _pieces.matrix_shape(parameter.shape)
            own = _pieces.local(parameter)
            weight, gradient = (_pieces.address(tensor) for tensor in self._moved.get(parameter, (own, own)))
            described.append(lowband.Parameter(name, role, rows, cols, weight, gradient, *cuts_and_blocks))
        chosen = lowband.Options(kind=kind, profile=profile, mesh=mesh, dtype=dtype, weight_decay=self._weight_decay,
                                 budget_bytes=budget, device=_index(self.device), **options)
        self._group = _initialised(process_group)
        self.world = _world_of(self._group, _pieces.order_of(self._group, team))
        try:
            self.world.set_deadline(deadline_seconds)
            with self._current_device():
                self.exchange = lowband.Optimizer(self.world, described, chosen)
        except lowband.Error:  # the same on all processes
            self.world.close()
            raise
        _open_optimizers[id(self)] = self
        if chosen.overlap and team.grid is not None:
            for parameter in self._parameters:
                parameter.register_post_accumulate_grad_hook(self._announce_own)
        self._moves = Moves(team, self._group, deadline_seconds,
                            *([layout[i] for i in moved] for layout in (self._held, updated))) if moved else None
        self._show_state()

    # ---- What torch calls ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if not self._open:
            raise lowband.InvalidArgument("add_param_group: found it after the optimizer was made, expected all groups "
                                          "at its construction: what processes exchange is agreed then")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters. Collective.

        Raises: lowband.PeerFailed, naming it, when a process is gone or silent; lowband.InvalidArgument, on all
        processes, for learning rates that differ between them or are no numbers, and before the first step when
        replicas have different weights. A gradient that does not suit its parameter is refused where it is; the others
        hear of it when that program ends, or at their deadline.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._weights_compared:
            self._expect_equal_weights()
        self._unscale()
        learning_rate, scalar_learning_rate = self._learning_rates()
        gradients = self._announced
        self._announced = {}
        for i, parameter in enumerate(self._parameters):
            if i not in gradients:
                gradients[i] = self._gradient(parameter)
                self._rebind(parameter, gradients[i])
        if self._moves is not None:
            held = [_pieces.local(parameter) for parameter in self._moved]
            self._moves.gather([*held, *(gradients[self._position[parameter]] for parameter in self._moved)],
                               [tensor for pair in zip(*self._moved.values()) for tensor in pair])
        with self._current_device():
            stream = torch.cuda.current_stream().cuda_stream if self.device.type == "cuda" else 0
            self.exchange.enqueue_step(self._steps, learning_rate, scalar_learning_rate, stream=stream)
        self._report_is_due = True
        if self._moves is not None:
            self._moves.scatter([weight for weight, _ in self._moved.values()], held)
        self._steps += 1
        return loss

    @property
    def last_report(self) -> lowband.StepReport | None:
        """Of the last step; on a device the first look at it waits for the step. None before the first."""
        if self._report_is_due:
            self._report_is_due = False
            self._last_report = self.exchange.last_report()
        return self._last_report

    def state_dict(self) -> dict[str, Any]:
        """State of this process: momentum and error differ between replicas, so every process saves its own. For
        torch.distributed.checkpoint there is `lowband.checkpoint.State`."""
        packed = super().state_dict()
        packed["lowband"] = {"process": self.world.process, "processes": self.world.processes, "steps": self._steps,
                             "options": self._identity(), "names": list(self._names), "blocks": self._plain_blocks()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises: lowband.InvalidArgument before anything is changed, when it is another process's or optimizer's."""
        self._expect_own(state_dict)
        shown = {p: dict(self.state[p]) for p in self._parameters}
        super().load_state_dict(state_dict)
        for parameter, tensors in shown.items():
            for letter, tensor in tensors.items():
                tensor.copy_(self.state[parameter][letter].view_as(tensor))
            self.state[parameter] = tensors
        self._steps = state_dict["lowband"]["steps"]

    def __deepcopy__(self, _memo: Any) -> Optimizer:
        raise TypeError("lowband.torch.Optimizer cannot be copied: use state_dict")

    def __reduce__(self) -> Any:
        raise TypeError("lowband.torch.Optimizer cannot be pickled: use state_dict")

    # ---- What it sends ----

    def planned_bytes(self) -> tuple[int, int]:
        """Payload of factors and of dense gradients that every step sends between replicas."""
        return self.exchange.planned_bytes()

    def step_bytes(self, purpose: str, axis: str = "") -> lowband.ByteCounts:
        return self.exchange.step_bytes(purpose, axis)

    def close(self) -> None:
        """Lets go of the other processes. Collective; at the end of the program it happens by itself."""
        with contextlib.suppress(lowband.Error):
            self._last_report = self.last_report
        for parameter in self._parameters:
            self.state[parameter] = {}  # they show memory that is about to go
        self._is_closed = True
        _open_optimizers.pop(id(self), None)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what reads the state
        with self._current_device():
            self.exchange.close()
        self.world.close()

    # ---- The rest is its own ----

    def announce(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        """`gradient` is that of this step, complete, and stays until `step` returns: its exchange may start."""
        if parameter in self._moved:  # all of them together, in the step
            return
        self._rebind(parameter, gradient)
        i = self._position[parameter]
        self.exchange.gradient_ready(i)
        self._announced[i] = gradient

    def _current_device(self) -> contextlib.AbstractContextManager[Any]:
        """lowband makes the device of its work the thread's; torch's is another perhaps, and stays."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _announce_own(self, parameter: torch.Tensor) -> None:
        if not self._is_closed:
            with torch.no_grad():
                self.announce(parameter, self._gradient(parameter))

    def _updated_there(self, i: int, updated: list[_pieces.Rectangle]) -> tuple[torch.Tensor, torch.Tensor]:
        own = updated[self._team.ranks.index(dist.get_rank())]
        weight, gradient = (torch.zeros(own.shape, dtype=self._parameters[i].dtype, device=self.device) for _ in range(2))
        return weight, gradient

    def _rebind(self, parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        if parameter in self._moved:
            return
        weight = _pieces.local(parameter)
        self.exchange.rebind(self._position[parameter], _pieces.address(weight), _pieces.address(gradient))

    def _gradient(self, parameter: torch.Tensor) -> torch.Tensor:
        """What this process holds of it."""
        gradient = _pieces.local_gradient(parameter, self._names[self._position[parameter]])
        if gradient is None:  # others may have one; the exchange is of all parameters
            gradient = self._zeros.get(parameter)
            gradient = torch.zeros_like(_pieces.local(parameter)) if gradient is None else gradient.zero_()
            self._zeros[parameter] = gradient
        return gradient

    def _unscale(self) -> None:
        scale = getattr(self, "grad_scale", None)  # GradScaler sets it for the time of a step
        if scale is None:
            return
        if self._announced:
            raise lowband.InvalidArgument("overlap: found it with a GradScaler, expected one of both: gradients are "
                                          "exchanged before they are unscaled")
        for parameter in self._parameters:
            if parameter.grad is not None:
                _pieces.local(parameter.grad).div_(_pieces.local(scale))

    def _expect_equal_weights(self) -> None:
        """Replicas stay equal only if they begin so, and neither FSDP2 nor plain processes see to that; nor do processes of one
        replica that hold the same."""
        own = [hashlib.blake2b(_pieces.local(parameter.detach()).cpu().numpy(), digest_size=8).digest()
               for parameter in self._parameters]
        gathered: list[Any] = [None] * self.world.processes
        dist.all_gather_object(gathered, (self.world.process, own), group=self._group)
        found = dict(gathered)
        for process in range(self.world.processes):
            for i, (name, held) in enumerate(zip(self._names, self._held)):
                first = held.index(held[process % len(held)])  # which holds the same piece
                if found[process][i] != found[first][i]:
                    raise lowband.InvalidArgument(f"weights of {name}: found others on process {process} than on process "
                                                  f"{first}, expected equal ones: use one seed, or load or broadcast them")
        self._weights_compared = True

    def _learning_rates(self) -> tuple[float, float]:
        rates: dict[bool, float] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                of_matrix = is_matrix(self._roles[self._position[parameter]])
                rate = float(group["lr"])
                if rates.setdefault(of_matrix, rate) != rate and not math.isnan(rate):  # which all refuse together
                    raise lowband.InvalidArgument(
                        f"lr: found {rates[of_matrix]} and {rate} in groups of "
                        f"{'matrices' if of_matrix else 'parameters that are no matrices'}, expected one for all")
        fallback = next(iter(rates.values()))
        return rates.get(True, fallback), rates.get(False, fallback)

    def _checked_dtype(self) -> str:
        for parameter, name in zip(self._parameters, self._names):
            if parameter.device.type not in ("cpu", "cuda") or parameter.device != self._parameters[0].device:
                raise lowband.InvalidArgument(f"device of {name}: found {parameter.device}, expected cpu or a CUDA device, the "
                                              "same for all")
            if parameter.dtype not in _DTYPES or parameter.dtype != self._parameters[0].dtype:
                raise lowband.InvalidArgument(f"dtype of {name}: found {parameter.dtype}, expected float32 or float64, "
                                              "the same for all; keep float32 weights under autocast")
            own = _pieces.local(parameter.data)
            if type(own) is not torch.Tensor or own.layout != torch.strided:
                raise lowband.InvalidArgument(f"type of {name}: found {type(parameter.data).__name__}, "
                                              f"{own.layout}, expected a plain dense tensor or a DTensor of such")
            if not own.is_contiguous():
                raise lowband.InvalidArgument(f"strides of {name}: found {own.stride()} for shape "
                                              f"{tuple(own.shape)}, expected no gaps, rows first")
        return _DTYPES[self._parameters[0].dtype]

    def _checked_weight_decay(self) -> float:
        """The one value; what has none although it is no norm becomes one, which is all that "norm" means here."""
        used = {float(group["weight_decay"]) for group in self.param_groups} - {0.0}
        if len(used) > 1:
            raise lowband.InvalidArgument(f"weight_decay: found {sorted(used)}, expected one value, or 0 for groups that "
                                          "have no matrices")
        for group in self.param_groups:
            for parameter in group["params"]:
                i = self._position[parameter]
                if not used or float(group["weight_decay"]) != 0.0:
                    continue
                if is_matrix(self._roles[i]):
                    raise lowband.InvalidArgument(f"weight_decay of {self._names[i]}: found 0, expected {used.pop()} as "
                                                  "for other parameters: matrices have one")
                self._roles[i] = "norm"
        return used.pop() if used else 0.0

    def _plain_blocks(self) -> dict[str, Any]:
        """By name, those of parameters that have any, as a checkpoint keeps them."""
        return {parameter.name: [parameter.blocks_of, *((block.role, block.lines) for block in parameter.blocks)]
                for parameter in self.exchange.parameters if parameter.blocks}

    def _identity(self) -> dict[str, Any]:
        options = dataclasses.asdict(self.exchange.options)
        return {name: options[name] for name in ("kind", "profile", "mesh", "dtype", "scalar_kind")}

    def _show_state(self) -> None:
        """`state` shows lowband's own memory, by parameter and letter of the paper."""
        of_name = dict(zip(self._names, self._parameters))
        for piece in self.exchange.state():
            name, letter = piece.name.rsplit(".", 1)
            self.state[of_name[name]][letter] = tensor_over(piece)

    def _expect_own(self, state_dict: dict[str, Any]) -> None:
        own = self.state_dict()

        def expect(field: str, found: Any, expected: Any) -> None:
            if found != expected:
                raise lowband.InvalidArgument(f"state_dict, {field}: found {found}, expected {expected}")

        if "lowband" not in state_dict:
            raise lowband.InvalidArgument("state_dict: found none of lowband's, expected what lowband.torch saved")
        for field in ("processes", "process"):
            expect(field, state_dict["lowband"][field], own["lowband"][field])
        expect_names("state_dict", state_dict["lowband"]["names"], self._names)
        expect("blocks", state_dict["lowband"].get("blocks", {}), own["lowband"]["blocks"])
        for field, value in own["lowband"]["options"].items():
            expect(field, state_dict["lowband"]["options"].get(field), value)
        for i, tensors in own["state"].items():
            found = state_dict["state"].get(i, {})
            expect(f"state of {self._names[i]}", sorted(found), sorted(tensors))
            for letter, tensor in tensors.items():
                expect(f"shape of {self._names[i]}.{letter}", tuple(found[letter].shape), tuple(tensor.shape))


_open_optimizers: dict[int, Optimizer] = {}  # in the order in which they were made, equal on all processes


@atexit.register
def _close_all() -> None:
    error = getattr(sys, "last_value", None)  # that ended this program; the others need not wait for it
    for optimizer in list(_open_optimizers.values()):
        if error is not None:
            optimizer.world.abort(f"{type(error).__name__}: {error}")
        optimizer.close()


def _roles(group: dict[str, Any]) -> list[str]:
    def default(parameter: torch.Tensor) -> str:
        return "matrix" if parameter.ndim >= 2 else "norm"

    for parameter in group["params"]:
        if group["role"] is not None and is_matrix(group["role"]) and parameter.ndim < 2:
            raise lowband.InvalidArgument(f"role: found {group['role']} for a parameter of shape "
                                          f"{tuple(parameter.shape)}, expected two dimensions or more")
    return [group["role"] or default(parameter) for parameter in group["params"]]


def _blocks(group: dict[str, Any]) -> tuple[lowband.Block, ...]:
    """Leaves plain tuples in the group, which every state_dict may have."""
    try:
        blocks = tuple(lowband.Block(*(dataclasses.astuple(b) if isinstance(b, lowband.Block) else b)) for b in group["blocks"])
        if not all(isinstance(block.lines, int) for block in blocks):
            raise TypeError
    except TypeError:
        raise lowband.InvalidArgument(f"blocks: found {group['blocks']!r}, expected a list of lowband.Block") from None
    group["blocks"] = tuple(dataclasses.astuple(block) for block in blocks)
    return blocks


def _names(groups: list[dict[str, Any]]) -> list[str]:
    names: list[str] = []
    for group in groups:
        given = group.get("param_names")
        names += given if given else [f"param{len(names) + i}" for i in range(len(group["params"]))]
    return names


def expect_names(where: str, found: list[str], expected: list[str]) -> None:
    """Raises: lowband.InvalidArgument naming the first parameter in which they differ."""
    for i in range(max(len(found), len(expected))):
        one, other = found[i:i + 1], expected[i:i + 1]
        if one != other:
            raise lowband.InvalidArgument(f"{where}, names: found {one[0] if one else 'nothing'} as parameter {i}, expected "
                                          f"{other[0] if other else 'nothing'}")


class _OnDevice:
    """The memory of a piece, as torch and others take it from each other (the CUDA array interface)."""

    def __init__(self, piece: lowband.StatePiece, element_bytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (piece.rows, piece.cols), "typestr": f"<f{element_bytes}",
                                         "data": (piece.data, False), "version": 3,
                                         "strides": (piece.row_stride * element_bytes, element_bytes)}


def _index(device: torch.device) -> int:
    """-1 for the CPU."""
    return device.index if device.type == "cuda" else -1


def tensor_over(piece: lowband.StatePiece) -> torch.Tensor:
    """A tensor over the memory of `piece`."""
    dtype, element_bytes = _SCALAR_TYPES[piece.dtype]
    device = torch.device("cuda", piece.device) if piece.device >= 0 else torch.device("cpu")
    if piece.data is None or piece.rows * piece.cols == 0:
        return torch.empty(piece.rows, piece.cols, dtype=dtype, device=device)
    if device.type == "cuda":
        return torch.as_tensor(_OnDevice(piece, element_bytes), device=device)
    elements = (piece.rows - 1) * piece.row_stride + piece.cols
    memory = (ctypes.c_char * (elements * element_bytes)).from_address(piece.data)
    return torch.frombuffer(memory, dtype=dtype).as_strided((piece.rows, piece.cols), (piece.row_stride, 1))


def attach_ddp(model: torch.nn.parallel.DistributedDataParallel, optimizer: Optimizer) -> None:
    """From now on DDP averages no gradients of `model`: `optimizer` exchanges what its update needs.

    With `overlap=True` the exchange of a bucket of DDP starts as soon as the backward pass has filled it; then
    gradients may not be changed between `backward` and `step`.

    Raises: lowband.InvalidArgument, when a parameter that DDP synchronises is not one of `optimizer`, which would
    leave it different on every process.
    """
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise lowband.InvalidArgument(f"model: found {type(model).__name__}, expected DistributedDataParallel")
    for name, parameter in model.module.named_parameters():
        if parameter.requires_grad and parameter not in optimizer._position:
            raise lowband.InvalidArgument(f"model: found {name} in no group of the optimizer, expected all parameters: "
                                          "nobody would synchronise it")
    overlaps = optimizer.exchange.options.overlap

    def keep_own(_state, bucket):  # DDP compares annotations with classes, and here they are strings
        if overlaps:
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients()):
                optimizer.announce(parameter, gradient)
        device = bucket.buffer().device
        kept: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[device] if device.type == "cuda" else None)
        kept.set_result(bucket.buffer())
        return kept

    model.register_comm_hook(None, keep_own)
