"""Device memory: blocks that are freed with their object."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.driver import guarded
from pyggml.backends.cuda.launch import Operand
from pyggml.backends.step import Address
from pyggml.errors import OutOfMemoryError
from pyggml.spec import Spec


class Buffer:
    """A zeroed block of a GPU's memory at the address `ptr`, freed with the object."""

    __slots__ = ("__weakref__", "_block", "context", "nbytes", "ptr")

    def __init__(self, context: Context, nbytes: int) -> None:
        self._block: Any = None
        self.context, self.nbytes, self.ptr = context, nbytes, 0
        if nbytes == 0:
            return
        try:
            with guarded("allocating"):
                self._block = context.driver.mem_alloc(nbytes)
        except OutOfMemoryError:
            free, total = context.driver.mem_get_info()
            raise OutOfMemoryError(
                f"cuda:{context.index} ({context.about.name}) cannot allocate {nbytes:,} bytes: "
                f"{free:,} of {total:,} are free. Pin weights to the host (pins=), use a smaller "
                "context or batch, or end other processes on the GPU"
            ) from None
        self.ptr = int(self._block)
        with guarded("clearing memory"):
            context.driver.memset_d8_async(self.ptr, 0, nbytes, context.stream)

    def __del__(self) -> None:
        block, self._block = getattr(self, "_block", None), None
        if block is not None:
            with suppress(self.context.driver.Error), self.context:  # the context may be lost
                block.free()


def operand_at(at: Address, spec: Spec) -> Operand:
    """A tensor in device memory as an operand of kernels."""
    return Operand(at.buffer.ptr + at.offset, spec.ne, at.nb, spec.dtype, at.layout)
