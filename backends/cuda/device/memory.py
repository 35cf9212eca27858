"""Device memory: blocks that free themselves, and a count of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from pyggml.backends.base import Address
from pyggml.backends.cuda.device.driver import Context, guarded
from pyggml.backends.cuda.launch import Operand
from pyggml.errors import OutOfMemoryError
from pyggml.node import Spec


@dataclass(slots=True)
class Allocations:
    """What is allocated now and was ever, over all devices and with the host's pinned memory; tests
    look at it.

    failing  the allocation that fails, counted down from `fail_allocation`; 0 for none
    """

    blocks: int = 0
    nbytes: int = 0
    made: int = 0
    failing: int = 0

    def begin(self, nbytes: int) -> None:
        """Called before an allocation: OutOfMemoryError if a test lets it fail."""
        if self.failing:
            self.failing -= 1
            if not self.failing:
                raise OutOfMemoryError(f"a test let the allocation of {nbytes} bytes fail")

    def add(self, nbytes: int) -> None:
        self.blocks, self.nbytes, self.made = self.blocks + 1, self.nbytes + nbytes, self.made + 1

    def drop(self, nbytes: int) -> None:
        self.blocks, self.nbytes = self.blocks - 1, self.nbytes - nbytes


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
        ALLOCATIONS.begin(nbytes)
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
        ALLOCATIONS.add(nbytes)
        with guarded("clearing memory"):
            context.driver.memset_d8_async(self.ptr, 0, nbytes, context.stream)

    def __del__(self) -> None:
        block, self._block = getattr(self, "_block", None), None
        if block is not None:
            ALLOCATIONS.drop(self.nbytes)
            with suppress(self.context.driver.Error), self.context:  # of a context that is lost
                block.free()


def operand_at(at: Address, spec: Spec) -> Operand:
    """A tensor in device memory as kernels get it."""
    return Operand(at.buffer.ptr + at.offset, spec.ne, at.nb, spec.dtype, at.layout)
