"""Normalization of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.table import Call, kernel


def _rms_rows() -> Callable[..., None]:
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

    return _each_row(normalize)


def _each_row(normalize: Any) -> Callable[..., None]:
    def run(
        out: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int,
        n: int, n1: int, n2: int, rows: int, eps: float, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            normalize(out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3, n, eps)

    return run


def _rows() -> Callable[..., None]:
    from pyggml.backends.cpu.native.emit import F64, FLOATS, I64, Emitter, Row, emits, f32

    @emits(None, I64, I64, I64, F64)
    def normalize(e: Emitter, out: Any, x: Any, n: Any, eps: Any) -> None:
        """out = (x - mean) / sqrt(var + eps). out may be x.

        The mean of f32 is off by its rounding: the mean of what is left corrects it.
        """
        count = e.b.sitofp(n, f32)
        total, rest, squares = (e.variable(e.zero(FLOATS)) for _ in range(3))

        def mean_of(sums: Any) -> Any:
            return e.b.fdiv(e.total(sums.get()), count)

        e.row(n, lambda row, at: total.set(e.b.fadd(total.get(), row.load(x, at))))
        mean = e.splat(mean_of(total))

        def add(row: Row, offset: Any) -> None:
            v = row.only(e.b.fsub(row.load(x, offset), mean))
            rest.set(e.b.fadd(rest.get(), v))
            squares.set(e.fma(v, v, squares.get()))

        e.row(n, add)
        left = mean_of(rest)
        var = e.b.fsub(mean_of(squares), e.b.fmul(left, left))
        var = e.b.select(e.b.fcmp_ordered("<", var, e.number(0.0)), e.number(0.0), var)
        root = e.root(e.b.fadd(var, e.b.fptrunc(eps, f32)))
        root = e.b.select(e.b.fcmp_ordered("==", root, e.number(0.0)), e.number(1.0), root)
        divisor, correction = e.splat(root), e.splat(left)

        def put(row: Row, offset: Any) -> None:
            v = e.b.fsub(e.b.fsub(row.load(x, offset), mean), correction)
            row.store(e.b.fdiv(v, divisor), out, offset)

        e.row(n, put)

    return _each_row(normalize)


RMS_ROWS = Native("rms_norm", "i" * 12 + "f", _rms_rows)
ROWS = Native("norm", "i" * 12 + "f", _rows)


def _add(call: Call, rows: Native) -> None:
    a, out = call["a"], call.out
    n, n1, n2, n3 = a.ne
    call.add(
        rows, out.ptr, *out.nb[1:], a.ptr, *a.nb[1:], n, n1, n2, n1 * n2 * n3,
        call.attrs["eps"], work=out.elements,
    )  # fmt: skip


@kernel(ops.rms_norm, inplace=("a",), refuses=row_refusal)
def rms_norm(call: Call) -> None:
    _add(call, RMS_ROWS)


@kernel(ops.norm, inplace=("a",), refuses=row_refusal)
def norm(call: Call) -> None:
    _add(call, ROWS)
