"""Mixture of experts: routing, biases of experts, sums over a token's experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyggml import ops
from pyggml.backends.cpu.copy import check_ids
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import row_refusal
from pyggml.backends.cpu.sort import best_function, rows_of
from pyggml.backends.cpu.table import Call, kernel
from pyggml.node import Node


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
    call.add(
        SUMS, out.ptr, out.nb[1], a.ptr, *a.nb[1:3], b.ptr, *b.nb[1:3], *a.ne[:3], work=a.elements
    )


def _plain_sums() -> Callable[..., None]:
    from pyggml.backends.cpu.row_loops import add_rows, copy

    def run(
        out: int, o1: int, x: int, x1: int, x2: int, n: int, n_used: int, n_tokens: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for t in range(n_tokens * thread // threads, n_tokens * (thread + 1) // threads):
            y = out + t * o1
            copy(y, x + t * x2, n)
            for slot in range(1, n_used):
                add_rows(y, y, x + t * x2 + slot * x1, n)

    return run


PLAIN_SUMS = Native("multi_add", "i" * 8, _plain_sums)


@kernel(ops.multi_add, refuses=row_refusal)
def multi_add(call: Call) -> None:
    a, out = call["a"], call.out
    call.add(PLAIN_SUMS, out.ptr, out.nb[1], a.ptr, *a.nb[1:3], *a.ne[:3], work=a.elements)


def _biases() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import i32_at
    from pyggml.backends.cpu.row_loops import add_rows, copy

    def run(
        out: int, o1: int, o2: int, x: int, x1: int, x2: int, b: int, b1: int, ids: int, i0: int,
        i1: int, n: int, n_used: int, n_tokens: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        rows = n_used * n_tokens
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            slot, t = row % n_used, row // n_used
            y, source = out + slot * o1 + t * o2, x + slot * x1 + t * x2
            expert = i32_at(ids + slot * i0 + t * i1)
            if expert >= 0:
                add_rows(y, source, b + expert * b1, n)
            elif y != source:
                copy(y, source, n)

    return run


BIASES = Native("add_id", "i" * 14, _biases)


@kernel(ops.add_id, types={"f32", "i32"}, inplace=("a",), refuses=row_refusal)
def add_id(call: Call) -> None:
    a, b, ids, out = call["a"], call["b"], call["ids"], call.out
    check_ids(call, ids, b.ne[1])
    call.add(
        BIASES, out.ptr, *out.nb[1:3], a.ptr, *a.nb[1:3], b.ptr, b.nb[1], ids.ptr, *ids.nb[:2],
        *a.ne[:3], work=a.elements,
    )  # fmt: skip


# -- routing ------------------------------------------------------------------------------------


def _grouped() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import f32_at, i32_at, put_f32, put_i32

    best = best_function()

    def run(
        out: int, o0: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int, n: int,
        n1: int, n2: int, rows: int, groups: int, used: int, n_top: int, k: int, memory: int,
        bytes_of_row: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        size = n // groups
        for row in range(rows * thread // threads, rows * (thread + 1) // threads):
            i1, i2, i3 = row % n1, row // n1 % n2, row // n1 // n2
            y, source = out + i1 * o1 + i2 * o2 + i3 * o3, x + i1 * x1 + i2 * x2 + i3 * x3
            scores = memory + row * bytes_of_row
            flags, ids = scores + 4 * groups, scores + 8 * groups
            for group in range(groups):
                at, score = source + 4 * group * size, np.float32(0.0)
                best(ids, 4, n_top, at, size, 0, 1)
                for i in range(n_top):
                    score += f32_at(at + 4 * i32_at(ids + 4 * i))
                put_f32(scores + 4 * group, score)
                put_i32(flags + 4 * group, 0)
            best(ids, 4, used, scores, groups, 0, 1)
            for i in range(used):
                put_i32(flags + 4 * i32_at(ids + 4 * i), 1)
            best(y, o0, k, source, n, flags, size)

    return run


GROUPED = Native("grouped_topk", "i" * 19, _grouped)


def _group_bytes(node: Node) -> int:
    """For a row: scores and flags of the groups, and ids of the best."""
    attrs = node.attrs
    words: int = 2 * attrs["n_group"] + max(attrs["n_group_used"], attrs["n_top"])
    return 4 * words


@kernel(
    ops.grouped_topk,
    types={"f32", "i32"},
    scratch=lambda node: node.ne[1] * node.ne[2] * node.ne[3] * _group_bytes(node),
    refuses=row_refusal,
)
def grouped_topk(call: Call) -> None:
    attrs = call.attrs
    call.add(
        GROUPED, *rows_of(call), attrs["n_group"], attrs["n_group_used"], attrs["n_top"],
        attrs["k"], call.scratch, _group_bytes(call.node), work=8 * call["a"].elements,
    )  # fmt: skip
