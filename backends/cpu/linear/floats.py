"""The inner loops of products with f32, f16 and bf16 matrices, which may be weights, states or
results: 16 rows times a few f32 columns. Nothing is repacked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyggml.backends.cpu.native.emit import FLOATS, I64, Emitter, Value, emits, f32, i64
from pyggml.backends.cpu.native.vectors import load_floats
from pyggml.dtypes import TYPES as DTYPES

TYPES = ("f32", "f16", "bf16")
_ROWS = 4


def rows(type_: str, columns: int) -> Any:
    """See `inner.py`. The elements of a row are adjacent: sums run along 4 rows and all columns at
    once, and their lanes are added at the end."""
    size = DTYPES[type_].nbytes

    def build(e: Emitter, at: Any, k: Any, stride: Any, count: Any, xs: Any, sums: Any) -> None:
        starts = [e.load(i64, xs, 8 * c) for c in range(columns)]
        blocks = e.b.lshr(e.add(count, _ROWS - 1), e.integer(2))
        with e.loop(blocks) as block:
            first = e.mul(block, _ROWS)
            addresses = [e.add(at, e.mul(first, stride))]
            for i in range(1, _ROWS):  # the last row again where there are fewer
                there = e.b.icmp_signed("<", e.add(first, i), count)
                before = addresses[-1]
                addresses.append(e.b.select(there, e.add(before, stride), before))
            totals = [[e.variable(e.zero(FLOATS)) for _ in range(_ROWS)] for _ in range(columns)]

            def add(number: Value, left: Value | None) -> None:
                ws = [
                    load_floats(e, type_, e.add(row, e.mul(number, 16 * size)), left=left)
                    for row in addresses
                ]
                for start, parts in zip(starts, totals):
                    x = load_floats(e, "f32", e.add(start, e.mul(number, 64)), left=left)
                    for w, part in zip(ws, parts):
                        part.set(e.fma(w, x, part.get()))

            _each(e, k, add)
            values = [part.get() for parts in totals for part in parts]
            values += [e.zero(FLOATS)] * (16 - len(values))
            lanes = e.totals(values)
            out = e.add(sums, e.mul(first, 4))
            for c in range(columns):
                e.store(e.shuffle(lanes, lanes, range(4 * c, 4 * c + 4)), out, 64 * c)

    return emits(None, I64, I64, I64, I64, I64, I64)(build)


def _each(e: Emitter, n: Value, body: Callable[[Value, Value | None], None]) -> None:
    """body(number of a vector, None) for whole vectors of n elements, then (.., the rest)."""
    whole, rest = e.b.lshr(n, e.integer(4)), e.b.and_(n, e.integer(15))
    with e.loop(whole) as number:
        body(number, None)
    with e.when(e.b.icmp_signed(">", rest, e.integer(0))):
        body(whole, rest)


def lanes(type_: str, columns: int) -> Any:
    """See `inner.py`. The elements of a column are adjacent: the 16 rows are lanes."""
    turns = 4 if columns == 1 else 1  # one sum would wait for itself

    def build(e: Emitter, at: Any, k: Any, stride: Any, count: Any, xs: Any, sums: Any) -> None:
        starts = [e.load(i64, xs, 8 * c) for c in range(columns)]
        totals = [[e.variable(e.zero(FLOATS)) for _ in range(turns)] for _ in range(columns)]

        def add(element: Value, turn: int, left: Value | None) -> None:
            w = load_floats(e, type_, e.add(at, e.mul(element, stride)), left=left)
            for start, parts in zip(starts, totals):
                x = e.splat(e.load(f32, e.add(start, e.mul(element, 4))))
                parts[turn].set(e.fma(w, x, parts[turn].get()))

        def walk(left: Value | None) -> None:
            whole = e.b.udiv(k, e.integer(turns))
            with e.loop(whole) as number:
                for turn in range(turns):
                    add(e.add(e.mul(number, turns), turn), turn, left)
            done = e.mul(whole, turns)
            with e.loop(e.b.sub(k, done)) as number:
                add(e.add(done, number), 0, left)

        with e.b.if_else(e.b.icmp_signed("==", count, e.integer(16))) as (then, otherwise):
            with then:
                walk(None)
            with otherwise:
                walk(count)
        for c, parts in enumerate(totals):
            total = parts[0].get()
            for part in parts[1:]:
                total = e.b.fadd(total, part.get())
            e.store(total, sums, 64 * c)

    return emits(None, I64, I64, I64, I64, I64, I64)(build)
