"""Elements of a type as floats, in vectors and one by one."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from pyggml.backends.cpu.native import memory
from pyggml.backends.cpu.native.emit import FLOATS, HALVES, INTS, Emitter, i16

_KINDS = {"f32": FLOATS, "f16": HALVES, "bf16": ir.VectorType(i16, 16)}


def load_floats(e: Emitter, type_: str, address: Any, number: int = 0, *, left: Any = None) -> Any:
    """16 elements of this type as floats, `number` vectors after the address.

    left  if given, only this many elements are read, and the others are 0
    """
    kind = _KINDS[type_]
    if left is None:
        value = e.load(kind, address, (64 if type_ == "f32" else 32) * number)
    else:
        value = e.load_first(kind, address, left)
    if type_ == "f32":
        return value
    if type_ == "f16":
        return e.floats(value)
    return e.b.bitcast(e.b.shl(e.b.zext(value, INTS), e.constant(INTS, 16)), FLOATS)


def element_at(type_: str) -> Any:
    """The function from an address to the float there."""
    return {"f32": memory.f32_at, "f16": memory.f16_at, "bf16": memory.bf16_at}[type_]
