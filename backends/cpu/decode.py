"""Rows of any type as vectors of 16 floats, for kernels that read caches.

A row is read in units: 16 elements of a plain type, or a block of 32. Values are those of
`pyggml.quants`, bit for bit.

Each block is decoded in registers, for four rows of queries at once. For q8_0 that costs 8 % more
than f16 where keys come from a cache of the processor (d 64, 3 queries a head of K), and less than
f16 where they come from memory (d 128, 4 queries: 0.9). So integer products, whose rounded query
would lower the numeric class, have a tenth to win at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

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
    i8,
    i16,
)
from pyggml.backends.host_tiles import FORMS, Form
from pyggml.dtypes import TYPES

WORDS, CODES = ir.VectorType(i16, 16), ir.VectorType(i8, 16)


def unit_of(type_: str) -> tuple[int, int]:
    """Elements and bytes of a unit."""
    block, nbytes = TYPES[type_].block, TYPES[type_].nbytes
    return (16, 16 * nbytes) if block == 1 else (block, nbytes)


def unit(e: Emitter, type_: str, address: Value, count: Value | None = None) -> list[Value]:
    """The vectors of the unit at an address; of a plain type only the first `count` elements."""
    if TYPES[type_].block > 1:
        return _block(e, FORMS[type_], address)
    kind = {"f32": FLOATS, "f16": HALVES, "bf16": WORDS}[type_]
    raw = e.load(kind, address) if count is None else e.load_first(kind, address, count)
    if type_ == "bf16":
        bits = e.b.shl(e.b.zext(raw, INTS), e.constant(INTS, 16))
        return [e.b.bitcast(bits, FLOATS)]
    return [raw if type_ == "f32" else e.floats(raw)]


def each_unit(
    e: Emitter, type_: str, n: Value, body: Callable[[Value, Value | None], None]
) -> None:
    """body(number of a unit, None) for the whole units of n elements, then (.., the rest)."""
    size = unit_of(type_)[0]
    whole = e.b.lshr(n, e.integer(size.bit_length() - 1))
    with e.loop(whole) as number:
        body(number, None)
    if TYPES[type_].block == 1:  # rows of blocks are whole
        rest = e.b.and_(n, e.integer(size - 1))
        with e.when(e.b.icmp_signed(">", rest, e.integer(0))):
            body(whole, rest)


def decode(type_: str) -> Any:
    """decode(out, x, n): n elements of a row as f32."""

    def build(e: Emitter, out: Any, x: Any, n: Any) -> None:
        size, nbytes = unit_of(type_)

        def put(number: Value, left: Value | None) -> None:
            target = e.add(out, e.mul(number, 4 * size))
            for i, v in enumerate(unit(e, type_, e.add(x, e.mul(number, nbytes)), left)):
                if left is None:
                    e.store(v, target, 64 * i)
                else:
                    e.store_first(v, target, left)

        each_unit(e, type_, n, put)

    return emits(None, I64, I64, I64)(build)


def _block(e: Emitter, form: Form, address: Value) -> list[Value]:
    """The 32 elements of a block: an f16 scale, an f16 minimum if the type has one, the fifth bits,
    then the codes."""
    d, at = _half(e, address, 0), 2
    minimum = None
    if form.scales.minimum:
        minimum, at = _half(e, address, at), at + 2
    if form.bits == (8,):
        codes = [e.load(CODES, address, at + 16 * i) for i in range(2)]
        numbers = [e.b.sext(c, INTS) for c in codes]
    else:
        numbers = _nibbles(e, form, address, at)
    values = [e.floats(v) for v in numbers]
    values = [e.b.fmul(v, d) for v in values]
    return values if minimum is None else [e.b.fadd(v, minimum) for v in values]


def _half(e: Emitter, address: Value, offset: int) -> Value:
    """An f16 in every lane."""
    return e.splat(e.b.fpext(e.load(f16, address, offset), f32))


def _nibbles(e: Emitter, form: Form, address: Value, at: int) -> list[Value]:
    """32 codes of 4 or 5 bits, less the code of zero; or their levels."""
    fifth = []
    if len(form.bits) == 2:
        flags = ir.VectorType(ir.IntType(1), 16)
        fifth = [e.b.bitcast(e.load(i16, address, at + 2 * i), flags) for i in range(2)]
        at += 4
    both = e.load(CODES, address, at)
    codes = [e.b.and_(both, e.constant(CODES, 15)), e.b.lshr(both, e.constant(CODES, 4))]
    if form.levels is not None:
        table = e.constant(CODES, [level - form.zero for level in form.levels])
        function = e.declared("llvm.x86.ssse3.pshuf.b.128", CODES, (CODES, CODES))
        return [e.b.sext(e.b.call(function, [table, c]), INTS) for c in codes]
    numbers = [e.b.zext(c, INTS) for c in codes]
    for i, bit in enumerate(fifth):
        more = e.b.select(bit, e.constant(INTS, 16), e.zero(INTS))
        numbers[i] = e.b.or_(numbers[i], more)
    if form.zero:
        numbers = [e.b.sub(v, e.constant(INTS, form.zero)) for v in numbers]
    return numbers
