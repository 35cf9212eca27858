"""How kernels cut their work: the sizes of pieces and tiles, and arrays over their scratch."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from pyggml.backends.host_memory import Raw, aligned
from pyggml.quants.common import pieces as pieces

#: Elements of a piece of elementwise work. The piece and its intermediates stay in the L2 cache.
PIECE = 1 << 16
#: f32 elements of a decoded tile or a product: small for the L3 cache, large for BLAS.
TILE = 1 << 20


def split(length: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover `length`."""
    return (slice(i, min(i + step, length)) for i in range(0, length, step))


def shaped(memory: Raw, *shape: int) -> Raw:
    """The start of a flat array, as a contiguous array of this shape."""
    return memory[: prod(shape)].reshape(shape)


def scratch_bytes(*counts: int) -> int:
    """Bytes of scratch for arrays with these numbers of 4-byte elements."""
    return sum(aligned(4 * n) for n in counts)
