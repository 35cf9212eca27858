"""Loops over the f32 of a row, for kernels that numba compiles."""

from __future__ import annotations

from typing import Any

from pyggml.backends.cpu.native.emit import (
    BYTES,
    F32,
    F64,
    FLOATS,
    I64,
    INTS,
    Emitter,
    Row,
    Value,
    emits,
    f32,
    i8,
)


@emits(None, I64, I64)
def clear(e: Emitter, x: Any, n: Any) -> None:
    e.row(n, lambda row, offset: row.store(e.zero(FLOATS), x, offset))


@emits(None, I64, I64, I64)
def copy(e: Emitter, out: Any, x: Any, n: Any) -> None:
    e.row(n, lambda row, offset: row.store(row.load(x, offset), out, offset))


@emits(None, I64, I64, I64)
def copy_bytes(e: Emitter, out: Any, x: Any, nbytes: Any) -> None:
    """Copy in vectors of 64 bytes, then words, then bytes."""
    whole = e.b.lshr(nbytes, e.integer(6))
    with e.loop(whole) as i:
        at = e.mul(i, 64)
        e.store(e.load(BYTES, e.add(x, at)), e.add(out, at))
    done = e.mul(whole, 64)
    words = e.b.lshr(e.b.sub(nbytes, done), e.integer(2))
    with e.when(e.b.icmp_signed(">", words, e.integer(0))):
        e.store_first(e.load_first(INTS, e.add(x, done), words), e.add(out, done), words)
    done = e.add(done, e.mul(words, 4))
    with e.loop(e.b.sub(nbytes, done)) as i:
        at = e.add(done, i)
        e.store(e.load(i8, e.add(x, at)), e.add(out, at))


@emits(None, I64, I64, I64, I64)
def add_rows(e: Emitter, out: Any, x: Any, y: Any, n: Any) -> None:
    """out = x + y"""

    def put(row: Row, offset: Value) -> None:
        row.store(e.b.fadd(row.load(x, offset), row.load(y, offset)), out, offset)

    e.row(n, put)


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


@emits(None, I64, I64, F64, I64, F64, I64)
def combine(e: Emitter, out: Any, x: Any, factor: Any, y: Any, other: Any, n: Any) -> None:
    """out = factor x + other y; a factor of 0 does not silence a NaN"""
    left, right = (e.splat(e.b.fptrunc(v, f32)) for v in (factor, other))

    def put(row: Row, offset: Value) -> None:
        value = e.b.fmul(row.load(x, offset), left)
        row.store(e.fma(row.load(y, offset), right, value), out, offset)

    e.row(n, put)


@emits(None, I64, I64, I64, F64)
def divide(e: Emitter, out: Any, x: Any, n: Any, by: Any) -> None:
    """out = x / by"""
    divisor = e.splat(e.b.fptrunc(by, f32))
    e.row(n, lambda row, offset: row.store(e.b.fdiv(row.load(x, offset), divisor), out, offset))
