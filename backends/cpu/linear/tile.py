"""The inner loop of all products with repacked weights: 16 rows times a few columns.

For each group of 32 weights the codes are unpacked once, then multiplied with the group of every
column by integer dot products. The sums of a group become floats and are scaled and added there, so
no integer overflows and any type's scales fit in.

Columns are activations as in `columns.py`.

Work for 512 weights and one column with VNNI: 4 loads of codes, 8 masks and shifts, 8 dot
products, 4 instructions to scale. That is 4 times what memory can deliver, so one column is
limited by memory and prompts by the dot products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from llvmlite import ir

from pyggml.backends.cpu.linear.columns import X_BYTES, X_FLOAT_SUM, X_SCALE, X_SUM, X_SUM_HIGH
from pyggml.backends.cpu.native.emit import (
    BYTES,
    FLOATS,
    HALVES,
    I64,
    INTS,
    Emitter,
    Value,
    emits,
    f32,
    i8,
    i16,
    i32,
    i64,
)
from pyggml.backends.host_tiles import Form

#: Integer sums to have at once. Each dot product waits 4 cycles for the one before it, and a
#: processor looks ahead less than two groups; with one sum, a column takes 1.6 times as long.
CHAINS = 4


#: Bytes ahead of the codes in use to fetch. The processor's own prefetch stops at every 4 KiB, and
#: without this one thread reads at 75 % of the bandwidth that it can reach. With 4096 q6_K reads at
#: 0.7 of the speed and iq4_nl at 0.85; 16384 measures the same.
AHEAD = 8192


def product(form: Form, columns: int) -> Any:
    """See `inner.py`. `groups` and columns as in `columns.py`."""

    def build(
        e: Emitter, tile: Any, groups: Any, stride: Any, count: Any, xs: Any, sums: Any
    ) -> None:
        totals = [e.variable(e.zero(FLOATS)) for _ in range(columns)]
        rows = [e.load(i64, xs, 8 * c) for c in range(columns)]
        with e.loop(groups) as number:
            at, factors = group_at(e, form, tile, number)
            if columns == 1:
                for line in range(0, form.group, 64):
                    e.prefetch(at, AHEAD + line)
            offset = e.mul(number, X_BYTES)
            _group(e, form, at, factors, [e.add(row, offset) for row in rows], totals)
        for c, total in enumerate(totals):
            e.store(total.get(), sums, 64 * c)

    return emits(None, I64, I64, I64, I64, I64, I64)(build)


def group_at(e: Emitter, form: Form, tile: Value, number: Value) -> tuple[Value, Value]:
    """The addresses of a group of a tile, and of the factors of its scales."""
    at = e.add(tile, e.mul(number, form.group))
    if not form.scales.super_:
        return at, at
    eighth = e.b.lshr(number, e.integer(3))
    factors = e.add(tile, e.mul(eighth, 8 * form.group + form.scales.super_))
    return e.add(at, e.mul(eighth, form.scales.super_), form.scales.super_), factors


def _group(
    e: Emitter,
    form: Form,
    at: Value,
    supers: Value,
    xs: Sequence[Value],
    totals: Sequence[Any],
) -> None:
    """Add one group of weights times one group of every column."""
    halves = form.scales.halves
    factors, minima = scales_at(e, form, at, supers)
    codes = [e.add(at, start) for start in form.planes]
    parts = []  # by half: float sums of each column, not yet scaled by x
    chains = max(1, CHAINS // len(xs))
    for half in range(2 if halves else 1):
        ints = [[_start(e, form, x, half if halves else None)] for x in xs]
        for sums in ints:
            sums += [e.zero(INTS)] * (chains - 1)
        for j in range(4 * half, 4 * half + 4) if halves else range(8):
            vector = codes_at(e, form, codes, j)
            for sums, x in zip(ints, xs):
                four = e.b.bitcast(e.splat(e.load(i32, x, 4 * j)), BYTES)
                sums[j % chains] = e.dot(sums[j % chains], vector, four, wide=form.wide)
        parts.append([e.floats(reduce(e.b.add, sums)) for sums in ints])
    for c, (x, total) in enumerate(zip(xs, totals)):
        d = e.splat(e.load(f32, x, X_SCALE))
        value = total.get()
        if halves:
            scaled = e.fma(parts[1][c], factors[1], e.b.fmul(parts[0][c], factors[0]))
            value = e.fma(scaled, d, value)
        else:
            value = e.fma(parts[0][c], e.b.fmul(factors[0], d), value)
        if len(minima) == 1:
            value = e.fma(minima[0], e.splat(e.load(f32, x, X_FLOAT_SUM)), value)
        for half, minimum in enumerate(minima if len(minima) == 2 else ()):
            count = e.b.sitofp(e.load(i32, x, (X_SUM, X_SUM_HIGH)[half]), f32)
            value = e.fma(e.b.fmul(minimum, d), e.splat(count), value)
        total.set(value)


def _start(e: Emitter, form: Form, x: Value, half: int | None) -> Value:
    """The integer sums before the first product: -zero times the sum of the activations."""
    if not form.zero:
        return e.zero(INTS)
    if half is None:
        count = e.b.add(e.load(i32, x, X_SUM), e.load(i32, x, X_SUM_HIGH))
    else:
        count = e.load(i32, x, (X_SUM, X_SUM_HIGH)[half])
    return e.splat(e.b.mul(count, ir.Constant(i32, -form.zero)))


def codes_at(e: Emitter, form: Form, planes: Sequence[Value], j: int) -> Value:
    """Vector j of a group's codes, or of their levels: 4 numbers of 16 rows in bytes."""
    result, shift = None, 0
    for plane, bits in zip(planes, form.bits):
        part = _plane(e, plane, bits, j, shift)
        result = part if result is None else e.b.or_(result, part)
        shift += bits
    return result if form.levels is None else e.lookup(form.levels, result)


def _plane(e: Emitter, plane: Value, bits: int, j: int, shift: int) -> Value:
    """Vector j of a plane, with its codes shifted left."""
    if bits == 8:
        return e.load(BYTES, plane, 64 * j)
    if bits == 1:
        flags = e.b.bitcast(e.load(i64, plane, 8 * j), ir.VectorType(ir.IntType(1), 64))
        return e.b.select(flags, e.constant(BYTES, 1 << shift), e.zero(BYTES))
    number, place = (j % 4, j // 4) if bits == 4 else (j // 4, j % 4)
    words = e.b.bitcast(e.load(BYTES, plane, 64 * number), ir.VectorType(i16, 32))
    right = bits * place - shift
    if right > 0:
        words = e.b.lshr(words, e.constant(words.type, right))
    elif right < 0:
        words = e.b.shl(words, e.constant(words.type, -right))
    mask = ((1 << bits) - 1) << shift
    return e.b.and_(e.b.bitcast(words, BYTES), e.constant(BYTES, mask))


def scales_at(e: Emitter, form: Form, at: Value, supers: Value) -> tuple[list[Value], list[Value]]:
    """The scales and minima of a group, for each half if halves have their own."""
    if form.scale in ("half", "half_min"):
        values = [e.floats(e.load(HALVES, at, 32 * i)) for i in range(form.scales.nbytes // 32)]
        return values[:1], values[1:]
    if form.scale == "bf16":
        words = e.b.zext(e.load(ir.VectorType(i16, 16), at), INTS)
        return [e.b.bitcast(e.b.shl(words, e.constant(INTS, 16)), FLOATS)], []
    d = e.floats(e.load(HALVES, supers))
    if form.scale in ("byte", "bytes"):
        count = 2 if form.scales.halves else 1
        entries = [e.load(ir.VectorType(i8, 16), at, 16 * i) for i in range(count)]
        return [e.b.fmul(e.floats(e.b.sext(v, INTS)), d) for v in entries], []
    m = e.b.fneg(e.floats(e.load(HALVES, supers, 32)))
    entries = [e.b.zext(e.load(ir.VectorType(i8, 16), at, 16 * i), INTS) for i in range(2)]
    if form.scale == "byte_min":
        return [e.b.fmul(e.floats(entries[0]), d)], [e.b.fmul(e.floats(entries[1]), m)]
    low = [e.b.and_(v, e.constant(INTS, 15)) for v in entries]
    high = [e.b.lshr(v, e.constant(INTS, 4)) for v in entries]
    return [e.b.fmul(e.floats(v), d) for v in low], [e.b.fmul(e.floats(v), m) for v in high]
