"""lowband: low-rank gradient exchange and sharded optimizers for a trainer that exists already.

`lowband.torch` plugs into PyTorch. This package itself needs neither torch nor MPI nor CUDA.
"""

from __future__ import annotations

from . import _abi
from ._abi import (BudgetExceeded, Error, InternalError, InvalidArgument, Mismatch, PeerFailed, TransportError)
from .optimizer import (Block, ByteCounts, Diagnosis, Mesh, Optimizer, Options, Parameter, Profile, StatePiece, StepReport,
                        explicit, fraction, inverted, structural, uniform)
from .world import World

__all__ = [
    "Block", "BudgetExceeded", "ByteCounts", "Diagnosis", "Error", "InternalError", "InvalidArgument", "Mesh", "Mismatch",
    "Optimizer", "Options", "Parameter", "PeerFailed", "Profile", "StatePiece", "StepReport", "TransportError",
    "World", "explicit", "features", "fraction", "inverted", "set_compute_threads", "structural", "uniform",
]

__version__: str = _abi.call("version").decode()


def features() -> dict[str, bool]:
    """What is built into the library: ways to move bytes, and CUDA devices."""
    built_in = _abi.call("features").decode().split(",")
    return {name: name in built_in for name in ("mpi", "ucx", "cuda")}


def set_compute_threads(threads: int) -> None:
    """Threads that lowband computes with when it is called on this thread."""
    _abi.call("set_compute_threads", threads)
