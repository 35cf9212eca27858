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
def _rows(name: str, operands: int, *, scalar: bool = False) -> Native:
    """out = f(a) or f(a, b), rows of n; `scalar`: a row of b is one number.

    For one operand b is 0 with strides of 0.
    """

    def make() -> Callable[..., None]:
        from pyggml.backends.cpu.native import maths
        from pyggml.backends.cpu.native.emit import I64, Emitter, Row, emits, f32

        @emits(None, I64, I64, I64, I64)
        def apply(e: Emitter, out: Any, a: Any, b: Any, n: Any) -> None:
            one = e.splat(e.load(f32, b)) if scalar else None

            def put(row: Row, offset: Any) -> None:
                left = row.load(a, offset)
                if operands == 1:
                    value = getattr(maths, name)(e, left)
                else:
                    right = row.load(b, offset) if one is None else one
                    value = getattr(e.b, name)(left, right)
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
                apply(
                    out + i1 * o1 + i2 * o2 + i3 * o3 + first * 4,
                    a + i1 * a1 + i2 * a2 + i3 * a3 + first * 4,
                    b + i1 * b1 + i2 * b2 + i3 * b3 + first * step,
                    min(PIECE, n - first),
                )

        return run

    return Native(f"rows_{name}{'_scalar' * scalar}", "i" * 16, make)


def _refuses(node: Node) -> str | None:
    if not repeats(node["b"], node):
        return f"{node.op.name} repeats b only along whole axes"
    return row_refusal(node)


def _add(call: Call, native: Native, *operands: Operand) -> None:
    out = call.out
    places = [v for x in (out, *operands) for v in (x.ptr, *strides(x, out))]
    places += [0] * (12 - len(places))
    n, n1, n2, n3 = out.ne
    call.add(native, *places, n, n1, n2, n1 * n2 * n3)


def _combine(call: Call) -> None:
    a, b = call["a"], call["b"]
    _add(call, _rows(_BINARY[call.node.op], 2, scalar=b.ne[0] == 1), a, b)


def _apply(call: Call) -> None:
    _add(call, _rows(_UNARY[call.node.op], 1), call["a"])


for _op in _BINARY:
    kernel(_op, inplace=("a",), refuses=_refuses)(_combine)
for _unary_op in _UNARY:
    kernel(_unary_op, inplace=("a",), refuses=row_refusal)(_apply)
