"""The part of `pycuda.driver` that pyggml calls, on the machine that PYCUDA_FAKE names.

no driver, foreign    the import fails: libcuda is missing, or pycuda was built on another machine
no device             there is a driver, but no GPU
old, older            the driver supports CUDA 12.2; `older` also lacks a symbol that pycuda needs
gpu, gpus, gpus N     one, two or N GPUs of compute capability 8.0 with MEMORY bytes each

Only the memory of a GPU is real: its blocks are host memory. Work in a stream runs when something
waits for it, so a missing wait shows. Kernels do nothing. CALLS lists the copies. Error messages
are the driver's own.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from typing import Any

import numpy as np

from pyggml.backends.null.queue import Queue
from pyggml.errors import DeviceError

MACHINE = os.environ["PYCUDA_FAKE"]
_NUMBER = MACHINE.removeprefix("gpus")
MEMORY = 1 << 30
CALLS: list[str] = []
_FAILURES = {
    "no driver": "libcuda.so.1: cannot open shared object file: No such file or directory",
    "foreign": "libcurand.so.10: cannot open shared object file: No such file or directory",
    "older": "_driver.so: undefined symbol: cuCtxCreate_v4",
}
if MACHINE in _FAILURES:
    raise ImportError(_FAILURES[MACHINE])


class Error(Exception):
    pass


class MemoryError(Error):
    pass


class RuntimeError(Error):
    pass


class LogicError(Error):
    pass


def get_driver_version() -> int:
    return 12020 if MACHINE == "old" else 13000


def init() -> None:
    if not MACHINE.startswith("gpu"):
        raise RuntimeError("cuInit failed: no CUDA-capable device is detected")


class device_attribute:
    MULTIPROCESSOR_COUNT = 108
    MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 166_912
    L2_CACHE_SIZE = 40 << 20


class event_flags:
    DISABLE_TIMING = 2


class Device:
    @staticmethod
    def count() -> int:
        return int(_NUMBER or 2) if MACHINE.startswith("gpus") else 1

    def __init__(self, index: int) -> None:
        assert index < self.count()
        self.index = index

    def name(self) -> str:
        return "fake GPU"

    def compute_capability(self) -> tuple[int, int]:
        return 8, 0

    def get_attribute(self, value: int) -> int:
        return value

    def total_memory(self) -> int:
        return MEMORY

    def retain_primary_context(self) -> Context:
        return Context(self.index)


#: GPUs of which a kernel has failed: all that is asked of them is an error.
FAILED: set[int] = set()


class Context:
    stack: list[Context] = []

    def __init__(self, index: int) -> None:
        self.index = index

    @staticmethod
    def enable_peer_access(peer: Context) -> None:
        CALLS.append(f"reach {peer.index}")

    def push(self) -> None:
        Context.stack.append(self)

    @staticmethod
    def pop() -> None:
        Context.stack.pop()


class Stream:
    all: list[Stream] = []

    def __init__(self, flags: int = 0) -> None:
        self.queue, self.handle = Queue(), 1000 + len(self.all)
        self.index = Context.stack[-1].index if Context.stack else None
        self.all.append(self)

    def _check(self) -> None:
        if self.index in FAILED:
            raise LogicError("cuStreamQuery failed: an illegal memory access was encountered")

    def synchronize(self) -> None:
        self._check()
        self.queue.run_all()

    def is_done(self) -> bool:
        self._check()
        self.queue.run_all()
        return True

    def wait_for_event(self, event: Event) -> None:
        assert event.mark is not None
        self.queue.add(event.mark.wait)


class Event:
    def __init__(self, flags: int = 0) -> None:
        self.mark: Any = None

    def record(self, stream: Stream) -> Event:
        self.mark = stream.queue.mark()
        return self

    def synchronize(self) -> None:
        with suppress(DeviceError):  # Ctrl-C drops this queue's work; a GPU would go on
            self.mark.wait()

    def query(self) -> bool:
        self.mark.wait()
        return True


# -- memory -----------------------------------------------------------------------------------


class DeviceAllocation:
    live: dict[int, int] = {}  # address -> bytes

    def __init__(self, nbytes: int) -> None:
        self.memory = np.full(nbytes + 256, 0xAA, np.uint8)
        self.ptr = -(-self.memory.ctypes.data // 256) * 256
        self.live[self.ptr] = nbytes

    def __int__(self) -> int:
        return self.ptr

    def free(self) -> None:
        for stream in Stream.all:  # as cuMemFree does
            stream.synchronize()
        del self.live[self.ptr]


def mem_get_info() -> tuple[int, int]:
    return MEMORY - sum(DeviceAllocation.live.values()), MEMORY


def mem_alloc(nbytes: int) -> DeviceAllocation:
    assert Context.stack, "no context is current"
    if nbytes > mem_get_info()[0]:
        raise MemoryError("cuMemAlloc failed: out of memory")
    return DeviceAllocation(nbytes)


def pagelocked_empty(shape: int, dtype: Any) -> Any:
    assert Context.stack, "no context is current"
    return np.empty(shape, dtype)


def _inside(ptr: int, nbytes: int) -> None:
    live = DeviceAllocation.live
    if not any(start <= ptr and ptr + nbytes <= start + size for start, size in live.items()):
        raise LogicError("cuMemcpyAsync failed: invalid argument")


def memset_d8_async(ptr: int, byte: int, nbytes: int, stream: Stream) -> None:
    _inside(ptr, nbytes)
    stream.queue.add(lambda: ctypes.memset(ptr, byte, nbytes))


def memcpy_htod_async(target: int, source: Any, stream: Stream) -> None:
    _inside(target, source.nbytes)
    CALLS.append("htod")
    stream.queue.add(lambda: ctypes.memmove(target, source.ctypes.data, source.nbytes))


def memcpy_dtoh_async(target: Any, source: int, stream: Stream) -> None:
    _inside(source, target.nbytes)
    CALLS.append("dtoh")
    stream.queue.add(lambda: ctypes.memmove(target.ctypes.data, source, target.nbytes))


def memcpy_dtod_async(target: int, source: int, nbytes: int, stream: Stream) -> None:
    _inside(target, nbytes)
    _inside(source, nbytes)
    CALLS.append("dtod")
    stream.queue.add(lambda: ctypes.memmove(target, source, nbytes))
