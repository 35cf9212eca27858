"""The inner loops of attention; see attention.py."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from pyggml.backends.cpu.native import maths
from pyggml.backends.cpu.native.emit import (
    F32,
    F64,
    FLOATS,
    HALVES,
    I64,
    INTS,
    Emitter,
    Row,
    Value,
    emits,
    f32,
    i16,
    i64,
)

SIZES = {"f32": 4, "f16": 2, "bf16": 2}
_ROWS, _BLOCK = 4, 64
_MINUS_INFINITY = float("-inf")


def _load(e: Emitter, type_: str, address: Value, count: Value | None) -> Value:
    """16 elements as floats, or the first `count` of them."""
    if type_ == "f32":
        return e.load(FLOATS, address) if count is None else e.load_first(FLOATS, address, count)
    if type_ == "f16":
        return e.floats(_halves(e, address, count))
    words = ir.VectorType(i16, 16)
    raw = e.load(words, address) if count is None else e.load_first(words, address, count)
    bits = e.b.shl(e.b.zext(raw, INTS), e.constant(INTS, 16))
    return e.b.bitcast(bits, FLOATS)


def _halves(e: Emitter, address: Value, count: Value | None) -> Value:
    """16 f16, or the first `count` of them."""
    return e.load(HALVES, address) if count is None else e.load_first(HALVES, address, count)


def scores(type_: str) -> Any:
    """scores(queries, k, k_row, count, d, out): out[row][key] for 4 rows and up to 4 keys.

    queries  address of a table with the addresses of 4 rows of f32
    out      the rows are 64 floats apart. All 4 keys are written; those past `count` repeat one
    """

    def build(e: Emitter, queries: Any, k: Any, k_row: Any, count: Any, d: Any, out: Any) -> None:
        rows = [e.load(i64, queries, 8 * r) for r in range(_ROWS)]
        keys = [k]
        for i in range(1, 4):
            inside = e.b.icmp_signed("<", e.integer(i), count)
            keys.append(e.b.select(inside, e.add(keys[-1], k_row), keys[-1]))
        sums = [e.variable(e.zero(FLOATS)) for _ in range(4 * _ROWS)]

        def add(number: Value, left: Value | None) -> None:
            offset = e.mul(number, 16)
            xs = [_load(e, "f32", e.add(row, e.mul(offset, 4)), left) for row in rows]
            for i, key in enumerate(keys):
                y = _load(e, type_, e.add(key, e.mul(offset, SIZES[type_])), left)
                for r, x in enumerate(xs):
                    total = sums[4 * r + i]
                    total.set(e.fma(x, y, total.get()))

        _each(e, d, add)
        totals = e.totals([s.get() for s in sums])
        for r in range(_ROWS):
            e.store(e.shuffle(totals, totals, range(4 * r, 4 * r + 4)), out, 4 * _BLOCK * r)

    return emits(None, I64, I64, I64, I64, I64, I64)(build)


def _each(e: Emitter, n: Value, body: Any) -> None:
    """body(number of a vector, None) for whole vectors of n elements, then (.., the rest)."""
    whole, rest = e.b.lshr(n, e.integer(4)), e.b.and_(n, e.integer(15))
    with e.loop(whole) as number:
        body(number, None)
    with e.when(e.b.icmp_signed(">", rest, e.integer(0))):
        body(whole, rest)


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

        _each(e, count, look)
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
            value = e.variable(e.b.fmul(_load(e, "f32", at, left), factor))
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

        _each(e, count, score)
        largest = e.largest(top.get())
        e.store(largest, stats)
        total = e.variable(e.zero(FLOATS))

        def weigh(number: Value, left: Value | None) -> None:
            at = e.add(x, e.mul(number, 64))
            weight = maths.exp(e, e.b.fsub(_load(e, "f32", at, left), e.splat(largest)))
            if left is None:
                e.store(weight, at)
            else:
                weight = e.b.select(e.first(left), weight, e.zero(FLOATS))
                e.store_first(weight, at, left)
            total.set(e.b.fadd(total.get(), weight))

        _each(e, count, weigh)
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


def values(type_: str) -> Any:
    """values(weights, v, v_row, count, d, sums, n_rows): add weighted rows of V.

    weights  [row][64]
    sums     address of a table: for each row the address of two numbers and d sums. Where there are
             fewer than 4 rows, the last is there again, with the same weights or others; only the
             first n_rows are written
    """

    def build(
        e: Emitter, weights: Any, v: Any, v_row: Any, count: Any, d: Any, sums: Any, n_rows: Any
    ) -> None:
        targets = [e.add(e.load(i64, sums, 8 * r), 8) for r in range(_ROWS)]

        def columns(at: Value, width: int, left: Value | None) -> None:
            """Columns `at` to at + 16 width, or `left` of them."""
            totals = []
            for r in range(_ROWS):
                for i in range(width):
                    place = e.add(targets[r], e.mul(at, 4), 64 * i)
                    totals.append(e.variable(_load(e, "f32", place, left)))
            with e.loop(count) as key:
                row = e.add(v, e.b.mul(key, v_row), e.mul(at, SIZES[type_]))
                ys = [
                    _load(e, type_, e.add(row, 16 * SIZES[type_] * i), left) for i in range(width)
                ]
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
        narrow = e.b.and_(e.b.lshr(d, e.integer(4)), e.integer(3))
        with e.loop(narrow) as number:
            columns(e.add(e.mul(wide, 64), e.mul(number, 16)), 1, None)
        rest = e.b.and_(d, e.integer(15))
        with e.when(e.b.icmp_signed(">", rest, e.integer(0))):
            columns(e.b.sub(d, rest), 1, rest)

    return emits(None, I64, I64, I64, I64, I64, I64, I64)(build)


@emits(None, I64, I64)
def clear(e: Emitter, x: Any, n: Any) -> None:
    e.row(n, lambda row, offset: row.store(e.zero(FLOATS), x, offset))


@emits(None, I64, I64, I64)
def copy(e: Emitter, out: Any, x: Any, n: Any) -> None:
    e.row(n, lambda row, offset: row.store(row.load(x, offset), out, offset))


@emits(None, I64, I64, F32)
def rescale(e: Emitter, x: Any, n: Any, factor: Any) -> None:
    """x *= factor"""

    def put(row: Row, offset: Value) -> None:
        row.store(e.b.fmul(row.load(x, offset), e.splat(factor)), x, offset)

    e.row(n, put)


@emits(None, I64, I64, I64, F64)
def add_scaled(e: Emitter, out: Any, x: Any, n: Any, factor: Any) -> None:
    """out += factor x"""
    scale = e.splat(e.b.fptrunc(factor, f32))

    def put(row: Row, offset: Value) -> None:
        row.store(e.fma(row.load(x, offset), scale, row.load(out, offset)), out, offset)

    e.row(n, put)
