"""Rows of f32 as any type that caches have: the bytes that `pyggml.quants` writes.

The operations on f32 are those of quants/encoders.py in the same order, so a NaN, an infinity, a
tie and a scale that underflows also give the same bytes. A number that is not finite where a code
should be becomes 0, as NumPy's conversion to integers makes it on x86. The one difference: a
signalling NaN becomes a quiet f16, and stays signalling in NumPy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from pyggml.backends.cpu.decode import CODES, WORDS
from pyggml.backends.cpu.native.emit import (
    FLOATS,
    HALVES,
    I64,
    INTS,
    Emitter,
    Value,
    emits,
    f16,
    f32,
    i16,
    i32,
    i64,
)
from pyggml.backends.host_tiles import FORMS, Form
from pyggml.dtypes import TYPES


def encode(type_: str) -> Any:
    """encode(out, x, n): n f32 of a row as this type."""

    def build(e: Emitter, out: Any, x: Any, n: Any) -> None:
        if TYPES[type_].block == 1:
            _plain(e, type_, out, x, n)
            return
        with e.loop(e.b.lshr(n, e.integer(5))) as number:
            target = e.add(out, e.mul(number, TYPES[type_].nbytes))
            _block(e, FORMS[type_], target, e.add(x, e.mul(number, 128)))

    return emits(None, I64, I64, I64)(build)


def _plain(e: Emitter, type_: str, out: Value, x: Value, n: Value) -> None:
    def put(row: Any, offset: Value) -> None:
        values = row.load(x, offset)
        if type_ == "f32":
            row.store(values, out, offset)
            return
        narrow = e.b.fptrunc(values, HALVES) if type_ == "f16" else _bf16(e, values)
        at = e.add(out, e.b.lshr(offset, e.integer(1)))
        if row.count is None:
            e.store(narrow, at)
        else:
            e.store_first(narrow, at, row.count)

    e.row(n, put)


def _bf16(e: Emitter, x: Value) -> Value:
    """Round to nearest, ties to even; a NaN keeps its upper bits and becomes quiet."""
    bits = e.b.bitcast(x, INTS)
    odd = e.b.and_(e.b.lshr(bits, e.constant(INTS, 16)), e.constant(INTS, 1))
    rounded = e.b.add(bits, e.b.add(odd, e.constant(INTS, 0x7FFF)))
    quiet = e.b.or_(bits, e.constant(INTS, 0x400000))
    result = e.b.select(e.b.fcmp_unordered("uno", x, x), quiet, rounded)
    return e.b.trunc(e.b.lshr(result, e.constant(INTS, 16)), WORDS)


# -- blocks ---------------------------------------------------------------------------------------


def _block(e: Emitter, form: Form, out: Value, x: Value) -> None:
    values = [e.load(FLOATS, x, 64 * i) for i in range(2)]
    if form.bits == (8,):
        _eight_bits(e, values, out)
    else:
        _few_bits(e, form, values, out, x)


def _eight_bits(e: Emitter, x: Sequence[Value], out: Value) -> None:
    """d = max|x| / 127, q = x / d rounded to nearest, ties away from zero."""
    d = e.b.fdiv(_most(e, [e.absolute(v) for v in x], ">"), e.number(127.0))
    inverse = _inverse(e, d)
    _put_half(e, d, out, 0)
    for i, v in enumerate(x):
        scaled = e.b.fmul(v, inverse)
        size = e.absolute(scaled)
        whole = _floor(e, size)
        fraction = e.b.fmul(e.b.fsub(size, whole), e.constant(FLOATS, 2.0))
        q = _integers(e, e.b.fadd(whole, _floor(e, fraction)))
        negative = e.b.icmp_signed("<", e.b.bitcast(scaled, INTS), e.zero(INTS))
        q = e.b.select(negative, e.b.neg(q), q)
        e.store(e.b.trunc(q, CODES), out, 2 + 16 * i)


def _few_bits(e: Emitter, form: Form, x: list[Value], out: Value, address: Value) -> None:
    """q4_0, q5_0: d = (the largest x) / -2^(bits-1). q4_1, q5_1: d = (max - min) / (2^bits - 1)."""
    bits = sum(form.bits)
    most, middle, at = (1 << bits) - 1, 1 << (bits - 1), 2
    if form.scales.minimum:
        low = _most(e, x, "<")
        d = e.b.fdiv(e.b.fsub(_most(e, x, ">"), low), e.number(float(most)))
        _put_half(e, low, out, at)
        x, at, shift = [e.b.fsub(v, e.splat(low)) for v in x], at + 2, 0.5
    else:
        d, shift = e.b.fdiv(_largest(e, x, address), e.number(-float(middle))), middle + 0.5
    _put_half(e, d, out, 0)
    inverse = _inverse(e, d)
    codes = []
    for i, v in enumerate(x):
        q = _integers(e, e.b.fadd(e.b.fmul(v, inverse), e.constant(FLOATS, shift)))
        limit = e.constant(INTS, most)
        q = e.b.select(e.b.icmp_signed(">", q, limit), limit, q)
        if bits == 5:
            fifth = e.b.icmp_signed(">", q, e.constant(INTS, 15))
            e.store(e.b.bitcast(fifth, i16), out, at + 2 * i)
        codes.append(e.b.trunc(q, CODES))
    low_half = e.b.and_(codes[0], e.constant(CODES, 15))
    high_half = e.b.shl(codes[1], e.constant(CODES, 4))
    e.store(e.b.or_(low_half, high_half), out, at + (4 if bits == 5 else 0))


def _most(e: Emitter, x: Sequence[Value], sign: str) -> Value:
    """The largest (>) or least (<) of all lanes as a scalar; NumPy's one NaN if a lane is NaN."""

    def more(a: Value, b: Value) -> Value:
        takes = e.b.or_(e.b.fcmp_ordered(sign, a, b), e.b.fcmp_unordered("uno", a, a))
        return e.b.select(takes, a, b)

    most = e.reduced(more(*x), more)
    return e.b.select(e.b.fcmp_unordered("uno", most, most), e.number(float("nan")), most)


def _largest(e: Emitter, x: Sequence[Value], address: Value) -> Value:
    """The number of largest magnitude, with its sign: the first of equals, or the first NaN."""
    sizes = [e.absolute(v) for v in x]
    top = e.splat(_most(e, sizes, ">"))
    flags = []
    for size in sizes:
        # Equal, or both NaN: a NaN among the numbers makes `top` NaN.
        other = e.b.and_(e.b.fcmp_unordered("uno", size, size), e.b.fcmp_unordered("uno", top, top))
        match = e.b.or_(e.b.fcmp_ordered("==", size, top), other)
        flags.append(e.b.zext(e.b.bitcast(match, i16), i32))
    both = e.b.or_(flags[0], e.b.shl(flags[1], ir.Constant(i32, 16)))
    first = e.b.zext(e.b.cttz(both, ir.Constant(ir.IntType(1), 0)), i64)
    return e.load(f32, e.add(address, e.mul(first, 4)))


def _inverse(e: Emitter, d: Value) -> Value:
    """1 / d in every lane; 0 for 0."""
    zero = e.b.fcmp_ordered("==", d, e.number(0.0))
    return e.splat(e.b.select(zero, e.number(0.0), e.b.fdiv(e.number(1.0), d)))


def _put_half(e: Emitter, value: Value, out: Value, offset: int) -> None:
    e.store(e.b.fptrunc(value, f16), out, offset)


def _floor(e: Emitter, x: Value) -> Value:
    return e.b.call(e.declared("llvm.floor.v16f32", FLOATS, (FLOATS,)), [x])


def _integers(e: Emitter, x: Value) -> Value:
    """Truncated to integers; 0 for NaN and numbers that no code comes near."""
    near = e.b.fcmp_ordered("<", e.absolute(x), e.constant(FLOATS, 512.0))
    return e.b.fptosi(e.b.select(near, x, e.zero(FLOATS)), INTS)
