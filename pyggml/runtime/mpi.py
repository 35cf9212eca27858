"""MPI as the transport of ranks: `mpiexec -n 2 python script.py`, with mpi4py.

`join` starts MPI in a process that mpiexec started. MPI waits at the end of a process until all
others end too. So a process with an uncaught error must not end in the usual way: it prints the
error and leaves at once, and mpiexec then ends the others. `MPI_Abort` does the same, but with
further lines of its own.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import traceback
from contextlib import suppress
from functools import cache
from typing import Any, NoReturn

from pyggml.errors import DeviceError
from pyggml.extras import package
from pyggml.runtime.ranks import Bytes, Ranks, Request

#: Seconds that MPI's start may take: all processes must begin within that time of each other.
STARTUP = 30


def launched() -> tuple[int, int] | None:
    """The rank of this process and the number of all, if mpiexec started it. Does not start MPI."""
    # MPICH and the like, then Open MPI.
    rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
    size = os.environ.get("PMI_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE")
    return (int(rank), int(size)) if rank and size else None


@cache
def join() -> Ranks:
    """This process among those that mpiexec started; they compute a sharded graph together.

    with gg.load(path, shard="auto", ranks=gg.join()) as model: ...
    plan = gg.compile(outputs, backends=["cuda:0", "cuda:1"], shard="auto",
                      store=gg.Store(ranks=gg.join()))

    Started without mpiexec, or as the only process, it is rank 0 of 1 and needs no MPI. The GPU of
    a rank is the one whose number the rank has on its machine, whatever the number of its place.
    From now on an uncaught error ends the process at once.
    Errors: MissingPackageError without mpi4py, DeviceError if MPI cannot start. If another process
    has not started MPI after half a minute, this one is ended by SIGALRM.
    """
    if (launched() or (0, 1))[1] == 1:
        return Ranks(_Alone())
    if hasattr(signal, "alarm"):
        signal.alarm(STARTUP)  # MPI waits without an end, and does not let Python run
    try:
        mpi = package("mpi4py.MPI", "running in several processes", "mpi")
    except RuntimeError as error:
        raise DeviceError(f"MPI cannot start: {error}") from None
    finally:
        if hasattr(signal, "alarm"):
            signal.alarm(0)
    ranks = Ranks(_Mpi(mpi))
    sys.excepthook = _uncaught(ranks)
    atexit.register(ranks.leave)  # before MPI's own end
    return ranks


class _Alone:
    """The transport of one process: no message is ever sent."""

    rank, size, local = 0, 1, 0

    def send(self, data: Bytes, to: int, tag: int) -> Request:
        raise AssertionError(f"a message to {to}")

    def receive(self, data: Bytes, source: int, tag: int) -> Request:
        raise AssertionError(f"a message from {source}")

    def sender(self, tag: int) -> None:
        return None


class _Mpi:
    """Messages of mpi4py."""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._world = mpi.COMM_WORLD.Dup()
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()
        near = self._world.Split_type(mpi.COMM_TYPE_SHARED)
        self.local = near.Get_rank()
        self._most: int = self._world.Get_attr(mpi.TAG_UB)

    def send(self, data: Bytes, to: int, tag: int) -> Request:
        return _Sending(self._world.Isend([data, self._mpi.BYTE], dest=to, tag=self._tag(tag)))

    def receive(self, data: Bytes, source: int, tag: int) -> Request:
        block = [data, self._mpi.BYTE]
        return _Sending(self._world.Irecv(block, source=source, tag=self._tag(tag)))

    def sender(self, tag: int) -> int | None:
        status = self._mpi.Status()
        if not self._world.Iprobe(source=self._mpi.ANY_SOURCE, tag=tag, status=status):
            return None
        return int(status.Get_source())

    def _tag(self, tag: int) -> int:
        if tag > self._most:
            raise DeviceError(f"the plan has more than the {self._most} messages that MPI can tell")
        return tag


class _Sending:
    """A request of mpi4py, which keeps its memory alive."""

    def __init__(self, request: Any) -> None:
        self._request = request

    def done(self) -> bool:
        return bool(self._request.Test())


def _uncaught(ranks: Ranks) -> Any:
    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> NoReturn:
        ranks.failed(error)
        sys.stdout.flush()
        traceback.print_exception(kind, error, trace)
        leave_at_once(130 if isinstance(error, KeyboardInterrupt) else 1)

    return hook


def leave_at_once(status: int) -> NoReturn:
    """End the process without MPI's end, which would wait for the others."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
