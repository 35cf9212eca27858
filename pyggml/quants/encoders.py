"""f32 to blocks. Encoders do gguf's f32 operations in gguf's order (for iq4_nl, ggml's).

An encoder is a function `fn(x, b, memory)`: x is f32 [n, weights of a block] and may be
overwritten, b is uint8 [n, bytes of a block] (for plain types [n, 1] of the type), both contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml.quants.common import IQ4_LEVELS, Bytes, Floats, Memory

Encoder: TypeAlias = Callable[[Floats, Any, Memory], None]


def _f32(x: Floats, out: Floats, memory: Memory) -> None:
    np.copyto(out, x)


def _f16(x: Floats, out: NDArray[np.float16], memory: Memory) -> None:
    np.copyto(out, x, casting="same_kind")


def _bf16(x: Floats, out: NDArray[np.uint16], memory: Memory) -> None:
    """Round to nearest, ties to even; a NaN keeps its upper bits and becomes quiet."""
    bits = x.view(np.uint32)
    rounded = memory.array(x.shape, np.uint32)
    nan = memory.array(x.shape, np.bool_)
    np.right_shift(bits, 16, out=rounded)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    np.isnan(x, out=nan)
    np.bitwise_or(bits, 0x400000, out=rounded, where=nan)
    rounded >>= 16
    np.copyto(out, rounded, casting="unsafe")


def _inverse(d: Floats) -> Floats:
    return np.where(d == 0, np.float32(0), 1 / d)


def _largest(x: Floats, memory: Memory) -> Floats:
    """The entry of largest magnitude, with its sign; the first one of equals."""
    magnitude = np.abs(x, out=memory.rest().array(x.shape))
    return np.take_along_axis(x, magnitude.argmax(axis=1, keepdims=True), axis=1)


def _put_half(field: Bytes, d: Floats) -> None:
    field[...] = d.astype(np.float16).view(np.uint8)


def _put_nibbles(field: Bytes, q: Bytes) -> None:
    np.left_shift(q[:, 16:], 4, out=field)
    field |= q[:, :16] & 15


def _q8_0(x: Floats, b: Bytes, memory: Memory) -> None:
    """d = max|x| / 127, q = x / d rounded to nearest, ties away from zero."""
    fraction, q = memory.array(x.shape), memory.array(x.shape)
    d = np.abs(x, out=q).max(axis=1, keepdims=True) / 127
    x *= _inverse(d)
    np.abs(x, out=fraction)
    np.floor(fraction, out=q)
    fraction -= q
    fraction *= 2
    q += np.floor(fraction, out=fraction)
    np.copysign(q, x, out=q)
    _put_half(b[:, :2], d)
    np.copyto(b[:, 2:].view(np.int8), q, casting="unsafe")


def _linear(x: Floats, b: Bytes, memory: Memory, *, bits: int, affine: bool) -> None:
    """q4_0, q5_0: d = (the largest x) / -2^(bits-1). q4_1, q5_1: d = (max - min) / (2^bits - 1)."""
    most, middle = (1 << bits) - 1, 1 << (bits - 1)
    if affine:
        low = x.min(axis=1, keepdims=True)
        d = (x.max(axis=1, keepdims=True) - low) / most
        _put_half(b[:, 2:4], low)
        x -= low
    else:
        d = _largest(x, memory) / -middle
    x *= _inverse(d)
    x += 0.5 if affine else middle + 0.5
    q = memory.array(x.shape, np.uint8)
    np.copyto(q, x, casting="unsafe")
    np.minimum(q, most, out=q)
    _put_half(b[:, :2], d)
    _put_nibbles(b[:, -16:], q)
    if bits == 5:
        b[:, -20:-16] = np.packbits(q >> 4, axis=1, bitorder="little")


@cache
def _nearest() -> tuple[Bytes, Floats]:
    """Code and level nearest to v, at index floor(2 v) + 256 for v in [-128, 128); ties go up.

    The borders between levels are multiples of 1/2, so floor(2 v) is enough.
    """
    levels = np.array(IQ4_LEVELS, np.float32)
    borders = (levels[1:] + levels[:-1]) / 2
    codes = np.searchsorted(borders, np.arange(-256, 256) / 2, side="right").astype(np.uint8)
    return codes, levels[codes]


def _iq4_nl(x: Floats, b: Bytes, memory: Memory) -> None:
    """d and codes q that make sum w (x - d level[q])^2 small, with weights w = x^2.

    Tries sixteen scales that put the largest x near the lowest level -127 (once at +127). Each
    scale gives codes, and the codes give a least-squares d = sum w l x / sum w l^2 with the gain
    (sum w l x)^2 / sum w l^2. The best d wins, and the final codes are those for that d. This is
    ggml's search without an importance matrix.

    The weights of a block are on the first axis because NumPy sums along it sequentially, as ggml
    does. The order matters: where two scales are equally good (in a block with one nonzero weight),
    rounding decides. A NaN makes d NaN, where ggml would make it 0.
    """
    shape = (x.shape[1], x.shape[0])
    columns, weight, level, product = (memory.array(shape) for _ in range(4))
    index = memory.array(shape, np.intp)
    codes, levels = _nearest()

    def choose(inverse: Floats) -> None:
        np.multiply(columns, inverse, out=level)
        np.multiply(level, 2, out=level)
        np.floor(level, out=level)
        np.add(level, 256, out=level)
        np.copyto(index, level, casting="unsafe")

    largest = _largest(x, memory)[:, 0]
    largest[np.abs(largest) < 1e-15] = 0  # ggml treats such a block as zero
    columns[...] = x.T
    np.multiply(columns, columns, out=weight)
    d = best = np.zeros_like(largest)
    for trial, target in enumerate((127, *range(-134, -119))):
        choose(np.float32(target) / largest)
        np.take(levels, index, out=level, mode="clip")
        np.multiply(weight, level, out=product)
        level *= product
        product *= columns
        lx, ll = product.sum(axis=0), level.sum(axis=0)
        better = lx * lx > best * ll if trial else True
        d = np.where(better, lx / ll, d)
        best = np.where(better, d * lx, best)
    d = np.where(largest == 0, np.float32(0), d)
    choose(_inverse(d))
    q = memory.array(shape, np.uint8)
    np.take(codes, index, out=q, mode="clip")
    _put_half(b[:, :2], d[:, None])
    _put_nibbles(b[:, 2:], q.T)


BY_NAME: dict[str, Encoder] = {
    "f32": _f32,
    "f16": _f16,
    "bf16": _bf16,
    "q4_0": partial(_linear, bits=4, affine=False),
    "q4_1": partial(_linear, bits=4, affine=True),
    "q5_0": partial(_linear, bits=5, affine=False),
    "q5_1": partial(_linear, bits=5, affine=True),
    "q8_0": _q8_0,
    "iq4_nl": _iq4_nl,
}
