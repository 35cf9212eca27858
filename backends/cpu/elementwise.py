"""Element by element, row by row: sums, products, activations and gated units of f32 and f16.

Numbers of f16 are computed as f32 and rounded once, as by NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

from pyggml import ops
from pyggml.backends.cpu.gate import joined, limited
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.table import Call, Operand, kernel

#: Elements of a row that a thread takes at once.
PIECE = 4096

_BINARY = {ops.add: "fadd", ops.sub: "fsub", ops.mul: "fmul", ops.div: "fdiv"}
_PAIRS = {**_BINARY, ops.add_mask: "add_mask"}
_UNARY = (
    ops.exp, ops.log, ops.sqr, ops.sqrt, ops.tanh, ops.relu, ops.sigmoid, ops.silu, ops.gelu,
    ops.softplus,
)  # fmt: skip
_TYPES = {"f32", "f16"}


def _function(name: str) -> Callable[..., Any]:
    """f(e, x, y, p, q): vectors of floats; a function ignores those that its op lacks."""
    from pyggml.backends.cpu.native import maths

    def masked(e: Any, x: Any, y: Any, p: Any, q: Any) -> Any:
        """-inf hides a NaN."""
        seen = e.b.fcmp_unordered("!=", y, e.constant(y.type, float("-inf")))
        return e.b.select(seen, e.b.fadd(x, y), y)

    if name.startswith("glu_limited_"):
        act = name.removeprefix("glu_limited_")
        return lambda e, x, y, limit, q: joined(e, act, x, y, limit)
    if name.startswith("glu_"):
        act = name.removeprefix("glu_")
        return lambda e, x, y, p, q: joined(e, act, x, y)
    if name in _BINARY.values():
        return lambda e, x, y, p, q: getattr(e.b, name)(x, y)
    own: dict[str, Callable[..., Any]] = {
        "add_mask": masked,
        "scale": lambda e, x, y, s, b: e.b.fadd(e.b.fmul(x, s), b),
        "clamp": lambda e, x, y, low, high: limited(e, x, low, high),
        "fill": lambda e, x, y, value, q: value,
    }
    return own.get(name) or (lambda e, x, y, p, q: getattr(maths, name)(e, x))


@cache
def _rows(name: str, type_: str, *, two: bool = False, scalar: bool = False) -> Native:
    """out = f(a, b), rows of n, in pieces of `length` elements.

    two     f has b; else b is 0 with strides of 0
    scalar  a row of b is one number
    b_step  bytes from one piece's b to the next's: 0 if b's row is as long as a piece, or one
            number, and repeats
    m1..m3  sizes of b's outer axes, which repeat
    p, q    parameters of f
    """

    def make() -> Callable[..., None]:
        from pyggml.backends.cpu.native.emit import F64, I64, Emitter, Row, emits, f16, f32

        f, wide = _function(name), type_ == "f32"

        @emits(None, I64, I64, I64, I64, F64, F64)
        def apply(e: Emitter, out: Any, a: Any, b: Any, n: Any, p: Any, q: Any) -> None:
            numbers = [e.splat(e.b.fptrunc(v, f32)) for v in (p, q)]
            one = e.splat(e.load(f32, b) if wide else e.floats(e.load(f16, b))) if scalar else None

            def load(row: Row, address: Any, offset: Any) -> Any:
                return (row.load if wide else row.load_half)(address, offset)

            def put(row: Row, offset: Any) -> None:
                y = one if scalar or not two else load(row, b, offset)
                value = f(e, load(row, a, offset), y, *numbers)
                (row.store if wide else row.store_half)(value, out, offset)

            e.row(n, put)

        size = 4 if wide else 2

        def run(
            out: int, o1: int, o2: int, o3: int, a: int, a1: int, a2: int, a3: int,
            b: int, b1: int, b2: int, b3: int, m1: int, m2: int, m3: int, n: int, n1: int, n2: int,
            rows: int, length: int, b_step: int, p: float, q: float,
            own: int, thread: int, threads: int,
        ) -> None:  # fmt: skip
            per_row = (n + length - 1) // length
            pieces = rows * per_row
            for piece in range(pieces * thread // threads, pieces * (thread + 1) // threads):
                row, number = piece // per_row, piece % per_row
                i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
                first = number * length
                apply(
                    out + i1 * o1 + i2 * o2 + i3 * o3 + first * size,
                    a + i1 * a1 + i2 * a2 + i3 * a3 + first * size,
                    b + i1 % m1 * b1 + i2 % m2 * b2 + i3 % m3 * b3 + number * b_step,
                    min(length, n - first),
                    p,
                    q,
                )

        return run

    return Native(f"rows_{name}_{type_}{'_scalar' * scalar}", "i" * 21 + "ff", make)


def _add(
    call: Call, name: str, a: Operand, b: Operand | None = None, *, p: float = 0.0, q: float = 0.0
) -> None:
    out, size = call.out, 4 if call.out.type == "f32" else 2
    n, n1, n2, n3 = out.ne
    place, length, step, scalar = (0, 0, 0, 0, 1, 1, 1), PIECE, 0, False
    if b is not None:
        place, scalar = (b.ptr, *b.nb[1:], *b.ne[1:]), b.ne[0] == 1
        if b.ne[0] == n:
            step = 0 if scalar else PIECE * size
        elif not scalar:
            length = b.ne[0]
    call.add(
        _rows(name, out.type, two=b is not None, scalar=scalar), out.ptr, *out.nb[1:], a.ptr,
        *a.nb[1:], *place, n, n1, n2, n1 * n2 * n3, length, step, p, q,
        work=(1 if name in _PAIRS.values() else 4) * out.elements,
    )  # fmt: skip


def _combine(call: Call) -> None:
    _add(call, _PAIRS[call.node.op], call["a"], call["b"])


def _apply(call: Call) -> None:
    _add(call, call.node.op.name, call["a"])


for _op in _PAIRS:
    kernel(_op, types=_TYPES, inplace=("a",), refuses=row_refusal)(_combine)
for _unary_op in _UNARY:
    kernel(_unary_op, types=_TYPES, inplace=("a",), refuses=row_refusal)(_apply)


@kernel(ops.scale, types=_TYPES, inplace=("a",), refuses=row_refusal)
def scale(call: Call) -> None:
    s, b = call.attrs["s"], call.attrs["b"]
    _add(call, "scale", call["a"], p=s, q=b or -0.0)  # x + -0 = x, also for x = -0


@kernel(ops.clamp, types=_TYPES, inplace=("a",), refuses=row_refusal)
def clamp(call: Call) -> None:
    _add(call, "clamp", call["a"], p=call.attrs["min"], q=call.attrs["max"])


@kernel(ops.fill, types=_TYPES, inplace=("a",), refuses=row_refusal)
def fill(call: Call) -> None:
    _add(call, "fill", call["a"], p=call.attrs["value"])


@kernel(ops.glu, types=_TYPES, refuses=row_refusal)
def glu(call: Call) -> None:
    a, b, out = call["a"], call.get("b"), call.out
    if b is None:
        half = out.ne[0] * (4 if a.type == "f32" else 2)
        a = replace(a, ne=out.ne)
        b = replace(a, ptr=a.ptr + half)
        if call.attrs["swapped"]:
            a, b = b, a
    limit = call.attrs["limit"]
    limited = "" if limit is None else "limited_"
    _add(call, f"glu_{limited}{call.attrs['act']}", a, b, p=limit or 0.0)
