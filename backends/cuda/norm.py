"""Normalization of rows, and its fusion with its weight and bias."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import Struct, Tensor
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import blocks_for, pack_width, row_grid, threads_for
from pyggml.backends.cuda.launch import ABSENT, Call, Operand
from pyggml.backends.cuda.linear.blocks import launch_quantize
from pyggml.backends.cuda.linear.halves import DEPTH, launch_halves, rows_and_scales
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import F32
from pyggml.node import Node


@kernel(ops.rms_norm, inplace=("a",))
def rms_norm(call: Call) -> None:
    _norm(call, call.attrs["eps"])


@kernel(ops.norm, inplace=("a",))
def norm(call: Call) -> None:
    _layer_norm(call, call.attrs["eps"])


def _is_row(node: Node, n: int) -> bool:
    return node.dtype is F32 and node.ne == (n, 1, 1, 1)


def weighted(product: Node, run: Run) -> tuple[Node, Node, Node] | None:
    """x, rms_norm(x) and w if the product is rms_norm(x) * w with a single row w."""
    normed, weight = product["a"], product["b"]
    if normed.op is not ops.rms_norm or not run.only(normed, product):
        return None
    x = normed["a"]
    if not _is_row(weight, x.ne[0]):
        return None
    return x, normed, weight


class Normed(Struct):
    """The struct `Normed` of include/rms.cuh."""

    _fields_ = (
        ("y", Tensor),
        ("w", Tensor),
        ("eps", ctypes.c_float),
        ("halves", ctypes.c_uint64),
        ("scales", ctypes.c_uint64),
    )


NO_NORM = Normed(y=ABSENT.tensor, w=ABSENT.tensor, eps=0.0, halves=0, scales=0)
#: Elements of a thread of kernels that leave a norm, and how many threads have a row.
EACH, ROW_THREADS = 8, (256, 512, 1024)


class NormForm(NamedTuple):
    """How rms_norm takes a row: elements of a pack, packs that a thread holds, what it writes
    besides the result, and where."""

    width: int
    packs: int
    also: str
    ends: tuple[np.uint64, np.uint64]


def can_fix(node: Node) -> bool:
    """Whether rows can be written in groups of fixed point."""
    return node.ne[0] % 32 == 0


def sum_norm_times_row(node: Node, run: Run) -> Fused | None:
    """rms_norm(x) * w with x = a + b; x stays in memory if others read it."""
    match = weighted(node, run)
    if match is None or match[0].op is not ops.add or match[0] not in run.number:
        return None
    x, normed, weight = match
    a, b = x["a"], x["b"]
    if not a.ne == b.ne == x.ne:
        return None
    return Fused(
        (x, normed, node),
        reads={"a": a, "weight": weight, "plus": b},
        record=partial(_norm, eps=normed.attrs["eps"]),
        results={} if run.only(x, normed) else {"sum": x},
        inplace=(a, b),
        fixed=can_fix(node),
        halves=1,
    )


def norm_times_row(node: Node, run: Run) -> Fused | None:
    """rms_norm(x) * w."""
    match = weighted(node, run)
    if match is None:
        return None
    x, normed, weight = match
    record = partial(_norm, eps=normed.attrs["eps"])
    reads = {"a": x, "weight": weight}
    return Fused((normed, node), reads, record, inplace=(x,), fixed=can_fix(node), halves=1)


def norm_with_row(node: Node, run: Run) -> Fused | None:
    """norm(x) * w + b with single rows w and b, or norm(x) * w."""
    bias, product = (node["b"], node["a"]) if node.op is ops.add else (None, node)
    if product.op is not ops.mul or (bias is not None and not run.only(product, node)):
        return None
    normed, weight = product["a"], product["b"]
    if normed.op is not ops.norm or not run.only(normed, product):
        return None
    x = normed["a"]
    rows = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    if not all(_is_row(row, x.ne[0]) for row in rows.values()):
        return None
    nodes = (normed, product) if bias is None else (normed, product, node)
    record = partial(_layer_norm, eps=normed.attrs["eps"])
    return Fused(nodes, {"a": x, **rows}, record, inplace=(x,))


def _norm(call: Call, eps: float) -> None:
    record_norm(call, eps, call["a"], call.get("plus"))


def record_norm(
    call: Call, eps: float, a: Operand, plus: Operand | None, left: str = "halves"
) -> NormForm:
    """Record out = norm(a (+ plus)) times weight. The sum also goes to call["sum"], and out in
    fixed point to call["fixed"] and as f16 to call[left], if these are present. Returns the
    form of the first launch. If others read nothing but the f16, out is not written."""
    out, fixed, halves = call.out, call.get("fixed"), call.get(left)
    weight, total = call.get("weight"), call.get("sum")
    if total == a:  # the sum is there
        total = None
    width, threads, packs = _shares(out, a, weight, plus, total)
    also, ends = "PLAIN", (np.uint64(0), np.uint64(0))
    if width == 4 and packs > 0:
        if fixed is not None:
            also, ends = "FIXED", (fixed.pointer, np.uint64(0))
        elif halves is not None and out.ne[0] % DEPTH == 0:
            also, ends = "HALVES", rows_and_scales(out.ne, halves.ptr)
    y = replace(out, ptr=0) if call.unread and also == "HALVES" else out
    call.launch(
        "norm.cu",
        f"rms_norm<{width}, {packs}, {str(weight is not None).lower()}, {also}>",
        grid=row_grid(out),
        block=threads,
        args=[
            y.tensor,
            a.tensor,
            (weight or a).tensor,
            np.float32(eps),
            (plus or ABSENT).tensor,
            (total or ABSENT).tensor,
            *ends,
        ],
    )
    if fixed is not None and also != "FIXED":
        launch_quantize(call, out, fixed.pointer, 2)
    if halves is not None and also != "HALVES":
        launch_halves(call, out, halves.ptr, "__half")
    return NormForm(width, packs, also, ends)


def left_norm(call: Call, eps: float, left: str) -> Normed | None:
    """The argument of a kernel that computes rows and leaves their norm as f16 in call[left]; None
    if it cannot."""
    out, weight, halves = call.out, call["weight"], call.get(left)
    fits = out.ne[0] <= EACH * ROW_THREADS[-1] and out.ne[0] % DEPTH == 0
    adjacent = out.nb[0] == weight.nb[0] == 4 and out.aligned(16) and weight.aligned(16)
    if halves is None or not fits or not adjacent:
        return None
    rows, scales = rows_and_scales(out.ne, halves.ptr)
    y = replace(out, ptr=0) if call.unread else out
    return Normed(y=y.tensor, w=weight.tensor, eps=eps, halves=int(rows), scales=int(scales))


def row_threads(n: int) -> tuple[int, int]:
    """The threads of an instance that leaves norms of rows of n elements, and those of a block."""
    most = next(threads for threads in ROW_THREADS if n <= EACH * threads)
    return most, min(most, threads_for(blocks_for(n, EACH)))


def _layer_norm(call: Call, eps: float) -> None:
    """Record out = norm(a), times weight, plus bias, if these are present."""
    out, a, weight, bias = call.out, call["a"], call.get("weight"), call.get("bias")
    width, threads, packs = _shares(out, a, weight, bias)
    call.launch(
        "norm.cu",
        f"layer_norm<{width}, {packs}>",
        grid=row_grid(out),
        block=threads,
        args=[
            *(x.tensor for x in (out, a, weight or ABSENT, bias or ABSENT)),
            np.float32(eps),
        ],
    )


def _shares(out: Operand, *others: Operand | None) -> tuple[int, int, int]:
    """Elements of a pack, threads of a row, and packs that a thread holds: 0 if the row is too
    long."""
    width = pack_width(out, *(x for x in others if x is not None))
    threads = threads_for(out.ne[0] // width)
    packs = next((n for n in (1, 2, 4) if n * threads * width >= out.ne[0]), 0)
    return width, threads, packs
