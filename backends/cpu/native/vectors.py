"""Elements of a type as floats, in vectors and one by one."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from pyggml.backends.cpu.native import memory
from pyggml.backends.cpu.native.emit import FLOATS, HALVES, INTS, Emitter, i16


def load_floats(e: Emitter, type_: str, address: Any, number: int = 0) -> Any:
    """16 elements of this type as floats, `number` vectors after the address."""
    if type_ == "f32":
        return e.load(FLOATS, address, 64 * number)
    if type_ == "f16":
        return e.floats(e.load(HALVES, address, 32 * number))
    words = e.b.zext(e.load(ir.VectorType(i16, 16), address, 32 * number), INTS)
    return e.b.bitcast(e.b.shl(words, e.constant(INTS, 16)), FLOATS)


def element_at(type_: str) -> Any:
    """The function from an address to the float there."""
    return {"f32": memory.f32_at, "f16": memory.f16_at, "bf16": memory.bf16_at}[type_]
