"""From rows of GGUF blocks to tiles (see `host_tiles.py`), 16 rows by 16 rows, on all threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.host_tiles import FORMS, GROUP, ROWS
from pyggml.dtypes import TYPES


@cache
def repack(name: str) -> Native:
    """The kernel for a block type.

    source, row_bytes    rows of blocks, of all matrices in order
    target, tile_bytes   zeros; the lanes of rows past the end of a matrix stay zero
    m, tiles, matrices   rows and tiles of a matrix
    groups               in a row
    """
    return Native(f"repack_{name}", "iiiiiiii", lambda: _make(name))


def _make(name: str) -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import (
        fetch_add,
        i64_at,
        inner,
        put_i8,
        put_i16,
        stack,
        u8_at,
    )
    from pyggml.backends.cpu.weights.extract import EXTRACT

    form, dtype, extract = FORMS[name], TYPES[name], EXTRACT[name]
    per_block, block_bytes = dtype.block // GROUP, dtype.nbytes
    first_bits, second_bits = (*form.bits, 0)[:2]
    group_bytes, first_plane, second_plane = form.group, form.planes[0], form.planes[-1]
    scale_bytes, super_bytes = form.scales.nbytes, form.scales.super_
    halfwords = form.scale in ("half", "half_min", "bf16")
    buffer = stack(32 + 32)

    @inner
    def put(bits: int, shift: int, plane: int, row: int, codes: int) -> None:
        """The bits of 32 codes, shifted right, into a group of a plane of zeros."""
        for k in range(32):
            j, lane = k // 4, row * 4 + k % 4
            code = u8_at(codes + k) >> shift & ((1 << bits) - 1)
            if bits == 8:
                put_i8(plane + 64 * j + lane, code)
            elif bits == 4:
                at = plane + 64 * (j % 4) + lane
                put_i8(at, u8_at(at) | code << (j // 4 * 4))
            elif bits == 2:
                at = plane + 64 * (j // 4) + lane
                put_i8(at, u8_at(at) | code << (j % 4 * 2))
            else:
                at = plane + 8 * j + lane // 8
                put_i8(at, u8_at(at) | code << (lane % 8))

    def run(
        source: int, row_bytes: int, target: int, tile_bytes: int, m: int, tiles: int,
        matrices: int, groups: int, counter: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        codes = buffer()
        head = codes + 32
        while True:
            number = fetch_add(counter, 1)
            if number >= tiles * matrices:
                break
            matrix, first = number // tiles, number % tiles * ROWS
            tile = target + number * tile_bytes
            for row in range(min(ROWS, m - first)):
                blocks = source + (matrix * m + first + row) * row_bytes
                for group in range(groups):
                    inside = group % per_block
                    extract(blocks + group // per_block * block_bytes, inside, codes, head)
                    at = tile + group * group_bytes + (group // 8 + 1) * super_bytes
                    put(first_bits, 0, at + first_plane, row, codes)
                    if second_bits:
                        put(second_bits, first_bits, at + second_plane, row, codes)
                    if halfwords:
                        put_i16(at + 2 * row, i64_at(head))
                        if scale_bytes == 64:
                            put_i16(at + 32 + 2 * row, i64_at(head + 8))
                    else:
                        put_i8(at + row, i64_at(head))
                        if scale_bytes == 32:
                            put_i8(at + 16 + row, i64_at(head + 8))
                        if inside == 0:
                            above = at - super_bytes
                            put_i16(above + 2 * row, i64_at(head + 16))
                            if super_bytes == 64:
                                put_i16(above + 32 + 2 * row, i64_at(head + 24))

    return run
