"""Device memory: blocks that are freed with their object."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.driver import guarded
from pyggml.backends.cuda.launch import Operand
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.backends.step import Address
from pyggml.errors import OutOfMemoryError
from pyggml.spec import Spec

#: From so many bytes on, blocks that are allocated at once are parts of one. The driver rounds a
#: block up to 2 MiB, 0.8 GiB in all for the weights and caches of DeepSeek-V4-Flash. Less stays
#: apart, so that compute-sanitizer sees where a tensor of a test ends.
ADJACENT = 256 << 20


class Block:
    """A block of a GPU's memory at the address `ptr`, freed with the object."""

    __slots__ = ("_block", "context", "ptr")

    def __init__(self, context: Context, nbytes: int) -> None:
        self._block: Any = None
        self.context = context
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

    def __del__(self) -> None:
        block, self._block = getattr(self, "_block", None), None
        if block is not None:
            with suppress(self.context.driver.Error), self.context:  # the context may be lost
                block.free()


class Room:
    """A block that buffers are cut from, one behind the other."""

    def __init__(self, context: Context, nbytes: int) -> None:
        self.block, self._end, self._nbytes = Block(context, nbytes), 0, nbytes

    def take(self, nbytes: int) -> int | None:
        """The address of the next bytes; None if there are not so many."""
        start, end = self._end, self._end + padded(nbytes)
        if end > self._nbytes:
            return None
        self._end = end
        return self.block.ptr + start


def room_for(context: Context, sizes: Sequence[int]) -> Room | None:
    """Room for buffers of these sizes; None if they had better be apart."""
    nbytes = sum(map(padded, sizes))
    return Room(context, nbytes) if nbytes >= ADJACENT and len(sizes) > 1 else None


def padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Buffer:
    """Zeroed memory of a GPU at the address `ptr`: a block, or a part of the context's `room`,
    freed with the object or with the last one in the same block."""

    __slots__ = ("__weakref__", "_block", "context", "nbytes", "ptr")

    def __init__(self, context: Context, nbytes: int) -> None:
        self._block: Block | None = None
        self.context, self.nbytes, self.ptr = context, nbytes, 0
        if nbytes == 0:
            return
        at = None if context.room is None else context.room.take(nbytes)
        self._block = Block(context, nbytes) if at is None else context.room.block
        self.ptr = self._block.ptr if at is None else at
        with guarded("clearing memory"):
            context.driver.memset_d8_async(self.ptr, 0, nbytes, context.stream)


def operand_at(at: Address, spec: Spec) -> Operand:
    """A tensor in device memory as an operand of kernels."""
    return Operand(at.buffer.ptr + at.offset, spec.ne, at.nb, spec.dtype, at.layout)
