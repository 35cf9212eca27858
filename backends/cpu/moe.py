"""Mixture of experts: weighted sums over a token's experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.table import Call, kernel


def _sums() -> Callable[..., None]:
    from pyggml.backends.cpu.native.emit import I64, Emitter, Row, emits, f32

    @emits(None, I64, I64, I64, I64)
    def first(e: Emitter, out: Any, x: Any, weight: Any, n: Any) -> None:
        """out = weight x"""
        factor = e.splat(e.load(f32, weight))

        def put(row: Row, offset: Any) -> None:
            row.store(e.b.fmul(row.load(x, offset), factor), out, offset)

        e.row(n, put)

    @emits(None, I64, I64, I64, I64)
    def more(e: Emitter, out: Any, x: Any, weight: Any, n: Any) -> None:
        """out += weight x"""
        factor = e.splat(e.load(f32, weight))

        def put(row: Row, offset: Any) -> None:
            row.store(e.fma(row.load(x, offset), factor, row.load(out, offset)), out, offset)

        e.row(n, put)

    def run(
        out: int, o1: int, x: int, x1: int, x2: int, weights: int, w1: int, w2: int, n: int,
        n_used: int, n_tokens: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for t in range(n_tokens * thread // threads, n_tokens * (thread + 1) // threads):
            y = out + t * o1
            first(y, x + t * x2, weights + t * w2, n)
            for slot in range(1, n_used):
                more(y, x + t * x2 + slot * x1, weights + t * w2 + slot * w1, n)

    return run


SUMS = Native("mul_multi_add", "i" * 11, _sums)


@kernel(ops.mul_multi_add, refuses=row_refusal)
def mul_multi_add(call: Call) -> None:
    a, b, out = call["a"], call["b"], call.out
    call.add(SUMS, out.ptr, out.nb[1], a.ptr, *a.nb[1:3], b.ptr, *b.nb[1:3], *a.ne[:3])
