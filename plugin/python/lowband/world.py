"""How the processes of a job reach each other."""

from __future__ import annotations

import ctypes
from typing import Callable

from . import _abi


class World:
    """The processes of a job.

    Made by `from_environment`, `from_tcp`, `from_mpi` or `from_all_gather`, on every process. `close` it after its
    optimizer, also on every process; leaving a `with` block does so, and aborts when an exception is in flight.
    """

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    @classmethod
    def from_environment(cls) -> World:
        """UCX; processes meet where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say, as torchrun sets them.

        The port must be free: with torchrun, whose own store listens there, use `from_all_gather` or another port.
        """
        return cls._made("world_from_environment")

    @classmethod
    def from_mpi(cls) -> World:
        """MPI_COMM_WORLD of a job that mpirun started."""
        return cls._made("world_from_mpi")

    @classmethod
    def from_tcp(cls, process: int, processes: int, address: str, port: int, token: str = "",
                 deadline_seconds: float = 120) -> World:
        """UCX; processes meet at a free port of process 0's host."""
        meeting = _abi.defaults(_abi.Meeting, "meeting")
        meeting.process, meeting.processes = process, processes
        meeting.address, meeting.port = address.encode(), port
        meeting.token, meeting.deadline_seconds = token.encode(), deadline_seconds
        return cls._made("world_from_tcp", ctypes.byref(meeting))

    @classmethod
    def from_all_gather(cls, process: int, processes: int, all_gather: Callable[[bytes], list[bytes]]) -> World:
        """UCX; processes exchange their addresses by `all_gather`, which returns the bytes that every process gave.

        What it gets has the same length on all processes. It is not called after this returns.
        """
        raised: list[BaseException] = []

        def gather(_context, own, everything, count):
            try:
                parts = all_gather(ctypes.string_at(own, count))
                joined = b"".join(parts)
                if len(joined) != count * processes:
                    raise ValueError(f"all_gather: found {len(joined)} bytes returned, expected {count * processes}")
                ctypes.memmove(everything, joined, len(joined))
                return 0
            except BaseException as error:  # it must not pass through C; it is raised again below
                raised.append(error)
                return 1

        callback = _abi.AllGather(gather)
        try:
            return cls._made("world_from_all_gather", process, processes, callback, None)
        except _abi.Error as error:
            if raised:
                raise error from raised[0]
            raise

    @classmethod
    def _made(cls, function: str, *arguments) -> World:
        handle = ctypes.c_void_p()
        _abi.call(function, *arguments, ctypes.byref(handle))
        assert handle.value is not None
        return cls(handle.value)

    @property
    def handle(self) -> int:
        if self._handle is None:
            raise _abi.InvalidArgument("world: found it closed, expected an open one")
        return self._handle

    @property
    def process(self) -> int:
        return _abi.call("world_process", self.handle)

    @property
    def processes(self) -> int:
        return _abi.call("world_processes", self.handle)

    def set_deadline(self, seconds: float) -> None:
        """How long a call of an optimizer made afterwards waits for another process; 20 seconds at first."""
        _abi.call("world_set_deadline", self.handle, seconds)

    def abort(self, reason: str) -> None:
        """Makes every process's calls raise PeerFailed with this reason."""
        _abi.call("world_abort", self.handle, reason.encode())

    def close(self) -> None:
        """Collective, unless the world is broken."""
        handle, self._handle = self._handle, None
        if handle is not None:
            _abi.call("world_free", handle)

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind, error, _trace) -> None:
        if error is not None and self._handle is not None:
            self.abort(str(error))
        self.close()
