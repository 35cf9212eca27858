"""One group of a GGUF block: its codes, scale and minimum, for `repack`. Numba compiles these.

extract(block, group, codes, head): block and codes are addresses, `group` counts from 0 in the
block. It writes 32 bytes of codes. head is the address of 4 words, the entries of a form's `SCALES`
as integers: the first scale, the second scale or the minimum, and the two f16 of `supers`.
"""

from __future__ import annotations

from collections.abc import Callable

from pyggml.backends.cpu.native.memory import i8_at, inner, put_i8, put_i64, u8_at, u16_at

Extract = Callable[[int, int, int, int], None]


@inner
def _nibbles(field: int, codes: int) -> None:
    """16 bytes: the low halves first, then the high halves."""
    for i in range(16):
        byte = u8_at(field + i)
        put_i8(codes + i, byte & 15)
        put_i8(codes + 16 + i, byte >> 4)


@inner
def _fifth_bits(field: int, codes: int) -> None:
    """4 bytes: bit i is bit 4 of code i."""
    for i in range(32):
        bit = u8_at(field + i // 8) >> (i % 8) & 1
        put_i8(codes + i, u8_at(codes + i) | bit << 4)


@inner
def _half_byte(field: int, group: int, codes: int) -> None:
    """Two groups in 32 bytes: even groups in the low halves, odd ones in the high halves."""
    shift = group % 2 * 4
    for i in range(32):
        put_i8(codes + i, u8_at(field + group // 2 * 32 + i) >> shift & 15)


@inner
def q4_0(block: int, group: int, codes: int, head: int) -> None:
    put_i64(head, u16_at(block))
    _nibbles(block + 2, codes)


@inner
def q4_1(block: int, group: int, codes: int, head: int) -> None:
    put_i64(head, u16_at(block))
    put_i64(head + 8, u16_at(block + 2))
    _nibbles(block + 4, codes)


@inner
def q5_0(block: int, group: int, codes: int, head: int) -> None:
    put_i64(head, u16_at(block))
    _nibbles(block + 6, codes)
    _fifth_bits(block + 2, codes)


@inner
def q5_1(block: int, group: int, codes: int, head: int) -> None:
    put_i64(head, u16_at(block))
    put_i64(head + 8, u16_at(block + 2))
    _nibbles(block + 8, codes)
    _fifth_bits(block + 4, codes)


@inner
def q8_0(block: int, group: int, codes: int, head: int) -> None:
    put_i64(head, u16_at(block))
    for i in range(32):
        put_i8(codes + i, u8_at(block + 2 + i) ^ 128)


@inner
def mxfp4(block: int, group: int, codes: int, head: int) -> None:
    """The scale is 2^(e - 128); as bf16, subnormal below 2^-126."""
    exponent = u8_at(block) - 1
    if exponent > 0:
        put_i64(head, exponent << 7)
    else:
        put_i64(head, 64 >> -exponent)
    _nibbles(block + 1, codes)


@inner
def iq4_xs(block: int, group: int, codes: int, head: int) -> None:
    low = u8_at(block + 4 + group // 2) >> (group % 2 * 4) & 15
    high = u16_at(block + 2) >> (2 * group) & 3
    put_i64(head, (low | high << 4) - 32)
    put_i64(head + 16, u16_at(block))
    _nibbles(block + 8 + 16 * group, codes)


@inner
def _six_bits(block: int, group: int, head: int) -> None:
    """Scale and minimum of a group of q4_K and q5_K, and the two factors."""
    field = block + 4
    if group < 4:
        scale, minimum = u8_at(field + group) & 63, u8_at(field + group + 4) & 63
    else:
        last = u8_at(field + group + 4)
        scale = last & 15 | u8_at(field + group - 4) >> 6 << 4
        minimum = last >> 4 | u8_at(field + group) >> 6 << 4
    put_i64(head, scale)
    put_i64(head + 8, minimum)
    put_i64(head + 16, u16_at(block))
    put_i64(head + 24, u16_at(block + 2))


@inner
def q4_K(block: int, group: int, codes: int, head: int) -> None:
    _six_bits(block, group, head)
    _half_byte(block + 16, group, codes)


@inner
def q5_K(block: int, group: int, codes: int, head: int) -> None:
    _six_bits(block, group, head)
    _half_byte(block + 48, group, codes)
    for i in range(32):
        bit = u8_at(block + 16 + i) >> group & 1
        put_i8(codes + i, u8_at(codes + i) | bit << 4)


@inner
def q6_K(block: int, group: int, codes: int, head: int) -> None:
    """128 weights a half block: groups 0 and 1 in the low halves of 64 bytes, 2 and 3 in the high
    halves; two more bits of all four groups in 32 bytes."""
    half, part = group // 4, group % 4
    shift = part // 2 * 4
    for i in range(32):
        low = u8_at(block + half * 64 + part % 2 * 32 + i) >> shift & 15
        high = u8_at(block + 128 + half * 32 + i) >> (2 * part) & 3
        put_i8(codes + i, low | high << 4)
    put_i64(head, i8_at(block + 192 + 2 * group))
    put_i64(head + 8, i8_at(block + 193 + 2 * group))
    put_i64(head + 16, u16_at(block + 208))


@inner
def _pairs(field: int, group: int, codes: int) -> None:
    """Two bits: four groups in 32 bytes, low bits first."""
    for i in range(32):
        put_i8(codes + i, u8_at(field + group // 4 * 32 + i) >> (group % 4 * 2) & 3)


@inner
def q2_K(block: int, group: int, codes: int, head: int) -> None:
    put_i64(head, u8_at(block + 2 * group))
    put_i64(head + 8, u8_at(block + 2 * group + 1))
    put_i64(head + 16, u16_at(block + 80))
    put_i64(head + 24, u16_at(block + 82))
    _pairs(block + 16, group, codes)


@inner
def q3_K(block: int, group: int, codes: int, head: int) -> None:
    """The 16 scales have 6 bits: the low 4 in the halves of 8 bytes, the high 2 in 4 bytes."""
    for half in range(2):
        number = 2 * group + half
        low = u8_at(block + 96 + number % 8) >> (number // 8 * 4) & 15
        high = u8_at(block + 104 + number % 4) >> (number // 4 * 2) & 3
        put_i64(head + 8 * half, (low | high << 4) - 32)
    put_i64(head + 16, u16_at(block + 108))
    _pairs(block + 32, group, codes)
    for i in range(32):
        bit = u8_at(block + i) >> group & 1
        put_i8(codes + i, u8_at(codes + i) | bit << 2)


EXTRACT: dict[str, Extract] = {
    "q4_0": q4_0, "q4_1": q4_1, "q5_0": q5_0, "q5_1": q5_1, "q8_0": q8_0, "q2_K": q2_K,
    "q3_K": q3_K, "q4_K": q4_K, "q5_K": q5_K, "q6_K": q6_K, "iq4_nl": q4_0, "iq4_xs": iq4_xs,
    "mxfp4": mxfp4,
}  # fmt: skip
