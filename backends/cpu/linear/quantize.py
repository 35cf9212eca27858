"""Activations as groups of 8-bit integers with a scale, as in ggml's q8_0, with sums for weights
that have a zero point or a minimum. `columns.py` describes a group."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from pyggml.backends.cpu.linear.columns import X_BYTES, X_FLOAT_SUM, X_SCALE, X_SUM, X_SUM_HIGH
from pyggml.backends.cpu.native.compiler import Native
from pyggml.dtypes import TYPES

#: Groups that a thread takes at once.
SHARE = 64


@cache
def quantize(type_: str) -> Native:
    """Rows of this type [n3, n2, n1, k] to groups: out[row][group], rows in order.

    x, nb0, nb1, nb2, nb3   address and byte strides
    n1, n2, rows, groups    rows = n1 n2 n3, groups = k / 32
    """
    return Native(f"quantize_{type_}", "iiiiiiiiii", lambda: _make(type_))


def _make(type_: str) -> Callable[..., None]:
    from llvmlite import ir

    from pyggml.backends.cpu.native.emit import (
        FLOATS,
        I64,
        INTS,
        Emitter,
        emits,
        f32,
        i8,
    )
    from pyggml.backends.cpu.native.memory import put_f32, stack
    from pyggml.backends.cpu.native.vectors import element_at, load_floats

    size = TYPES[type_].nbytes
    buffer, read = stack(128), element_at(type_)

    @emits(None, I64, I64)
    def group_of(e: Emitter, x: Any, out: Any) -> None:
        _quantize_group(e, [load_floats(e, type_, x, i) for i in range(2)], out)

    @emits(None, I64, I64)
    def group_of_floats(e: Emitter, x: Any, out: Any) -> None:
        _quantize_group(e, [e.load(FLOATS, x, 64 * i) for i in range(2)], out)

    def _quantize_group(e: Emitter, x: list[Any], out: Any) -> None:
        largest = e.largest(e.maximum(e.absolute(x[0]), e.absolute(x[1])))
        # 0 x is NaN for infinity and NaN, and makes the scale NaN.
        unusual = e.total(e.b.fadd(*(e.b.fmul(v, e.zero(FLOATS)) for v in x)))
        d = e.b.fadd(e.b.fmul(largest, e.number(1 / 127)), unusual)
        positive = e.b.fcmp_ordered(">", largest, e.number(0.0))
        inverse = e.b.select(positive, e.b.fdiv(e.number(127.0), largest), e.number(0.0))
        sums = []
        for i, v in enumerate(x):
            q = e.b.fptosi(e.nearest(e.b.fmul(v, e.splat(inverse))), INTS)
            e.store(e.b.trunc(q, ir.VectorType(i8, 16)), out, 16 * i)
            sums.append(e.total_int(q))
        total = e.b.sitofp(e.b.add(*sums), f32)
        e.store(d, out, X_SCALE)
        e.store(sums[0], out, X_SUM)
        e.store(sums[1], out, X_SUM_HIGH)
        e.store(e.b.fmul(total, d), out, X_FLOAT_SUM)

    def run(
        out: int, x: int, nb0: int, nb1: int, nb2: int, nb3: int, n1: int, n2: int, rows: int,
        groups: int, counter: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        shares = (rows * groups + SHARE - 1) // SHARE
        first = shares * thread // threads * SHARE
        last = min(shares * (thread + 1) // threads * SHARE, rows * groups)
        for i in range(first, last):
            row, group = i // groups, i % groups
            outer = row // n1
            source = x + row % n1 * nb1 + outer % n2 * nb2 + outer // n2 * nb3 + group * 32 * nb0
            if nb0 == size:
                group_of(source, out + i * X_BYTES)
            else:
                values = buffer()
                for k in range(32):
                    put_f32(values + 4 * k, read(source + k * nb0))
                group_of_floats(values, out + i * X_BYTES)

    return run
