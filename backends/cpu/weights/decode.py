"""Rows of weights in tiles as f32, one number at a time: for the few rows that get_rows takes."""

from __future__ import annotations

from typing import Any

from pyggml.backends.host_tiles import FORMS


def decode_row(name: str) -> Any:
    """decode(tile, row, groups, out): f32 [32 groups], row 0 to 15 of a tile.

    The f32 operations are those of `pyggml.quants`, so results are bit-equal.
    """
    import numpy as np

    from pyggml.backends.cpu.native.memory import (
        bf16_at,
        f16_at,
        i8_at,
        inner,
        put_f32,
        u8_at,
    )

    form = FORMS[name]
    scales, zero = form.scales, form.zero
    first_bits, second_bits = (*form.bits, 0)[:2]
    group_bytes, first_plane, second_plane = form.group, form.planes[0], form.planes[-1]
    levels = form.levels or tuple(range(16))
    scale_kind, scale_bytes, super_bytes = form.scale, scales.nbytes, scales.super_
    minimum, has_levels, per_half = scales.minimum, form.levels is not None, scales.halves

    @inner
    def code_at(bits: int, plane: int, row: int, k: int) -> Any:
        j, lane = k // 4, row * 4 + k % 4
        if bits == 8:
            return u8_at(plane + 64 * j + lane)
        if bits == 4:
            return u8_at(plane + 64 * (j % 4) + lane) >> (j // 4 * 4) & 15
        if bits == 2:
            return u8_at(plane + 64 * (j // 4) + lane) >> (j % 4 * 2) & 3
        return u8_at(plane + 8 * j + lane // 8) >> (lane % 8) & 1

    @inner
    def scale_at(at: int, above: int, row: int, half: int) -> Any:
        """The scale, and what is added to the product."""
        if scale_kind == "half" or scale_kind == "half_min":
            return f16_at(at + 2 * row), f16_at(at + scale_bytes - 32 + 2 * row)
        if scale_kind == "bf16":
            return bf16_at(at + 2 * row), bf16_at(at + 2 * row)
        d, m = f16_at(above + 2 * row), f16_at(above + super_bytes - 32 + 2 * row)
        if scale_kind == "byte" or scale_kind == "bytes":
            return d * np.float32(i8_at(at + 16 * half + row)), d
        if scale_kind == "byte_min":
            return d * np.float32(u8_at(at + row)), -(m * np.float32(u8_at(at + 16 + row)))
        pair = u8_at(at + 16 * half + row)
        return d * np.float32(pair & 15), -(m * np.float32(pair >> 4))

    @inner
    def decode(tile: int, row: int, groups: int, out: int) -> None:
        for group in range(groups):
            at = tile + group * group_bytes + (group // 8 + 1) * super_bytes
            above = tile + group // 8 * (8 * group_bytes + super_bytes)
            for half in range(2):
                scale, plus = scale_at(at, above, row, half if per_half else 0)
                for k in range(16 * half, 16 * half + 16):
                    code = code_at(first_bits, at + first_plane, row, k)
                    if second_bits:
                        code |= code_at(second_bits, at + second_plane, row, k) << first_bits
                    if has_levels:
                        code = levels[code]
                    value = scale * np.float32(code - zero)
                    if minimum:
                        value = value + plus
                    put_f32(out + 4 * (32 * group + k), value)

    return decode
