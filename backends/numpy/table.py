"""The kernel table of the NumPy backend, and what a kernel is handed besides plain arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.dtypes import DType
from pyggml.errors import PyggmlError
from pyggml.node import Node, Op

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor whose type NumPy does not have: bf16 or a block type.

    raw  bf16:   uint16 [ne3, ne2, ne1, ne0]
         blocks: uint8  [ne3, ne2, ne1, ne0 / block, bytes of a block]
    """

    dtype: DType
    raw: NDArray[Any]
    ne: tuple[int, int, int, int]


Array = NDArray[Any] | Packed


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the backend's alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Scratch:
    """A bump allocator over the scratch bytes that a kernel declared."""

    __slots__ = ("_memory", "used")

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory
        self.used = 0

    def array(self, shape: int | tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
        """An uninitialised C-contiguous array inside the declared bytes."""
        shape = (shape,) if isinstance(shape, int) else shape
        count = 1
        for extent in shape:
            count *= extent
        nbytes = count * np.dtype(dtype).itemsize
        start, end = self.used, self.used + nbytes
        if end > self._memory.nbytes:
            raise PyggmlError(
                f"a kernel asked for {end} bytes of scratch but declared {self._memory.nbytes}"
            )
        self.used = aligned(end)
        made: NDArray[Any] = self._memory[start:end].view(dtype).reshape(shape)
        return made


@dataclass(frozen=True, slots=True)
class Kernel:
    """One row of the table: the function and what the planner must know of it.

    types    element types of sources and result that it takes; None for all
    inplace  sources whose memory the result may take over
    scratch  bytes it needs beside its operands, from the node
    refuses  a further reason not to run a node, or None
    """

    run: Callable[..., Any]
    types: frozenset[str] | None
    inplace: tuple[int, ...]
    scratch: Callable[[Node], int] | None
    refuses: Callable[[Node], str | None]


KERNELS: dict[Op[Any], Kernel] = {}

PLAIN = frozenset({"f32", "f16", "i32", "i64"})


def _never(node: Node) -> str | None:
    return None


def kernel(
    op: Op[Any],
    *,
    types: frozenset[str] | set[str] | None = PLAIN,
    inplace: tuple[int, ...] = (),
    scratch: Callable[[Node], int] | None = None,
    refuses: Callable[[Node], str | None] = _never,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register the NumPy kernel of `op`.

    The function is called as `fn(out, *sources, scratch=Scratch, **attributes)` with strided
    four-dimensional arrays in NumPy shape: None for an absent source, `Packed` for bf16 and block
    types; `scratch` only where it is declared. It fills `out`, touches nothing else and returns
    nothing (or `out` itself): a result that is returned instead is an error.
    """
    allowed = None if types is None else frozenset(types)

    def register(fn: Callable[..., None]) -> Callable[..., None]:
        KERNELS[op] = Kernel(fn, allowed, inplace, scratch, refuses)
        return fn

    return register
