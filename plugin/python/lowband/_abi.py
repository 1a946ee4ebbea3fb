"""The structs and functions of lowband.h, by ctypes."""

import ctypes
import os
import pathlib
from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int32, c_int64, c_uint64, c_void_p

ABI_VERSION = 6


class Meeting(Structure):
    _fields_ = [("struct_bytes", c_int64), ("process", c_int32), ("processes", c_int32), ("address", c_char_p),
                ("port", c_int32), ("token", c_char_p), ("deadline_seconds", c_double)]


class Block(Structure):
    _fields_ = [("role", c_int32), ("lines", c_int64), ("factor_rank", c_int64)]


class Parameter(Structure):
    _fields_ = [("name", c_char_p), ("role", c_int32), ("cut", c_int32), ("rows", c_int64), ("cols", c_int64),
                ("weight", c_void_p), ("gradient", c_void_p), ("factor_rank", c_int64), ("blocks", POINTER(Block)),
                ("block_count", c_int32), ("blocks_of_columns", c_int32)]


class Options(Structure):
    _fields_ = [("struct_bytes", c_int64), ("dtype", c_int32), ("mesh_replica", c_int32), ("mesh_shard", c_int32),
                ("mesh_tensor", c_int32), ("kind", c_int32), ("mu", c_double), ("lambda", c_double),
                ("weight_decay", c_double), ("scalar_kind", c_int32), ("sgd_nesterov", c_int32),
                ("sgd_momentum", c_double), ("adamw_beta1", c_double), ("adamw_beta2", c_double),
                ("adamw_epsilon", c_double), ("lion_beta1", c_double), ("lion_beta2", c_double),
                ("clip_norm", c_double), ("clip_by_true_norm", c_int32), ("aggregated_residual", c_int32),
                ("bf16_factors", c_int32), ("overlap", c_int32), ("bucket_elements", c_int64), ("seed", c_uint64),
                ("exchange", c_int32), ("profile", c_int32), ("uniform_rank", c_int64), ("width", c_int64),
                ("head_dim", c_int64), ("scale", c_double), ("fraction_numerator", c_int64),
                ("fraction_denominator", c_int64), ("budget_bytes", c_int64), ("sign", c_int32), ("update_scale", c_int32),
                ("nesterov", c_int32), ("dion2_random", c_int32), ("normuon_beta2", c_double), ("muonbp_period", c_int64),
                ("muonbp_block_rate", c_double), ("dion2_numerator", c_int64), ("dion2_denominator", c_int64),
                ("spectra_fraction", c_double), ("spectra_iterations", c_int64), ("galore_scale", c_double),
                ("galore_interval", c_int64), ("parameter_bytes", c_int64), ("device", c_int64)]


class StepInfo(Structure):
    _fields_ = [("struct_bytes", c_int64), ("step", c_int64), ("learning_rate", c_double),
                ("scalar_learning_rate", c_double), ("diagnose", c_int32), ("stream", c_void_p)]


class StepReport(Structure):
    _fields_ = [("struct_bytes", c_int64), ("gradient_norm", c_double), ("clip_scale", c_double),
                ("skipped_matrices", c_int64), ("skipped_other", c_int64), ("dead_columns", c_int64),
                ("householder_fallbacks", c_int64), ("seconds", c_double), ("communication_seconds", c_double),
                ("exposed_seconds", c_double)]


class Bytes(Structure):
    _fields_ = [("struct_bytes", c_int64), ("calls", c_int64), ("payload_bytes", c_int64),
                ("modelled_wire_bytes", c_double), ("transport_bytes", c_int64), ("seconds", c_double)]


class Diagnosis(Structure):
    _fields_ = [("struct_bytes", c_int64), ("drift", c_double), ("mass_leak", c_double),
                ("captured_energy", c_double), ("dead_columns", c_int64)]


class StatePiece(Structure):
    _fields_ = [("struct_bytes", c_int64), ("name", c_char_p), ("dtype", c_int32), ("rows", c_int64),
                ("cols", c_int64), ("row_stride", c_int64), ("data", c_void_p), ("device", c_int64)]


class StatePlace(Structure):
    _fields_ = [("struct_bytes", c_int64), ("rows", c_int64), ("cols", c_int64), ("row_begin", c_int64),
                ("row_end", c_int64), ("col_begin", c_int64), ("col_end", c_int64), ("element_begin", c_int64),
                ("element_end", c_int64), ("differs_between_replicas", c_int32)]


AllGather = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int64)
_World, _Optimizer = c_void_p, c_void_p

# name: (returns, arguments). What returns c_int may fail, unless it stands in _NEVER_FAILS.
_FUNCTIONS = {
    "last_error": (c_char_p, []),
    "abi_version": (c_int, []),
    "version": (c_char_p, []),
    "features": (c_char_p, []),
    "set_compute_threads": (c_int, [c_int]),
    "world_from_mpi": (c_int, [POINTER(_World)]),
    "world_from_environment": (c_int, [POINTER(_World)]),
    "meeting_defaults": (None, [POINTER(Meeting)]),
    "world_from_tcp": (c_int, [POINTER(Meeting), POINTER(_World)]),
    "world_from_all_gather": (c_int, [c_int, c_int, AllGather, c_void_p, POINTER(_World)]),
    "world_process": (c_int, [_World]),
    "world_processes": (c_int, [_World]),
    "world_set_deadline": (c_int, [_World, c_double]),
    "world_abort": (c_int, [_World, c_char_p]),
    "world_free": (None, [_World]),
    "options_defaults": (None, [POINTER(Options)]),
    "optimizer_create": (c_int, [_World, POINTER(Parameter), c_int64, POINTER(Options), POINTER(_Optimizer)]),
    "optimizer_free": (None, [_Optimizer]),
    "rebind": (c_int, [_Optimizer, c_int64, c_void_p, c_void_p]),
    "gradient_ready": (c_int, [_Optimizer, c_int64]),
    "step_info_defaults": (None, [POINTER(StepInfo)]),
    "step_report_defaults": (None, [POINTER(StepReport)]),
    "step": (c_int, [_Optimizer, POINTER(StepInfo), POINTER(StepReport)]),
    "last_report": (c_int, [_Optimizer, POINTER(StepReport)]),
    "bytes_defaults": (None, [POINTER(Bytes)]),
    "step_bytes": (c_int, [_Optimizer, c_char_p, c_int32, POINTER(Bytes)]),
    "total_bytes": (c_int, [_Optimizer, c_char_p, c_int32, POINTER(Bytes)]),
    "planned_bytes": (c_int, [_Optimizer, POINTER(c_int64), POINTER(c_int64)]),
    "block_factor_rank": (c_int, [_Optimizer, c_int64, c_int64, POINTER(c_int64)]),
    "diagnosis_defaults": (None, [POINTER(Diagnosis)]),
    "block_diagnosis": (c_int, [_Optimizer, c_int64, c_int64, POINTER(Diagnosis)]),
    "state_piece_defaults": (None, [POINTER(StatePiece)]),
    "state_count": (c_int64, [_Optimizer]),
    "state_at": (c_int, [_Optimizer, c_int64, POINTER(StatePiece)]),
    "state_place_defaults": (None, [POINTER(StatePlace)]),
    "state_place_of": (c_int, [_Optimizer, c_int64, POINTER(StatePlace)]),
}
_NEVER_FAILS = {"abi_version", "world_process", "world_processes"}


class Error(RuntimeError):
    """Base of what lowband raises."""


class InvalidArgument(Error, ValueError):
    """The caller's mistake; the message names the field, the value found and the value expected."""


class BudgetExceeded(Error):
    """A step would send more than was allowed; nothing was sent."""


class PeerFailed(Error):
    """Another process failed, is gone or silent. The world is broken."""


class Mismatch(Error):
    """Processes made different calls. The world is broken."""


class TransportError(Error):
    """MPI or UCX refused, or is not built in."""


class InternalError(Error):
    """Out of memory, or a defect of lowband."""


_ERRORS = {1: InvalidArgument, 2: BudgetExceeded, 3: PeerFailed, 4: Mismatch, 5: TransportError, 6: InternalError}


def _library_path():
    chosen = os.environ.get("LOWBAND_LIBRARY")
    return chosen or str(pathlib.Path(__file__).with_name("liblowband.so"))


def _load():
    path = _library_path()
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(f"LOWBAND_LIBRARY: found {path}, expected liblowband.so: {error}") from error
    for name, (returns, arguments) in _FUNCTIONS.items():
        function = getattr(library, "lowband_" + name)
        function.restype, function.argtypes = returns, arguments
    if library.lowband_abi_version() != ABI_VERSION:
        raise ImportError(f"{path}: found ABI version {library.lowband_abi_version()}, expected {ABI_VERSION}")
    return library


_library = _load()


def call(name, *arguments):
    """Calls lowband_<name>; raises what its status says."""
    result = getattr(_library, "lowband_" + name)(*arguments)
    if _FUNCTIONS[name][0] is c_int and name not in _NEVER_FAILS and result != 0:
        message = _library.lowband_last_error().decode()
        raise _ERRORS.get(result, InternalError)(message)
    return result


def defaults(struct, name):
    """A struct as lowband_<name>_defaults fills it in."""
    filled = struct()
    call(name + "_defaults", ctypes.byref(filled))
    return filled
