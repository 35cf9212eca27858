"""The inner loops of attention; see attention.py."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from pyggml.backends.cpu.decode import each_unit, unit, unit_of
from pyggml.backends.cpu.native import maths
from pyggml.backends.cpu.native.emit import (
    F32,
    F64,
    FLOATS,
    HALVES,
    I64,
    Emitter,
    Value,
    emits,
    f32,
    i16,
    i64,
)
from pyggml.backends.cpu.row_loops import copy as copy  # linear/floats.py finds it here

_ROWS, _BLOCK = 4, 64
_MINUS_INFINITY = float("-inf")


def _floats(e: Emitter, address: Value, count: Value | None) -> Value:
    """16 f32, or the first `count` of them."""
    return e.load(FLOATS, address) if count is None else e.load_first(FLOATS, address, count)


def _halves(e: Emitter, address: Value, count: Value | None) -> Value:
    """16 f16, or the first `count` of them."""
    return e.load(HALVES, address) if count is None else e.load_first(HALVES, address, count)


def scores(type_: str, *, listed: bool = False) -> Any:
    """scores(queries, k, k_row, count, d, out): out[row][key] for 4 rows and up to 4 keys.

    queries  address of a table with the addresses of 4 rows of f32
    listed   whether k is the address of a table with the addresses of the keys
    out      the rows are 64 floats apart. All 4 keys are written; those past `count` repeat one
    """

    def build(e: Emitter, queries: Any, k: Any, k_row: Any, count: Any, d: Any, out: Any) -> None:
        rows = [e.load(i64, queries, 8 * r) for r in range(_ROWS)]
        keys = [e.load(i64, k) if listed else k]
        for i in range(1, 4):
            inside = e.b.icmp_signed("<", e.integer(i), count)
            step = e.b.select(inside, e.integer(8 * i), e.integer(0))
            after = e.load(i64, e.add(k, step)) if listed else e.add(keys[-1], k_row)
            keys.append(e.b.select(inside, after, keys[-1]))
        sums = [e.variable(e.zero(FLOATS)) for _ in range(4 * _ROWS)]
        size, nbytes = unit_of(type_)

        def add(number: Value, left: Value | None) -> None:
            at, offset = e.mul(number, 4 * size), e.mul(number, nbytes)
            xs = [
                [_floats(e, e.add(row, at, 64 * j), left) for row in rows]
                for j in range(size // 16)
            ]
            for i, key in enumerate(keys):
                for x_rows, y in zip(xs, unit(e, type_, e.add(key, offset), left)):
                    for r, x in enumerate(x_rows):
                        total = sums[4 * r + i]
                        total.set(e.fma(x, y, total.get()))

        each_unit(e, type_, d, add)
        totals = e.totals([s.get() for s in sums])
        for r in range(_ROWS):
            e.store(e.shuffle(totals, totals, range(4 * r, 4 * r + 4)), out, 4 * _BLOCK * r)

    return emits(None, I64, I64, I64, I64, I64, I64)(build)


@emits(I64, I64, I64, I64, I64)
def seen(e: Emitter, masks: Any, n_rows: Any, first: Any, count: Any) -> Any:
    """1 if a row sees one of `count` keys from `first` on, else 0.

    masks  address of a table with the address of each row's f16 mask
    """
    found = e.variable(e.integer(0))
    with e.loop(n_rows) as r:
        row = e.add(e.load(i64, e.add(masks, e.mul(r, 8))), e.mul(first, 2))

        def look(number: Value, left: Value | None) -> None:
            at = e.add(row, e.mul(number, 32))
            values = _halves(e, at, left)
            visible = _not_hidden(e, values)
            if left is not None:
                visible = e.b.and_(visible, e.first(left))
            bits = e.b.zext(e.b.bitcast(visible, i16), i64)
            found.set(e.b.or_(found.get(), bits))

        each_unit(e, "f32", count, look)
    return e.b.zext(e.b.icmp_signed("!=", found.get(), e.integer(0)), i64)


def _not_hidden(e: Emitter, mask: Value) -> Value:
    """Which of 16 f16 numbers are not -inf."""
    words = ir.VectorType(i16, 16)
    return e.b.icmp_signed("!=", e.b.bitcast(mask, words), e.constant(words, 0xFC00 - 0x10000))


def soften(*, hides: bool) -> Any:
    """soften(x, count, mask, scale, slope, cap, stats): replace `count` scores by weights, update
    (largest score, sum of weights) at `stats`, and return the factor for what was summed before.

    hides  whether a mask of -inf hides a score that is NaN too
    """

    def build(
        e: Emitter, x: Any, count: Any, mask: Any, scale: Any, slope: Any, cap: Any, stats: Any
    ) -> Any:
        factor = e.splat(e.b.fptrunc(scale, f32))
        tilt, limit = e.splat(e.b.fptrunc(slope, f32)), e.splat(e.b.fptrunc(cap, f32))
        capped = e.b.fcmp_ordered(">", cap, ir.Constant(cap.type, 0.0))
        hidden = e.constant(FLOATS, _MINUS_INFINITY)
        old = e.load(f32, stats)
        top = e.variable(e.splat(old))

        def score(number: Value, left: Value | None) -> None:
            at = e.add(x, e.mul(number, 64))
            value = e.variable(e.b.fmul(_floats(e, at, left), factor))
            with e.when(capped):
                value.set(e.b.fmul(_tanh(e, e.b.fdiv(value.get(), limit)), limit))
            with e.when(e.b.icmp_signed("!=", mask, e.integer(0))):
                at_mask = e.add(mask, e.mul(number, 32))
                bias = (
                    e.load(HALVES, at_mask) if left is None else e.load_first(HALVES, at_mask, left)
                )
                biased = e.fma(e.floats(bias), tilt, value.get())
                if hides:
                    biased = e.b.select(_not_hidden(e, bias), biased, hidden)
                value.set(biased)
            result = value.get()
            if left is not None:
                result = e.b.select(e.first(left), result, hidden)
                e.store_first(result, at, left)
            else:
                e.store(result, at)
            top.set(e.maximum(top.get(), result))

        each_unit(e, "f32", count, score)
        largest = e.largest(top.get())
        e.store(largest, stats)
        total = e.variable(e.zero(FLOATS))

        def weigh(number: Value, left: Value | None) -> None:
            at = e.add(x, e.mul(number, 64))
            weight = maths.exp(e, e.b.fsub(_floats(e, at, left), e.splat(largest)))
            if left is None:
                e.store(weight, at)
            else:
                weight = e.b.select(e.first(left), weight, e.zero(FLOATS))
                e.store_first(weight, at, left)
            total.set(e.b.fadd(total.get(), weight))

        each_unit(e, "f32", count, weigh)
        shrink = maths.exp(e, e.splat(e.b.fsub(old, largest)))
        shrink = e.b.extract_element(shrink, ir.Constant(ir.IntType(32), 0))
        shrink = e.b.select(e.b.fcmp_ordered("==", old, largest), e.number(1.0), shrink)
        before = e.load(f32, stats, 4)
        e.store(e.fma(before, shrink, e.total(total.get())), stats, 4)
        return shrink

    return emits(F32, I64, I64, I64, F64, F64, F64, I64)(build)


def _tanh(e: Emitter, x: Value) -> Value:
    one = e.constant(FLOATS, 1.0)
    twice = maths.exp(e, e.b.fadd(x, x))
    return e.b.fsub(one, e.b.fdiv(e.constant(FLOATS, 2.0), e.b.fadd(twice, one)))


def values(type_: str, *, listed: bool = False) -> Any:
    """values(weights, v, v_row, count, d, sums, n_rows): add weighted rows of V.

    listed   whether v is the address of a table with the addresses of the rows

    weights  [row][64]
    sums     address of a table: for each row the address of two numbers and d sums. Where there are
             fewer than 4 rows, the last is there again, with the same weights or others; only the
             first n_rows are written
    """

    def build(
        e: Emitter, weights: Any, v: Any, v_row: Any, count: Any, d: Any, sums: Any, n_rows: Any
    ) -> None:
        targets = [e.add(e.load(i64, sums, 8 * r), 8) for r in range(_ROWS)]
        size, nbytes = unit_of(type_)
        log = e.integer(size.bit_length() - 1)

        def columns(at: Value, width: int, left: Value | None) -> None:
            """Columns `at` to at + 16 width, or `left` of them."""
            totals = []
            for r in range(_ROWS):
                for i in range(width):
                    place = e.add(targets[r], e.mul(at, 4), 64 * i)
                    totals.append(e.variable(_floats(e, place, left)))
            with e.loop(count) as key:
                if listed:
                    first = e.load(i64, e.add(v, e.mul(key, 8)))
                else:
                    first = e.add(v, e.b.mul(key, v_row))
                row = e.add(first, e.mul(e.b.lshr(at, log), nbytes))
                ys = [
                    y for i in range(16 * width // size)
                    for y in unit(e, type_, e.add(row, nbytes * i), left)
                ]  # fmt: skip
                for r in range(_ROWS):
                    place = e.add(weights, e.mul(key, 4), 4 * _BLOCK * r)
                    weight = e.splat(e.load(f32, place))
                    used = e.b.fcmp_unordered("!=", weight, e.zero(FLOATS))
                    for i, y in enumerate(ys):
                        total = totals[width * r + i]
                        added = e.fma(weight, y, total.get())
                        total.set(e.b.select(used, added, total.get()))
            for r in range(_ROWS):
                with e.when(e.b.icmp_signed("<", e.integer(r), n_rows)):
                    for i in range(width):
                        place = e.add(targets[r], e.mul(at, 4), 64 * i)
                        value = totals[width * r + i].get()
                        if left is None:
                            e.store(value, place)
                        else:
                            e.store_first(value, place, left)

        wide = e.b.lshr(d, e.integer(6))
        with e.loop(wide) as number:
            columns(e.mul(number, 64), 4, None)
        narrow = e.b.lshr(e.b.and_(d, e.integer(63)), log)
        with e.loop(narrow) as number:
            columns(e.add(e.mul(wide, 64), e.mul(number, size)), size // 16, None)
        if size == 16:  # rows of blocks are whole
            rest = e.b.and_(d, e.integer(15))
            with e.when(e.b.icmp_signed(">", rest, e.integer(0))):
                columns(e.b.sub(d, rest), 1, rest)

    return emits(None, I64, I64, I64, I64, I64, I64, I64)(build)
