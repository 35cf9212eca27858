"""Device memory: blocks that free themselves, a count of them, and copies through pinned memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from pyggml.backends.base import Address
from pyggml.backends.cuda.driver import Context, guarded
from pyggml.backends.cuda.launch import Operand
from pyggml.errors import OutOfMemoryError
from pyggml.graph import Ne, Spec

Bytes = NDArray[np.uint8]

#: Bytes of one of the two halves of the pinned memory that copies pass through.
STAGED = 8 << 20


@dataclass(slots=True)
class Allocations:
    """What is allocated now and was ever, over all devices; tests look at it.

    failing  the allocation that fails, counted down from `fail_allocation`; 0 for none
    """

    blocks: int = 0
    nbytes: int = 0
    made: int = 0
    failing: int = 0


ALLOCATIONS = Allocations()


@contextmanager
def fail_allocation(number: int) -> Iterator[None]:
    """Let the allocation of that number, from 1 and from now on, fail as if memory were full."""
    ALLOCATIONS.failing = number
    try:
        yield
    finally:
        ALLOCATIONS.failing = 0


class Buffer:
    """A zeroed block of a GPU's memory at the address `ptr`, freed with the object."""

    __slots__ = ("__weakref__", "_block", "context", "nbytes", "ptr")

    def __init__(self, context: Context, nbytes: int) -> None:
        self._block: Any = None
        self.context, self.nbytes, self.ptr = context, nbytes, 0
        if nbytes == 0:
            return
        if ALLOCATIONS.failing:
            ALLOCATIONS.failing -= 1
            if not ALLOCATIONS.failing:
                raise OutOfMemoryError(f"a test let the allocation of {nbytes} bytes fail")
        try:
            with guarded("allocating"):
                self._block = context.driver.mem_alloc(nbytes)
        except OutOfMemoryError:
            free, total = context.driver.mem_get_info()
            raise OutOfMemoryError(
                f"cuda:{context.index} ({context.about.name}) has no {nbytes:,} bytes: {free:,} of "
                f"{total:,} are free. Pin weights to the host (pins=), take a smaller context or "
                "batch, or end what else uses the GPU"
            ) from None
        self.ptr = int(self._block)
        ALLOCATIONS.blocks += 1
        ALLOCATIONS.nbytes += nbytes
        ALLOCATIONS.made += 1
        with guarded("clearing memory"):
            context.driver.memset_d8_async(self.ptr, 0, nbytes, context.stream)

    def __del__(self) -> None:
        block, self._block = getattr(self, "_block", None), None
        if block is not None:
            ALLOCATIONS.blocks -= 1
            ALLOCATIONS.nbytes -= self.nbytes
            with suppress(self.context.driver.Error), self.context:  # of a context that is lost
                block.free()


class Staging:
    """Two halves of pinned memory: one is filled while the other is on its way."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._halves: list[Bytes] = []
        self._events: list[Any] = []

    def _half(self, turn: int) -> tuple[Bytes, Any]:
        """A half that no copy uses any more, and its event."""
        found = self.context.driver
        if not self._halves:
            with guarded("allocating pinned host memory"):
                self._halves = [found.pagelocked_empty(STAGED, np.uint8) for _ in range(2)]
                self._events = [found.Event(found.event_flags.DISABLE_TIMING) for _ in range(2)]
        self._events[turn % 2].synchronize()
        return self._halves[turn % 2], self._events[turn % 2]

    def upload(self, ptr: int, data: Bytes) -> None:
        """Flat bytes to a device address. When it returns, `data` may change."""
        for turn, start in enumerate(range(0, len(data), STAGED)):
            half, event = self._half(turn)
            part = data[start : start + STAGED]
            half[: len(part)] = part
            found, stream = self.context.driver, self.context.stream
            with guarded("uploading"):
                found.memcpy_htod_async(ptr + start, half[: len(part)], stream)
                event.record(stream)

    def download(self, data: Bytes, ptr: int) -> None:
        """Flat bytes from a device address; waits for them, and for all that was queued before."""
        found, stream = self.context.driver, self.context.stream
        starts = range(0, len(data), STAGED)
        for turn in range(len(starts) + 1):
            if turn < len(starts):
                half, event = self._half(turn)
                size = min(STAGED, len(data) - starts[turn])
                with guarded("downloading"):
                    found.memcpy_dtoh_async(half[:size], ptr + starts[turn], stream)
                    event.record(stream)
            if turn > 0:
                with guarded("downloading"):
                    self._events[(turn - 1) % 2].synchronize()
                part = data[starts[turn - 1] : starts[turn - 1] + STAGED]
                part[:] = self._halves[(turn - 1) % 2][: len(part)]


def operand_at(at: Address, spec: Spec) -> Operand:
    """A tensor in device memory as kernels get it."""
    return Operand(at.buffer.ptr + at.offset, spec.ne, at.nb, spec.dtype, at.layout)


def units(spec: Spec) -> Ne:
    """Sizes with dimension 0 counted in blocks, as strides count it."""
    return (spec.ne[0] // spec.dtype.block, *spec.ne[1:])


def span(nb: Ne, spec: Spec) -> int:
    """Bytes from a tensor's first to its last."""
    return sum((n - 1) * step for n, step in zip(units(spec), nb)) + spec.dtype.nbytes


def in_span(memory: Bytes, nb: Ne, spec: Spec) -> Bytes:
    """The tensor's bytes [ne3, ne2, ne1, blocks, bytes] inside the memory that it spans."""
    shape = (*units(spec)[::-1], spec.dtype.nbytes)
    return as_strided(memory, shape, (*nb[::-1], 1))


def put(staging: Staging, at: Address, spec: Spec, array: NDArray[Any]) -> None:
    """Write an array (NumPy shape, or raw rows) at an address, whatever its strides."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    target = operand_at(at, spec)
    if target.contiguous:
        staging.upload(target.ptr, flat)
        return
    around = np.empty(span(at.nb, spec), np.uint8)  # what lies between its rows stays
    staging.download(around, target.ptr)
    part = in_span(around, at.nb, spec)
    part[...] = flat.reshape(part.shape)
    staging.upload(target.ptr, around)


def take(staging: Staging, at: Address, spec: Spec) -> NDArray[Any]:
    """The array at an address in NumPy shape: uint16 for bf16, rows of bytes for block types."""
    source = operand_at(at, spec)
    if source.contiguous:
        flat = np.empty(spec.nbytes, np.uint8)
        staging.download(flat, source.ptr)
    else:
        around = np.empty(span(at.nb, spec), np.uint8)
        staging.download(around, source.ptr)
        flat = np.ascontiguousarray(in_span(around, at.nb, spec)).reshape(-1)
    kind = spec.dtype
    stored = np.dtype(kind.numpy or (np.uint16 if kind.block == 1 else np.uint8))
    rows = flat.view(stored)
    return rows.reshape(*spec.shape[:-1], rows.size // prod(spec.ne[1:]))
