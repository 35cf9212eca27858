"""Normalization of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.table import Call, kernel


def _rows() -> Callable[..., None]:
    from pyggml.backends.cpu.native.emit import F64, FLOATS, I64, Emitter, Row, emits, f32

    @emits(None, I64, I64, I64, F64)
    def normalize(e: Emitter, out: Any, x: Any, n: Any, eps: Any) -> None:
        """out = x / sqrt(mean x^2 + eps). out may be x."""
        squares = e.variable(e.zero(FLOATS))

        def add(row: Row, offset: Any) -> None:
            v = row.load(x, offset)
            squares.set(e.fma(v, v, squares.get()))

        def put(row: Row, offset: Any) -> None:
            row.store(e.b.fdiv(row.load(x, offset), divisor), out, offset)

        e.row(n, add)
        mean = e.b.fdiv(e.total(squares.get()), e.b.sitofp(n, f32))
        divisor = e.splat(e.root(e.b.fadd(mean, e.b.fptrunc(eps, f32))))
        e.row(n, put)

    def run(
        out: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int,
        n: int, n1: int, n2: int, rows: int, eps: float, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            normalize(out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3, n, eps)

    return run


ROWS = Native("rms_norm", "i" * 12 + "f", _rows)


@kernel(ops.rms_norm, inplace=("a",), refuses=row_refusal)
def rms_norm(call: Call) -> None:
    a, out = call["a"], call.out
    n, n1, n2, n3 = a.ne
    call.add(
        ROWS, out.ptr, *out.nb[1:], a.ptr, *a.nb[1:], n, n1, n2, n1 * n2 * n3,
        call.attrs["eps"], work=out.elements,
    )  # fmt: skip
