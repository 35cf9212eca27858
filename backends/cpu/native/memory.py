"""Scalar access to memory in numba code: `f32_at(address)`, `put_f32(address, value)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir
from numba import njit

from pyggml.backends.cpu.native.emit import F32, I64, Emitter, emits, f16, f32, i8, i16, i32, i64

F = TypeVar("F", bound=Callable[..., Any])


def inner(function: F) -> F:
    """Decorator: a function that numba compiles into the kernels that call it."""
    compiled: F = njit(function)
    return compiled


def _integer(kind: Any, *, signed: bool) -> Any:
    def read(e: Emitter, address: Any) -> Any:
        value = e.load(kind, address)
        if kind is i64:
            return value
        return e.b.sext(value, i64) if signed else e.b.zext(value, i64)

    return emits(I64, I64)(read)


def _put_integer(kind: Any) -> Any:
    def put(e: Emitter, address: Any, value: Any) -> None:
        e.store(value if kind is i64 else e.b.trunc(value, kind), address)

    return emits(None, I64, I64)(put)


u8_at, i8_at = _integer(i8, signed=False), _integer(i8, signed=True)
u16_at, i16_at = _integer(i16, signed=False), _integer(i16, signed=True)
u32_at, i32_at, i64_at = (
    _integer(i32, signed=False), _integer(i32, signed=True), _integer(i64, signed=True)
)  # fmt: skip
put_i8, put_i16, put_i32, put_i64 = map(_put_integer, (i8, i16, i32, i64))


@emits(F32, I64)
def f32_at(e: Emitter, address: Any) -> Any:
    return e.load(f32, address)


@emits(None, I64, F32)
def put_f32(e: Emitter, address: Any, value: Any) -> None:
    e.store(value, address)


@emits(F32, I64)
def f16_at(e: Emitter, address: Any) -> Any:
    return e.b.fpext(e.load(f16, address), f32)


@emits(None, I64, F32)
def put_f16(e: Emitter, address: Any, value: Any) -> None:
    e.store(e.b.fptrunc(value, f16), address)


@emits(F32, I64)
def bf16_at(e: Emitter, address: Any) -> Any:
    bits = e.b.shl(e.b.zext(e.load(i16, address), i32), ir.Constant(i32, 16))
    return e.b.bitcast(bits, f32)


@emits(F32, I64)
def f32_of_bits(e: Emitter, bits: Any) -> Any:
    return e.b.bitcast(e.b.trunc(bits, i32), f32)


@emits(F32, I64)
def f32_of_f16(e: Emitter, bits: Any) -> Any:
    return e.b.fpext(e.b.bitcast(e.b.trunc(bits, i16), f16), f32)


@emits(I64, I64, I64)
def fetch_add(e: Emitter, address: Any, value: Any) -> Any:
    """Atomically add to a word; its old value."""
    return e.b.atomic_rmw("add", e.b.inttoptr(address, i64.as_pointer()), value, "acq_rel")


@emits(I64, I64, I64)
def exchange(e: Emitter, address: Any, value: Any) -> Any:
    """Atomically replace a word; its old value. No access moves across it in either direction."""
    return e.b.atomic_rmw("xchg", e.b.inttoptr(address, i64.as_pointer()), value, "seq_cst")


@emits(I64, I64)
def load_acquire(e: Emitter, address: Any) -> Any:
    return e.b.load_atomic(e.b.inttoptr(address, i64.as_pointer()), "acquire", 8)


@emits(None, I64, I64)
def store_release(e: Emitter, address: Any, value: Any) -> None:
    e.b.store_atomic(value, e.b.inttoptr(address, i64.as_pointer()), "release", 8)


@emits(None, I64)
def prefetch(e: Emitter, address: Any) -> None:
    e.prefetch(address, 0)


@emits(None)
def pause(e: Emitter) -> None:
    """Tell the processor that a loop waits."""
    if "x86" in e.b.module.triple or "amd64" in e.b.module.triple:
        e.b.call(e.declared("llvm.x86.sse2.pause", ir.VoidType(), ()), [])


@emits(None, I64, I64, I64, I64)
def call(e: Emitter, function: Any, a: Any, b: Any, c: Any) -> None:
    """Call a C function of three integers at an address."""
    kind = ir.FunctionType(ir.VoidType(), [i64] * 3)
    e.b.call(e.b.inttoptr(function, kind.as_pointer()), [a, b, c])


def stack(nbytes: int, *, zeros: bool = True) -> Any:
    """An intrinsic without parameters: the address of this many bytes on the stack, aligned. They
    are zero when the kernel starts, which LLVM cannot compile for many KiB."""

    def reserve(e: Emitter) -> Any:
        from numba.core import cgutils

        kind = ir.ArrayType(i8, nbytes)
        if zeros:
            place = cgutils.alloca_once(e.b, kind)
        else:
            with e.b.goto_entry_block():
                place = e.b.alloca(kind)
        place.align = 64
        return e.b.ptrtoint(place, i64)

    return emits(I64)(reserve)
