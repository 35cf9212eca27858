"""Results of a tile in a column of a tensor."""

from __future__ import annotations

from typing import Any

from pyggml.backends.cpu.gate import Gate
from pyggml.backends.cpu.native.emit import FLOATS, HALVES, I64, Emitter, Value, emits


def put_sums(type_: str) -> Any:
    """put_sums(sums, out, count): `count` floats, 1 to 16, as f32 or f16."""

    def build(e: Emitter, sums: Any, out: Any, count: Any) -> None:
        value = e.load(FLOATS, sums)
        put(e, value if type_ == "f32" else e.b.fptrunc(value, HALVES), out, count)

    return emits(None, I64, I64, I64)(build)


def put_gated(joint: Gate) -> Any:
    """put_gated(up, gate, out, count): the gated values."""

    def build(e: Emitter, up: Any, gate: Any, out: Any, count: Any) -> None:
        put(e, joint.joined(e, e.load(FLOATS, gate), e.load(FLOATS, up)), out, count)

    return emits(None, I64, I64, I64, I64)(build)


@emits(None, I64, I64)
def put_zeros(e: Emitter, out: Any, n: Any) -> None:
    """n zeros."""
    e.row(n, lambda row, offset: row.store(e.zero(FLOATS), out, offset))


def put(e: Emitter, value: Value, out: Value, count: Value) -> None:
    """Store the first lanes of a vector."""
    with e.b.if_else(e.b.icmp_signed("==", count, e.integer(16))) as (then, otherwise):
        with then:
            e.store(value, out)
        with otherwise:
            e.store_first(value, out, count)
