"""Blocks to f32. Decoders do gguf's f32 operations in gguf's order, so results are bit-equal.

A decoder is a function `fn(b, y, memory)`: b is uint8 [n, bytes of a block] (for plain types [n, 1]
of the type), y is f32 [n, weights of a block], both contiguous. It unpacks integer codes into y
(exact in f32), then scales y in place. Layouts are ggml's: for each run of bytes, a field of 4-bit
codes has first the weights in the low halves, then those in the high halves. Bits above the fourth
have a field of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
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
    """Move the bits into place and rescale: twice as fast as NumPy's conversion.

    An f16 shifted left by 13 is an f32 whose exponent is 112 too low, subnormals included. Only inf
    and NaN come out wrong, as finite numbers of at least 2^16; NumPy converts such pieces.
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
    """y = the 4-bit codes (or their levels) starting at byte `at` of a block, in runs of `run`."""
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
    # Without mode="clip" NumPy buffers the result.
    np.take(pair_table(levels), index, out=pairs, mode="clip")
    y[...] = pairs.view(np.float32)


def _bits(field: Bytes, shifts: Any, mask: int, memory: Memory) -> Bytes:
    """field >> shifts & mask, with field and shifts broadcast."""
    shifts = np.array(shifts, np.uint8)
    shape = np.broadcast_shapes(field.shape, shifts.shape)
    codes = memory.rest().array(shape, np.uint8)
    np.right_shift(field, shifts, out=codes)
    codes &= mask
    return codes


def _add_high(y: Floats, field: Bytes, shifts: Any, mask: int, memory: Memory) -> None:
    """y += 16 * (field >> shifts & mask): the bits above the fourth."""
    codes = _bits(field, shifts, mask, memory)
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
    # sc and m of groups 0-3 are the low six bits of bytes 0-3 and 4-7. Groups 4-7 take their low
    # four bits from a nibble of bytes 8-11, and their high two bits from the top of bytes 0-7.
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
    """2^(e - 128) level[q]: half an e8m0 scale, as the levels are doubled. Fields: e, nibbles."""
    _nibbles(b, y, memory, at=1, run=16, levels=FP4_LEVELS)
    y *= np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128)


def _nvfp4(b: Bytes, y: Floats, memory: Memory) -> None:
    """s level[q] for 4 groups of 16, the levels doubled and s halved. Fields: s, nibbles."""
    _nibbles(b, y, memory, at=4, run=8, levels=FP4_LEVELS)
    groups = y.reshape(-1, 4, 16)
    groups *= _half_ue4m3()[b[:, :4, None]]


@cache
def _half_ue4m3() -> Floats:
    """A table from a byte to half its unsigned e4m3 scale (bias 7, no infinity).

    As in gguf: the top bit is ignored, 0x7F is 0, but 0xFF is 480.
    """
    exponent, mantissa = np.divmod(np.arange(256) & 127, 8)
    scales = np.where(exponent == 0, mantissa / 8, 1 + mantissa / 8) * 2.0 ** (
        np.maximum(exponent, 1) - 8
    )
    scales[0x7F] = 0
    return scales.astype(np.float32)


def _q1_0(b: Bytes, y: Floats, memory: Memory) -> None:
    """d where a bit is set, else -d. Fields: d, bits."""
    y[...] = _bits(b[:, 2:, None], range(8), 1, memory).reshape(y.shape)
    y *= 2
    y -= 1
    y *= half(b[:, :2])


def _pairs(b: Bytes, y: Floats, memory: Memory, *, at: int) -> None:
    """y = 256 two-bit codes starting at byte `at` of a block: runs of 32 bytes, low bits first."""
    field = b[:, at : at + 64].reshape(-1, 2, 1, 32)
    y[...] = _bits(field, [[0], [2], [4], [6]], 3, memory).reshape(y.shape)


def _q2_k(b: Bytes, y: Floats, memory: Memory) -> None:
    """d sc q - dmin m for 16 groups of 16. Fields: nibbles (sc low, m high), codes, d, dmin."""
    _pairs(b, y, memory, at=16)
    groups, pairs = y.reshape(-1, 16, 16), half(b[:, 80:])
    groups *= ((b[:, :16] & 15) * pairs[:, :1])[:, :, None]
    groups -= ((b[:, :16] >> 4) * pairs[:, 1:])[:, :, None]


def _q3_k(b: Bytes, y: Floats, memory: Memory) -> None:
    """d (s - 32) q for 16 groups of 16; q is a code, minus 4 if its high bit is not set. Fields:
    high bits (bit g of byte i belongs to weight i of group g of 32), codes, s (low nibbles, then
    pairs of high bits), d."""
    _pairs(b, y, memory, at=32)
    y -= 4
    bits = _bits(b[:, None, :32], [[g] for g in range(8)], 1, memory)
    bits <<= 2
    y += bits.reshape(y.shape)
    low = np.stack([b[:, 96:104] & 15, b[:, 96:104] >> 4], axis=1).reshape(-1, 16)
    high = (b[:, None, 104:108] >> np.array([[0], [2], [4], [6]], np.uint8) & 3).reshape(-1, 16)
    scales = half(b[:, 108:]) * ((low | high << 4).astype(np.float32) - 32)
    groups = y.reshape(-1, 16, 16)
    groups *= scales[:, :, None]


def _tq2_0(b: Bytes, y: Floats, memory: Memory) -> None:
    """d (q - 1). Fields: codes, d."""
    _pairs(b, y, memory, at=0)
    y -= 1
    y *= half(b[:, 64:])


def _tq1_0(b: Bytes, y: Floats, memory: Memory) -> None:
    """d (q - 1), where q is a base-3 digit. A byte / 256 is a fraction with five base-3 digits, or
    four in the last four bytes. Fields: runs of 32, 16 and 4 bytes, d. A run gives the first digits
    of all its bytes, then the second digits, and so on.
    """
    done = 0
    for start, stop, n_digits in ((0, 32, 5), (32, 48, 5), (48, 52, 4)):
        temporary, powers = memory.rest(), np.array([3**i for i in range(n_digits)], np.uint8)
        # The fraction without its first i digits, for each i.
        tails = temporary.array((len(b), n_digits, stop - start), np.uint8)
        np.multiply(b[:, None, start:stop], powers[:, None], out=tails)  # modulo 256
        digits = temporary.array(tails.shape, np.uint16)
        np.multiply(tails, 3, out=digits, dtype=np.uint16)
        digits >>= 8
        n = (stop - start) * n_digits
        y[:, done : done + n] = digits.reshape(len(b), n)
        done += n
    y -= 1
    y *= half(b[:, 52:])


def _by_gguf(b: Bytes, y: Floats, memory: Memory, *, name: str) -> None:
    """Decode the types whose codes index grids; the gguf package has the grids, pyggml does not.

    Pieces are small, so that gguf's temporaries are small too.
    """
    import gguf  # slow to import, and most files have no such type

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


BY_GGUF = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")
BY_NAME: dict[str, Decoder] = {
    "f32": _f32,
    "f16": _f16,
    "bf16": _bf16,
    "q1_0": _q1_0,
    "q4_0": partial(_linear, bits=4, affine=False),
    "q4_1": partial(_linear, bits=4, affine=True),
    "q5_0": partial(_linear, bits=5, affine=False),
    "q5_1": partial(_linear, bits=5, affine=True),
    "q8_0": _q8_0,
    "q2_K": _q2_k,
    "q3_K": _q3_k,
    "q4_K": partial(_q45_k, bits=4),
    "q5_K": partial(_q45_k, bits=5),
    "q6_K": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "tq1_0": _tq1_0,
    "tq2_0": _tq2_0,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    **{name: partial(_by_gguf, name=name) for name in BY_GGUF},
}
