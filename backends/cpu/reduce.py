"""Sums and softmax of rows."""

from __future__ import annotations

from collections.abc import Callable

from pyggml import ops
from pyggml.backends.cpu.attention import FLOOR, alibi_slopes
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.table import Call, kernel
from pyggml.backends.host_memory import address_of
from pyggml.node import Node


def _softmax() -> Callable[..., None]:
    from pyggml.backends.cpu import attention_blocks as blocks
    from pyggml.backends.cpu.native.memory import f32_at, put_f32, stack
    from pyggml.backends.cpu.row_loops import copy, rescale

    soften, stats_of = blocks.soften(hides=False), stack(8)

    def run(
        out: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int, mask: int,
        m1: int, m2: int, m3: int, n_m2: int, n_m3: int, sinks: int, s0: int, slopes: int,
        n: int, n1: int, n2: int, rows: int, scale: float, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        stats = stats_of()
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            y, source = out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3
            if y != source:
                copy(y, source, n)
            top, total, slope, at = FLOOR, 0.0, 1.0, 0
            if sinks != 0:
                top, total = max(f32_at(sinks + i2 * s0), FLOOR), 1.0
            if slopes != 0:
                slope = f32_at(slopes + 4 * i2)
            if mask != 0:
                at = mask + i1 * m1 + i2 % n_m2 * m2 + i3 % n_m3 * m3
            put_f32(stats, top)
            put_f32(stats + 4, total)
            soften(y, n, at, scale, slope, 0.0, stats)
            total = f32_at(stats + 4)
            if total != 0.0:  # else a row without keys, which is all zeros
                rescale(y, n, 1.0 / total)

    return run


SOFTMAX = Native("soft_max_ext", "i" * 21 + "f", _softmax)


def _softmax_refuses(node: Node) -> str | None:
    mask = node.get("mask")
    if mask is not None and mask.dtype.name != "f16":
        return f"{node.op.name} takes masks of f16 here"
    return row_refusal(node)


@kernel(ops.soft_max_ext, types={"f32", "f16"}, inplace=("a",), refuses=_softmax_refuses)
def soft_max_ext(call: Call) -> None:
    a, mask, sinks, out, attrs = (
        call["a"],
        call.get("mask"),
        call.get("sinks"),
        call.out,
        call.attrs,
    )
    n, n1, n2, n3 = a.ne
    slopes = alibi_slopes(n2, attrs["head0"], attrs["n_head"], attrs["max_bias"])
    call.keep.append(slopes)
    masked = (mask.ptr, *mask.nb[1:], *mask.ne[2:]) if mask else (0, 0, 0, 0, 1, 1)
    call.add(
        SOFTMAX, out.ptr, *out.nb[1:], a.ptr, *a.nb[1:], *masked,
        *((sinks.ptr, sinks.nb[0]) if sinks else (0, 0)),
        0 if slopes is None else address_of(slopes), n, n1, n2, n1 * n2 * n3, attrs["scale"],
        work=4 * a.elements,
    )  # fmt: skip


def _sums() -> Callable[..., None]:
    from pyggml.backends.cpu.native.emit import (
        DOUBLES,
        F32,
        I64,
        Emitter,
        Row,
        Value,
        emits,
        f32,
    )
    from pyggml.backends.cpu.native.memory import put_f32

    @emits(F32, I64, I64)
    def total(e: Emitter, x: Value, n: Value) -> Value:
        """In f64: a long row loses nothing."""
        sums = e.variable(e.zero(DOUBLES))
        e.row(n, lambda row, at: sums.set(e.b.fadd(sums.get(), wide(e, row, x, at))))
        return e.b.fptrunc(e.total(sums.get()), f32)

    def wide(e: Emitter, row: Row, x: Value, at: Value) -> Value:
        return e.b.fpext(row.load(x, at), DOUBLES)

    def run(
        out: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int, n: int, n1: int,
        n2: int, rows: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            value = total(x + i1 * x1 + i2 * x2 + i3 * x3, n)
            put_f32(out + i1 * o1 + i2 * o2 + i3 * o3, value)

    return run


SUMS = Native("sum_rows", "i" * 12, _sums)


@kernel(ops.sum_rows, refuses=row_refusal)
def sum_rows(call: Call) -> None:
    a, out = call["a"], call.out
    n, n1, n2, n3 = a.ne
    call.add(SUMS, out.ptr, *out.nb[1:], a.ptr, *a.nb[1:], n, n1, n2, n1 * n2 * n3, work=a.elements)
