"""Blocks to f32. Each decoder does gguf's f32 operations in gguf's order, so results are equal.

A decoder is called as `fn(b, y, memory)`: b uint8 [n, bytes of a block] (plain types: [n, 1] of
their own), y f32 [n, weights of a block], both contiguous. It unpacks integer codes into y (exact
in f32), then scales y in place. Layouts are ggml's: a field of 4-bit codes holds, for each run of
bytes, the low halves and then the high halves; further bits stand in a field of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pyggml.dtypes import TYPES
from pyggml.errors import DTypeError
from pyggml.quants.common import (
    FP4_LEVELS,
    IQ4_LEVELS,
    Bytes,
    Floats,
    Memory,
    half,
    pair_table,
)

Decoder: TypeAlias = Callable[[Any, Floats, Memory], None]


def _f16(raw: NDArray[np.float16], y: Floats, memory: Memory) -> None:
    """Moves the bits into place and rescales: twice as fast as NumPy's conversion.

    An f16 shifted by 13 is an f32 whose exponent is 112 too low, subnormals included. Only inf and
    NaN come out wrong (as finite numbers from 2^16 up): such pieces take NumPy's way.
    """
    bits = y.view(np.uint32)
    np.copyto(bits.view(np.int32), raw.view(np.int16))
    bits <<= 13
    bits &= 0x8FFFE000
    y *= np.float32(2.0**112)
    if y.max() >= 65536 or y.min() <= -65536:
        np.copyto(y, raw)


def _bf16(raw: NDArray[np.uint16], y: Floats, memory: Memory) -> None:
    bits = y.view(np.uint32)
    np.copyto(bits, raw)
    bits <<= 16


def _f32(raw: Floats, y: Floats, memory: Memory) -> None:
    np.copyto(y, raw)


def _nibbles(
    b: Bytes, y: Floats, memory: Memory, *, at: int, run: int, levels: tuple[int, ...] | None = None
) -> None:
    """y = the 4-bit codes (or their levels) from byte `at` of a block on, in runs of `run`."""
    n, runs = len(y), y.shape[1] // (2 * run)
    halves = y.reshape(n, runs, 2, run)
    fields = b[:, at : at + runs * run].reshape(n, runs, run)
    memory = memory.rest()
    packed = memory.array(fields.shape, np.uint8)
    packed[...] = fields
    words = packed.view(np.uint16)
    codes = memory.array(words.shape, np.uint16)
    for high in (0, 1):
        np.right_shift(words, 4 * high, out=codes)
        np.bitwise_and(codes, 0x0F0F, out=codes)
        if levels is None:
            halves[:, :, high] = codes.view(np.uint8)
        else:
            _look_up(codes, levels, halves[:, :, high], memory.rest())


def _look_up(codes: NDArray[np.uint16], levels: tuple[int, ...], y: Floats, memory: Memory) -> None:
    index = memory.array(codes.shape, np.intp)
    pairs = memory.array(codes.shape, np.float64)
    index[...] = codes
    # Without mode="clip" NumPy makes a copy of the result first.
    np.take(pair_table(levels), index, out=pairs, mode="clip")
    y[...] = pairs.view(np.float32)


def _add_high(y: Floats, field: Bytes, shifts: Any, mask: int, memory: Memory) -> None:
    """y += 16 * the codes (field >> shifts) & mask: the bits above the fourth."""
    shifts = np.array(shifts, np.uint8)
    shape = np.broadcast_shapes(field.shape, shifts.shape)
    codes = memory.rest().array(shape, np.uint8)
    np.right_shift(field, shifts, out=codes)
    codes &= mask
    codes <<= 4
    y += codes.reshape(y.shape)


def _q8_0(b: Bytes, y: Floats, memory: Memory) -> None:
    y[...] = b[:, 2:].view(np.int8)
    y *= half(b[:, :2])


def _linear(b: Bytes, y: Floats, memory: Memory, *, bits: int, affine: bool) -> None:
    """q4_0, q5_0: d (q - 2^(bits-1)). q4_1, q5_1: d q + m. Fields: d, m, fifth bits, nibbles."""
    _nibbles(b, y, memory, at=b.shape[1] - 16, run=16)
    if bits == 5:
        _add_high(y, b[:, -20:-16, None], range(8), 1, memory)
    if not affine:
        y -= 1 << (bits - 1)
    y *= half(b[:, :2])
    if affine:
        y += half(b[:, 2:4])


def _q45_k(b: Bytes, y: Floats, memory: Memory, *, bits: int) -> None:
    """d sc q - dmin m for 8 groups of 32. Fields: d, dmin, 12 bytes of 6-bit sc and m, fifth bits
    (bit g of byte i belongs to weight i of group g), nibbles."""
    _nibbles(b, y, memory, at=b.shape[1] - 128, run=32)
    if bits == 5:
        _add_high(y, b[:, None, 16:48], [[g] for g in range(8)], 1, memory)
    # sc and m of groups 0-3 are the low six bits of bytes 0-3 and 4-7. Those of groups 4-7 are a
    # nibble of bytes 8-11 under the two bits left over there.
    first, last = b[:, 4:12].reshape(-1, 2, 4), b[:, 12:16]
    low = np.stack([last & 15, last >> 4], axis=1)
    scales = np.concatenate([first & 63, low | (first >> 2 & 48)], axis=2).astype(np.float32)
    scales *= half(b[:, :4])[:, :, None]
    groups = y.reshape(-1, 8, 32)
    groups *= scales[:, 0, :, None]
    groups -= scales[:, 1, :, None]


def _q6_k(b: Bytes, y: Floats, memory: Memory) -> None:
    """d s (q - 32) for 16 groups of 16. Fields: nibbles, two high bits each, int8 s, d."""
    _nibbles(b, y, memory, at=0, run=64)
    _add_high(y, b[:, 128:192].reshape(-1, 2, 1, 32), [[0], [2], [4], [6]], 3, memory)
    y -= 32
    scales = half(b[:, 208:]) * b[:, 192:208].view(np.int8).astype(np.float32)
    groups = y.reshape(-1, 16, 16)
    groups *= scales[:, :, None]


def _iq4_nl(b: Bytes, y: Floats, memory: Memory) -> None:
    _nibbles(b, y, memory, at=2, run=16, levels=IQ4_LEVELS)
    y *= half(b[:, :2])


def _iq4_xs(b: Bytes, y: Floats, memory: Memory) -> None:
    """d (s - 32) level[q] for 8 groups of 32. Fields: d, high pairs of bits of s, low nibbles of s,
    nibbles q."""
    _nibbles(b, y, memory, at=8, run=16, levels=IQ4_LEVELS)
    high = b[:, 2:4].view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = b[:, 4:8].repeat(2, axis=1) >> np.array([0, 4] * 4, np.uint8) & 15
    scales = half(b[:, :2]) * ((low | high << 4).astype(np.float32) - 32)
    groups = y.reshape(-1, 8, 32)
    groups *= scales[:, :, None]


def _mxfp4(b: Bytes, y: Floats, memory: Memory) -> None:
    """2^(e - 128) level[q]: half an e8m0 scale, for the levels are doubled. Fields: e, nibbles."""
    _nibbles(b, y, memory, at=1, run=16, levels=FP4_LEVELS)
    y *= np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128)


def _by_gguf(b: Bytes, y: Floats, memory: Memory, *, name: str) -> None:
    """The other types, in pieces small enough for gguf's temporaries to stay small."""
    import gguf  # loaded only where a file has such a type

    try:
        qtype = gguf.GGMLQuantizationType(TYPES[name].ggml_id)
        step = 1536 // y.shape[1]
        for i in range(0, len(y), step):
            flat = gguf.quants.dequantize(b[i : i + step].reshape(1, -1), qtype)
            y[i : i + step] = flat.reshape(-1, y.shape[1])
    except (ValueError, NotImplementedError) as error:
        raise DTypeError(
            f"the installed gguf package cannot decode {name}: install a newer one"
        ) from error


BY_NAME: dict[str, Decoder] = {
    "f32": _f32,
    "f16": _f16,
    "bf16": _bf16,
    "q4_0": partial(_linear, bits=4, affine=False),
    "q4_1": partial(_linear, bits=4, affine=True),
    "q5_0": partial(_linear, bits=5, affine=False),
    "q5_1": partial(_linear, bits=5, affine=True),
    "q8_0": _q8_0,
    "q4_K": partial(_q45_k, bits=4),
    "q5_K": partial(_q45_k, bits=5),
    "q6_K": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "mxfp4": _mxfp4,
}
BY_GGUF = (
    "q2_K", "q3_K", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "tq1_0",
    "tq2_0", "nvfp4",
)  # fmt: skip
BY_NAME |= {name: partial(_by_gguf, name=name) for name in BY_GGUF}
