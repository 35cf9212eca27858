"""Shared by decoders and encoders: pieces of a tensor, memory for one piece, tables."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from math import prod
from types import EllipsisType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]
Index: TypeAlias = tuple[int | slice | EllipsisType, ...]

#: Weights in a piece. Small enough that the piece and its intermediates stay in the L2 cache, large
#: enough that the work of some fifteen NumPy calls outweighs their overhead.
DECODE_PIECE = 65536
ENCODE_PIECE = 16384

#: Bytes of `work` for full-size pieces. Decoding iq4_nl into a strided result needs the most.
WORK_BYTES = 640 * 1024

#: Least bytes of `work`: one block of any type, plus the alignment of each array.
LEAST_WORK = 32 * 1024


def work_bytes(weights: int) -> int:
    """Bytes of `work` that let a codec convert `weights` weights in full-size pieces."""
    return min(WORK_BYTES, LEAST_WORK + weights * (WORK_BYTES // ENCODE_PIECE))


#: The sixteen levels of iq4_nl and iq4_xs, and those of mxfp4 (twice the e2m1 numbers of the OCP
#: Microscaling Formats specification 1.0, section 5.3.3).
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def pieces(shape: tuple[int, ...], limit: int) -> Iterator[Index]:
    """Indices that cut an array of `shape` into views of at most `limit` items."""
    if prod(shape) <= limit:
        if prod(shape):
            yield (...,)
        return
    step = limit // prod(shape[1:])
    if step:
        for start in range(0, shape[0], step):
            yield (slice(start, start + step), ...)
    else:
        for i in range(shape[0]):
            for inner in pieces(shape[1:], limit):
                yield (i, *inner)


class Memory:
    """An allocator over `work`: arrays are 64-byte aligned, one after another.

    `rest()` is an allocator for the remaining bytes, so its arrays are temporary: whatever this
    allocator hands out next reuses their memory.
    """

    def __init__(self, work: Bytes, used: int | None = None) -> None:
        self._work = work
        self._used = -work.ctypes.data % 64 if used is None else used

    def array(self, shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
        start = self._used
        end = start + prod(shape) * np.dtype(dtype).itemsize
        self._used = end + (start - end) % 64
        array: NDArray[Any] = self._work[start:end].view(dtype).reshape(shape)
        return array

    def rest(self) -> Memory:
        return Memory(self._work, self._used)


def half(field: Bytes) -> Floats:
    """The f16 numbers in the last axis of `field`, as f32."""
    return field.view(np.float16).astype(np.float32)


@cache
def pair_table(levels: tuple[int, ...]) -> NDArray[np.float64]:
    """The levels of two codes at once: entry w is the f32 pair levels[w & 15], levels[w >> 8].

    A pair is one 8-byte item. Look-ups touch only 256 entries of the 30 KiB, so the table stays
    in the L1 cache; a table of all 65,536 two-byte words would not.
    """
    words = np.arange(0x0F0F + 1)
    pairs = np.stack([words & 15, words >> 8], axis=1)
    return np.array(levels, np.float32)[pairs].view(np.float64)[:, 0]
