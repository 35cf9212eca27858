"""The inner loops of the indexer; see indexer.py."""

from __future__ import annotations

from typing import Any

from pyggml.backends.cpu.decode import each_unit
from pyggml.backends.cpu.native.emit import (
    FLOATS,
    HALVES,
    I64,
    Emitter,
    Value,
    emits,
    f32,
)

_HEADS, _BLOCK = 4, 64
_HIDDEN = float("-inf")


@emits(None, I64, I64, I64, I64)
def add_heads(e: Emitter, sums: Any, products: Any, factors: Any, n_heads: Any) -> None:
    """sums[j] += factor[r] max(0, products[r][j]) for the first n_heads of 4 and 64 rows.

    NaN stays NaN.
    """
    places = range(0, 4 * _BLOCK, 64)
    totals = [e.variable(e.load(FLOATS, sums, place)) for place in places]
    for r in range(_HEADS):
        with e.when(e.b.icmp_signed("<", e.integer(r), n_heads)):
            factor = e.splat(e.load(f32, factors, 4 * r))
            for total, place in zip(totals, places):
                x = e.load(FLOATS, products, 4 * _BLOCK * r + place)
                x = e.b.select(e.b.fcmp_ordered("<", x, e.zero(FLOATS)), e.zero(FLOATS), x)
                total.set(e.fma(factor, x, total.get()))
    for total, place in zip(totals, places):
        e.store(total.get(), sums, place)


@emits(None, I64, I64)
def hide(e: Emitter, y: Any, n: Any) -> None:
    """y = -inf"""
    e.row(n, lambda row, offset: row.store(e.constant(FLOATS, _HIDDEN), y, offset))


@emits(None, I64, I64, I64, I64)
def put_scores(e: Emitter, y: Any, sums: Any, mask: Any, count: Any) -> None:
    """y = sums + mask, -inf where the mask hides; a mask at address 0 is absent."""

    def put(number: Value, left: Value | None) -> None:
        at = e.mul(number, 64)
        value = e.variable(e.load(FLOATS, e.add(sums, at)))
        with e.when(e.b.icmp_signed("!=", mask, e.integer(0))):
            place = e.add(mask, e.mul(number, 32))
            half = e.load(HALVES, place) if left is None else e.load_first(HALVES, place, left)
            bias = e.floats(half)
            hidden = e.constant(FLOATS, _HIDDEN)
            visible = e.b.fcmp_unordered("!=", bias, hidden)
            value.set(e.b.select(visible, e.b.fadd(value.get(), bias), hidden))
        if left is None:
            e.store(value.get(), e.add(y, at))
        else:
            e.store_first(value.get(), e.add(y, at), left)

    each_unit(e, "f32", count, put)
