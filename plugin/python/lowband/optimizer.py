"""Parameters by address, and the optimizer that updates them. Knows nothing of torch."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Sequence

from . import _abi
from .world import World

ROLES = ("query", "key", "value", "output", "gate", "up", "down", "matrix", "embedding", "head", "norm")
CUTS = ("none", "rows", "cols")
KINDS = ("dion", "power_sgd", "adamw", "sgd", "lion", "muon", "normuon", "muonbp", "dion2", "nordion2", "specgd", "spectra",
         "acp_sgd", "galore")
ELEMENTWISE_KINDS = ("adamw", "sgd", "lion")
WITH_FACTOR_RANKS = ("dion", "power_sgd", "acp_sgd", "galore")
SIGNS = ("newton_schulz_5", "polar_express_5", "polar_express_8")
UPDATE_SCALES = ("rms_to_rms", "adam_rms", "shape", "none")
EXCHANGES = ("factors", "dense", "fewer")
PROFILES = ("uniform", "structural", "inverted", "fraction", "explicit")
PURPOSES = ("factor", "dense", "gradient", "weight", "activation", "control", "periodic")
DTYPES = ("float32", "float64")


def _number(value: str, names: Sequence[str], field: str) -> int:
    if value not in names:
        raise _abi.InvalidArgument(f"{field}: found {value!r}, expected one of {', '.join(names)}")
    return names.index(value)


def is_matrix(role: str) -> bool:
    """Whether parameters of this role travel as low-rank factors."""
    return _number(role, ROLES, "role") <= ROLES.index("matrix")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """process = tensor + T * (shard + F * replica). `replica=0`: as many as there are processes for."""
    replica: int = 0
    shard: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Profile:
    """Which factor rank a matrix gets. Use `uniform`, `structural`, `inverted`, `fraction` or `explicit`."""
    kind: str
    uniform_rank: int = 0
    width: int = 0
    head_dim: int = 0
    scale: float = 1.0
    numerator: int = 1
    denominator: int = 1
    ranks: dict[str, int] = dataclasses.field(default_factory=dict)


def uniform(factor_rank: int) -> Profile:
    """The same factor rank for every matrix."""
    return Profile("uniform", uniform_rank=factor_rank)


def structural(width: int, head_dim: int, scale: float = 1.0) -> Profile:
    """Feed-forward matrices `width`; query, key and output 4 `head_dim`; value `head_dim`; times `scale`."""
    return Profile("structural", width=width, head_dim=head_dim, scale=scale)


def inverted(width: int, head_dim: int, scale: float = 1.0) -> Profile:
    """Feed-forward matrices `width`; query, key and output `head_dim`; value `width`; times `scale`."""
    return Profile("inverted", width=width, head_dim=head_dim, scale=scale)


def fraction(numerator: int, denominator: int) -> Profile:
    """ceil(numerator * min(rows, cols) / denominator), exactly."""
    return Profile("fraction", numerator=numerator, denominator=denominator)


def explicit(ranks: dict[str, int]) -> Profile:
    """The factor rank of every matrix by its name (`Parameter.matrices`)."""
    return Profile("explicit", ranks=dict(ranks))


@dataclasses.dataclass(frozen=True)
class Block:
    """A matrix that shares a parameter with others: its next `lines` rows, or columns, belong to this one, those after them
    to the next, and so on by turns until all are taken. `role` is one of a matrix."""
    role: str
    lines: int


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter as this process holds it. All but the two addresses are equal on all processes.

    `blocks` are the matrices that it is made of, each with an update of its own; none: it is one. Fused query, key and value
    of Megatron-core: `(Block("query", heads_of_a_group * head_dim), Block("key", head_dim), Block("value", head_dim))`.
    """
    name: str
    role: str
    rows: int  # of the whole matrix; 1 for a vector
    cols: int
    weight: int    # address of the tensor axis's piece, row-major without gaps
    gradient: int
    cut: str = "none"
    blocks: tuple[Block, ...] = ()
    blocks_of: str = "rows"

    @property
    def matrices(self) -> list[str]:
        """The names under which matrices have factor ranks: its own, or "name[0]", "name[1]", ... of its blocks."""
        return [f"{self.name}[{i}]" for i in range(len(self.blocks))] or [self.name]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the optimizer does; see lowband.h for each field."""
    kind: str = "dion"
    profile: Profile | None = None
    mesh: Mesh = Mesh()
    dtype: str = "float32"
    mu: float = 0.95
    power_sgd_momentum: float = 0.9
    weight_decay: float = 0.01
    scalar_kind: str = "adamw"
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    adamw_epsilon: float = 1e-8
    sgd_momentum: float = 0.9
    sgd_nesterov: bool = False
    lion_betas: tuple[float, float] = (0.9, 0.99)
    clip_norm: float = 0.0
    clip_by_true_norm: bool = False
    aggregated_residual: bool = False
    bf16_factors: bool = False
    overlap: bool = False
    bucket_elements: int = 8 << 20
    seed: int = 0
    exchange: str = "factors"
    budget_bytes: int | None = None
    sign: str = "polar_express_5"
    update_scale: str = "rms_to_rms"
    nesterov: bool = False
    normuon_beta2: float = 0.95
    muonbp_period: int = 1
    muonbp_block_rate: float = 1.0
    dion2_fraction: tuple[int, int] = (1, 4)
    dion2_random: bool = False
    spectra_fraction: float = 0.015
    spectra_iterations: int = 1
    galore_scale: float = 0.25
    galore_interval: int = 200
    device: int = -1  # the CUDA device of all weights and gradients of this process; -1: the host

    def _as_struct(self) -> _abi.Options:
        struct = _abi.defaults(_abi.Options, "options")
        struct.dtype = _number(self.dtype, DTYPES, "dtype")
        struct.mesh_replica, struct.mesh_shard, struct.mesh_tensor = self.mesh.replica, self.mesh.shard, self.mesh.tensor
        struct.kind = _number(self.kind, KINDS, "kind")
        struct.scalar_kind = _number(self.scalar_kind, KINDS, "scalar_kind")
        struct.exchange = _number(self.exchange, EXCHANGES, "exchange")
        struct.sign = _number(self.sign, SIGNS, "sign")
        struct.update_scale = _number(self.update_scale, UPDATE_SCALES, "update_scale")
        struct.dion2_numerator, struct.dion2_denominator = self.dion2_fraction
        setattr(struct, "lambda", self.power_sgd_momentum)
        struct.adamw_beta1, struct.adamw_beta2 = self.adamw_betas
        struct.lion_beta1, struct.lion_beta2 = self.lion_betas
        for field in ("mu", "weight_decay", "adamw_epsilon", "sgd_momentum", "sgd_nesterov", "clip_norm",
                      "clip_by_true_norm", "aggregated_residual", "bf16_factors", "overlap", "bucket_elements", "seed",
                      "nesterov", "normuon_beta2", "muonbp_period", "muonbp_block_rate", "dion2_random", "spectra_fraction",
                      "spectra_iterations", "galore_scale", "galore_interval", "device"):
            setattr(struct, field, getattr(self, field))
        if self.budget_bytes is not None:
            if self.budget_bytes < 0:
                raise _abi.InvalidArgument(f"budget_bytes: found {self.budget_bytes}, expected 0 or more, or None")
            struct.budget_bytes = self.budget_bytes
        factored = self.kind in WITH_FACTOR_RANKS
        if factored != (self.profile is not None):
            expected = "a profile, as lowband.uniform(16)" if factored else "None: gradients travel dense"
            raise _abi.InvalidArgument(f"profile: found {self.profile} with kind {self.kind}, expected {expected}")
        if self.profile is not None:
            struct.profile = _number(self.profile.kind, PROFILES, "profile.kind")
            struct.uniform_rank, struct.scale = self.profile.uniform_rank, self.profile.scale
            struct.width, struct.head_dim = self.profile.width, self.profile.head_dim
            struct.fraction_numerator, struct.fraction_denominator = self.profile.numerator, self.profile.denominator
        return struct


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What one step did; equal on all processes except the times."""
    gradient_norm: float
    clip_scale: float
    skipped_matrices: int
    skipped_other: int
    dead_columns: int
    householder_fallbacks: int
    seconds: float
    communication_seconds: float
    exposed_seconds: float


@dataclasses.dataclass(frozen=True)
class ByteCounts:
    """What this process moved. `payload_bytes` is exact, `modelled_wire_bytes` what a ring would send of it."""
    calls: int
    payload_bytes: int
    modelled_wire_bytes: float
    transport_bytes: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """How well one matrix's exchange did in a diagnosed step."""
    drift: float
    mass_leak: float
    captured_energy: float
    dead_columns: int


@dataclasses.dataclass(frozen=True)
class StatePlace:
    """Where a piece lies in the whole tensor of its replica: elements `element_begin` to `element_end`, row by row, of a
    block of rows and columns."""
    rows: int  # of the whole
    cols: int
    row_begin: int
    row_end: int
    col_begin: int
    col_end: int
    element_begin: int
    element_end: int
    differs_between_replicas: int


@dataclasses.dataclass(frozen=True)
class StatePiece:
    """A piece of what this process must keep to go on, by address: row i begins row_stride elements after row i-1."""
    name: str
    dtype: str
    rows: int
    cols: int
    row_stride: int
    data: int | None  # None when it is empty
    place: StatePlace
    device: int = -1  # in whose memory: Options.device, or -1 for the host


def _plain(struct, into):
    return into(**{field.name: getattr(struct, field.name) for field in dataclasses.fields(into)})


class Optimizer:
    """Exchanges what its update needs and updates the weights. Collective, as `step`: all processes of `world`.

    Borrows the memory of the parameters.
    """

    def __init__(self, world: World, parameters: Sequence[Parameter], options: Options) -> None:
        self._handle: int | None = None
        self.world = world
        self.parameters = list(parameters)
        self.options = options
        ranks = options.profile.ranks if options.profile is not None else {}
        unknown = set(ranks) - {name for parameter in parameters for name in parameter.matrices}
        if unknown:
            raise _abi.InvalidArgument(f"profile.ranks: found {sorted(unknown)[0]}, expected names of matrices")
        described = (_abi.Parameter * len(self.parameters))()
        for struct, parameter in zip(described, self.parameters):
            struct.name = parameter.name.encode()
            struct.role = _number(parameter.role, ROLES, f"role of {parameter.name}")
            struct.cut = _number(parameter.cut, CUTS, f"cut of {parameter.name}")
            struct.rows, struct.cols = parameter.rows, parameter.cols
            struct.weight, struct.gradient = parameter.weight, parameter.gradient
            if not parameter.blocks:
                struct.factor_rank = ranks.get(parameter.name, 0)
            struct.block_count = len(parameter.blocks)
            struct.blocks_of_columns = _number(parameter.blocks_of, ("rows", "cols"), f"blocks_of of {parameter.name}")
            if parameter.blocks:
                struct.blocks = (_abi.Block * len(parameter.blocks))(*(
                    _abi.Block(_number(block.role, ROLES, f"role of {name}"), block.lines, ranks.get(name, 0))
                    for name, block in zip(parameter.matrices, parameter.blocks)))
        handle = ctypes.c_void_p()
        _abi.call("optimizer_create", world.handle, described, len(self.parameters),
                  ctypes.byref(options._as_struct()), ctypes.byref(handle))
        self._handle = handle.value

    @property
    def handle(self) -> int:
        if self._handle is None:
            raise _abi.InvalidArgument("optimizer: found it closed, expected an open one")
        return self._handle

    def rebind(self, parameter: int, weight: int, gradient: int) -> None:
        """The addresses of a parameter's weight and gradient from now on. Not after it was announced in a step."""
        _abi.call("rebind", self.handle, parameter, weight, gradient)

    def gradient_ready(self, parameter: int) -> None:
        """The gradient is complete and stays as it is until `step` returns, so its exchange may start."""
        _abi.call("gradient_ready", self.handle, parameter)

    def step(self, step: int, learning_rate: float, scalar_learning_rate: float,
             diagnose: bool = False, stream: int = 0) -> StepReport:
        """`enqueue_step`, and its report."""
        self.enqueue_step(step, learning_rate, scalar_learning_rate, diagnose, stream)
        return self.last_report()

    def enqueue_step(self, step: int, learning_rate: float, scalar_learning_rate: float,
                     diagnose: bool = False, stream: int = 0) -> None:
        """Weights <- their update from the gradients, each the mean over this process's own data.

        `learning_rate` is that of matrices, `scalar_learning_rate` of everything else. Leaves anything in the
        gradients. Collective, equal arguments. On a device the step begins when what is in `stream` so far (a
        cudaStream_t, 0 is the default one) is over, and what comes to it afterwards begins when the step is over; it
        is not waited for.
        """
        info = _abi.defaults(_abi.StepInfo, "step_info")
        info.step, info.learning_rate, info.scalar_learning_rate = step, learning_rate, scalar_learning_rate
        info.diagnose, info.stream = diagnose, stream
        _abi.call("step", self.handle, ctypes.byref(info), None)

    def last_report(self) -> StepReport:
        """Of the last step. Waits until a device has done it."""
        report = _abi.defaults(_abi.StepReport, "step_report")
        _abi.call("last_report", self.handle, ctypes.byref(report))
        return _plain(report, StepReport)

    def step_bytes(self, purpose: str, axis: str = "") -> ByteCounts:
        """Of the last step, on "replica", "shard", "tensor", "within_replica", "world" or all axes."""
        return self._bytes("step_bytes", purpose, axis)

    def total_bytes(self, purpose: str, axis: str = "") -> ByteCounts:
        """Since the world began."""
        return self._bytes("total_bytes", purpose, axis)

    def _bytes(self, function: str, purpose: str, axis: str) -> ByteCounts:
        counted = _abi.defaults(_abi.Bytes, "bytes")
        number = _number(purpose, PURPOSES, "purpose")
        _abi.call(function, self.handle, axis.encode(), number, ctypes.byref(counted))
        return _plain(counted, ByteCounts)

    def planned_bytes(self) -> tuple[int, int]:
        """Payload of factors and of dense gradients that the next step sends on the replica axis, over one replica."""
        factors, dense = ctypes.c_int64(), ctypes.c_int64()
        _abi.call("planned_bytes", self.handle, ctypes.byref(factors), ctypes.byref(dense))
        return factors.value, dense.value

    def factor_rank(self, parameter: int, block: int = 0) -> int:
        """0 for what does not travel as factors. Block 0 is all of a parameter without blocks."""
        found = ctypes.c_int64()
        _abi.call("block_factor_rank", self.handle, parameter, block, ctypes.byref(found))
        return found.value

    def diagnosis(self, parameter: int, block: int = 0) -> Diagnosis:
        """Of a matrix, in the last step if that was diagnosed. Block 0 is all of a parameter without blocks."""
        found = _abi.defaults(_abi.Diagnosis, "diagnosis")
        _abi.call("block_diagnosis", self.handle, parameter, block, ctypes.byref(found))
        return _plain(found, Diagnosis)

    def state(self) -> list[StatePiece]:
        """Read what the pieces point at to save a checkpoint, overwrite it to load one. Valid until `close`."""
        pieces = []
        for i in range(_abi.call("state_count", self.handle)):
            piece = _abi.defaults(_abi.StatePiece, "state_piece")
            _abi.call("state_at", self.handle, i, ctypes.byref(piece))
            place = _abi.defaults(_abi.StatePlace, "state_place")
            _abi.call("state_place_of", self.handle, i, ctypes.byref(place))
            pieces.append(StatePiece(piece.name.decode(), DTYPES[piece.dtype], piece.rows, piece.cols,
                                     piece.row_stride, piece.data, _plain(place, StatePlace), piece.device))
        return pieces

    def close(self) -> None:
        """Before its world."""
        handle, self._handle = self._handle, None
        if handle is not None:
            _abi.call("optimizer_free", handle)
