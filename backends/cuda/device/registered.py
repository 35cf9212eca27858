"""Pages of the host that the GPU reads itself: of mapped files, and of weights that the host keeps
in tiles.

A weight that a GPU borrows crosses the bus in every run. An H100 reads registered pages of its file
at 55 GB/s, while the host does nothing; registering 1 GiB that is in memory takes 0.03 s. The lost
design kept a packed copy on the host for each plan, and copied it through pinned memory at 7 GB/s.
Registered pages cannot leave memory, so only up to half of what is available is used this way for
files. Weights in tiles are in memory anyway.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.driver import imported

Bytes = NDArray[np.uint8]


class Pages:
    """Registered pages, from address `start` to before `end`, until nothing refers to them.

    counted  whether they count towards the limit
    """

    def __init__(self, context: Context, start: int, end: int, data: Bytes) -> None:
        self.start, self.end, self.counted = start, end, True
        self._context, self._data = context, data  # keeps the file mapped

    @classmethod
    def register(cls, context: Context, start: int, end: int, data: Bytes) -> Pages | None:
        """Register pages that `data` is in; None if the driver refuses."""
        cu = imported("cuda.bindings.driver")
        flags = cu.CU_MEMHOSTREGISTER_READ_ONLY | cu.CU_MEMHOSTREGISTER_DEVICEMAP
        with context:
            (status,) = cu.cuMemHostRegister(start, end - start, flags)
        return None if status.value else cls(context, start, end, data)

    def __del__(self) -> None:
        with suppress(Exception), self._context:
            self._context.stream.synchronize()  # a run that nobody waits for may read them
            imported("cuda.bindings.driver").cuMemHostUnregister(self.start)


class Registry:
    """The registered pages of one GPU."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._pages: WeakSet[Pages] = WeakSet()

    def cover(self, data: Bytes, *, fixed: bool = False) -> Sequence[Pages] | None:
        """Registered pages that contain `data`, to be kept as long as the GPU reads it. Tensors of
        a file may share a page, which can be registered only once.

        fixed  the data is in memory that nobody changes

        None if the data is neither fixed nor in a mapped file, or if its pages cannot be
        registered.
        """
        if not self._usable or not (fixed or _is_mapped(data)):
            return None
        start = data.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(data.ctypes.data + data.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = sorted(
            (p for p in self._pages if p.start < end and start < p.end), key=lambda p: p.start
        )
        for first, last in list(_gaps(start, end, pages)):
            counted = sum(p.end - p.start for p in self._pages if p.counted)
            if not fixed and counted + last - first > self._limit:
                return None
            new = Pages.register(self._context, first, last, data)
            if new is None:
                return None
            new.counted = not fixed
            self._pages.add(new)
            pages.append(new)
        return pages

    @cached_property
    def _usable(self) -> bool:
        """Whether kernels can read registered read-only pages at the host's addresses."""
        cu = imported("cuda.bindings.driver")
        names = ("READ_ONLY_HOST_REGISTER_SUPPORTED", "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM")
        keys = [getattr(cu.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}") for name in names]
        answers = [cu.cuDeviceGetAttribute(key, self._context.index) for key in keys]
        return all(not status.value and value for status, value in answers)

    @cached_property
    def _limit(self) -> int:
        """The most bytes of files to register: half of the available memory; 0 where that is not
        known."""
        with suppress(OSError):
            for line in Path("/proc/meminfo").read_text().splitlines():
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024 // 2
        return 0


def _gaps(start: int, end: int, pages: Sequence[Pages]) -> Iterator[tuple[int, int]]:
    """The ranges from `start` to `end` that are in none of the pages, which are sorted."""
    for page in pages:
        if start < page.start:
            yield start, page.start
        start = max(start, page.end)
    if start < end:
        yield start, end


def _is_mapped(data: NDArray[Any]) -> bool:
    """Whether an array shows a file that is mapped for reading only."""
    base: Any = data
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return isinstance(base, mmap.mmap) and not data.flags.writeable
