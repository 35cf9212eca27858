"""The inner loop of products with repacked weights in f32: 16 rows times a few f32 columns.

Weights are decoded in registers, a number of 16 rows at a time, and multiplied with that number of
every column. For a number of 16 rows that is two shifts, a conversion and a product with the
scale, so 8 columns spend two thirds of their time on the products.

The design that lost: tiles decoded into memory first. It saves decoding again for every 8 columns,
but a tile of rows of 4096 takes 256 KiB, and one column would write and read 8 times the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import Any

from pyggml.backends.cpu.linear.columns import FLOAT_BYTES
from pyggml.backends.cpu.linear.tile import codes_at, group_at, scales_at
from pyggml.backends.cpu.native.emit import (
    BYTES,
    FLOATS,
    I64,
    INTS,
    Emitter,
    Value,
    emits,
    f32,
    i64,
)
from pyggml.backends.host_tiles import Form


def product(form: Form, columns: int) -> Any:
    """See `inner.py`. `groups` and f32 columns."""
    chains = 4 if columns == 1 else 1  # one sum would wait for itself

    def build(
        e: Emitter, tile: Any, groups: Any, stride: Any, count: Any, xs: Any, sums: Any
    ) -> None:
        totals = [[e.variable(e.zero(FLOATS)) for _ in range(chains)] for _ in range(columns)]
        rows = [e.load(i64, xs, 8 * c) for c in range(columns)]
        with e.loop(groups) as number:
            at, supers = group_at(e, form, tile, number)
            offset = e.mul(number, FLOAT_BYTES)
            starts = [e.add(row, offset) for row in rows]
            for k, w in enumerate(weights(e, form, at, supers)):
                for x, parts in zip(starts, totals):
                    total = parts[k % chains]
                    total.set(e.fma(w, e.splat(e.load(f32, x, 4 * k)), total.get()))
        for c, parts in enumerate(totals):
            e.store(reduce(e.b.fadd, [part.get() for part in parts]), sums, 64 * c)

    return emits(None, I64, I64, I64, I64, I64, I64)(build)


def weights(e: Emitter, form: Form, at: Value, supers: Value) -> Iterator[Value]:
    """The 32 weights of a group, each of 16 rows, as `pyggml.quants` decodes them."""
    factors, minima = scales_at(e, form, at, supers)
    planes = [e.add(at, start) for start in form.planes]
    for j in range(8):
        half = j // 4 if len(factors) > 1 else 0
        codes = e.b.sub(codes_at(e, form, planes, j), e.constant(BYTES, form.zero))
        four = e.b.bitcast(codes, INTS)
        for i in range(4):
            high = e.b.shl(four, e.constant(INTS, 24 - 8 * i)) if i < 3 else four
            code = e.floats(e.b.ashr(high, e.constant(INTS, 24)))
            if minima:
                yield e.fma(code, factors[half], minima[half])
            else:
                yield e.b.fmul(code, factors[half])
