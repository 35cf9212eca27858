"""Element by element, row by row: sums, products and activations of f32."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import repeats, row_refusal, strides
from pyggml.backends.cpu.table import Call, Operand, kernel
from pyggml.node import Node

#: f32 of a row that a thread takes at once.
PIECE = 4096

_BINARY = {ops.add: "fadd", ops.sub: "fsub", ops.mul: "fmul", ops.div: "fdiv"}
_UNARY = {
    ops.silu: "silu",
    ops.gelu: "gelu",
    ops.relu: "relu",
    ops.sigmoid: "sigmoid",
    ops.exp: "exp",
}


@cache
def _binary(instruction: str, *, scalar: bool) -> Native:
    """out = a (op) b, rows of n; `scalar`: a row of b is one number."""

    def make() -> Callable[..., None]:
        from pyggml.backends.cpu.native.emit import I64, Emitter, Row, emits, f32

        @emits(None, I64, I64, I64, I64)
        def combine(e: Emitter, out: Any, a: Any, b: Any, n: Any) -> None:
            one = e.splat(e.load(f32, b)) if scalar else None

            def put(row: Row, offset: Any) -> None:
                right = row.load(b, offset) if one is None else one
                value = getattr(e.b, instruction)(row.load(a, offset), right)
                row.store(value, out, offset)

            e.row(n, put)

        step = 0 if scalar else 4

        def run(
            out: int, o1: int, o2: int, o3: int, a: int, a1: int, a2: int, a3: int,
            b: int, b1: int, b2: int, b3: int, n: int, n1: int, n2: int, rows: int,
            own: int, thread: int, threads: int,
        ) -> None:  # fmt: skip
            per_row = (n + PIECE - 1) // PIECE
            pieces = rows * per_row
            for piece in range(pieces * thread // threads, pieces * (thread + 1) // threads):
                row, first = piece // per_row, piece % per_row * PIECE
                i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
                combine(
                    out + i1 * o1 + i2 * o2 + i3 * o3 + first * 4,
                    a + i1 * a1 + i2 * a2 + i3 * a3 + first * 4,
                    b + i1 * b1 + i2 * b2 + i3 * b3 + first * step,
                    min(PIECE, n - first),
                )

        return run

    return Native(f"{instruction}_{scalar}", "i" * 16, make)


@cache
def _unary(name: str) -> Native:
    """out = f(a), rows of n."""

    def make() -> Callable[..., None]:
        from pyggml.backends.cpu.native import maths
        from pyggml.backends.cpu.native.emit import I64, Emitter, Row, emits

        @emits(None, I64, I64, I64)
        def apply(e: Emitter, out: Any, a: Any, n: Any) -> None:
            def put(row: Row, offset: Any) -> None:
                row.store(getattr(maths, name)(e, row.load(a, offset)), out, offset)

            e.row(n, put)

        def run(
            out: int, o1: int, o2: int, o3: int, a: int, a1: int, a2: int, a3: int,
            n: int, n1: int, n2: int, rows: int, own: int, thread: int, threads: int,
        ) -> None:  # fmt: skip
            per_row = (n + PIECE - 1) // PIECE
            pieces = rows * per_row
            for piece in range(pieces * thread // threads, pieces * (thread + 1) // threads):
                row, first = piece // per_row, piece % per_row * PIECE
                i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
                apply(
                    out + i1 * o1 + i2 * o2 + i3 * o3 + first * 4,
                    a + i1 * a1 + i2 * a2 + i3 * a3 + first * 4,
                    min(PIECE, n - first),
                )

        return run

    return Native(name, "i" * 12, make)


def _refuses(node: Node) -> str | None:
    if not repeats(node["b"], node):
        return f"{node.op.name} repeats b only along whole axes"
    return row_refusal(node)


def _outer(x: Operand) -> tuple[int, int, int, int]:
    """Arguments: elements of a row, sizes of two axes, rows."""
    n, n1, n2, n3 = x.ne
    return n, n1, n2, n1 * n2 * n3


def _combine(call: Call) -> None:
    a, b, out = call["a"], call["b"], call.out
    native = _binary(_BINARY[call.node.op], scalar=b.ne[0] == 1)
    operands = (v for x in (out, a, b) for v in (x.ptr, *strides(x, out)))
    call.add(native, *operands, *_outer(out))


def _apply(call: Call) -> None:
    a, out = call["a"], call.out
    operands = (v for x in (out, a) for v in (x.ptr, *strides(x, out)))
    call.add(_unary(_UNARY[call.node.op]), *operands, *_outer(out))


for _op in _BINARY:
    kernel(_op, inplace=("a",), refuses=_refuses)(_combine)
for _unary_op in _UNARY:
    kernel(_unary_op, inplace=("a",), refuses=row_refusal)(_apply)
