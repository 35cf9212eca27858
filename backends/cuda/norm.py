"""Normalisation of rows, with the weight that multiplies it."""

from __future__ import annotations

from functools import partial

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run, fuses
from pyggml.backends.cuda.geometry import pack_width, row_grid, threads_for
from pyggml.backends.cuda.launch import ABSENT, Call, Operand
from pyggml.backends.cuda.linear.blocks import launch_quantize
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import F32
from pyggml.node import Node


@kernel(ops.rms_norm, inplace=("a",))
def rms_norm(call: Call) -> None:
    _norm(call, call.operand(0), call.attrs["eps"])


def _weighted(node: Node, run: Run) -> tuple[Node, Node, Node] | None:
    """x, rms_norm(x) and w of a node that is rms_norm(x) * w, w one row."""
    normed, weight = node.src
    assert normed is not None and weight is not None
    if normed.op is not ops.rms_norm or not run.only(normed, node):
        return None
    x = normed.src[0]
    if x is None or weight.dtype is not F32 or weight.ne != (x.ne[0], 1, 1, 1):
        return None
    return x, normed, weight


@fuses(ops.mul)
def sum_norm_times_row(node: Node, run: Run) -> Fused | None:
    """x = a + b, which stays where others read it, and rms_norm(x) * w."""
    found = _weighted(node, run)
    if found is None or found[0].op is not ops.add or found[0] not in run.number:
        return None
    x, normed, weight = found
    a, b = x.src
    if a is None or b is None or not a.ne == b.ne == x.ne:
        return None
    also = () if run.only(x, normed) else (x,)
    return _fused((x, normed, node), (a, weight, b), inplace=(a, b), also=also)


@fuses(ops.mul)
def norm_times_row(node: Node, run: Run) -> Fused | None:
    found = _weighted(node, run)
    if found is None:
        return None
    x, normed, weight = found
    return _fused((normed, node), (x, weight), inplace=(x,))


def _fused(
    nodes: tuple[Node, ...],
    reads: tuple[Node, ...],
    inplace: tuple[Node, ...] = (),
    also: tuple[Node, ...] = (),
) -> Fused:
    eps = nodes[-2].attrs["eps"]
    record, prepares = (partial(_norm_times_row, eps=eps, fixed=f) for f in (False, True))
    whole = nodes[-1].ne[0] % 32 == 0
    return Fused(nodes, reads, record, inplace, also=also, prepares=prepares if whole else None)


def _norm_times_row(call: Call, eps: float, fixed: bool) -> None:
    """call.src: x, w, or a, w, b where x is a sum; call.also: the sum, the result prepared."""
    plus = call.operand(2) if len(call.src) > 2 else None
    out = call.also[-1] if fixed else None
    total = call.also[0] if len(call.also) > fixed else None
    _norm(call, call.operand(0), eps, call.operand(1), plus, total, out)


def _norm(
    call: Call,
    a: Operand,
    eps: float,
    weight: Operand | None = None,
    plus: Operand | None = None,
    total: Operand | None = None,
    fixed: Operand | None = None,
) -> None:
    """Record out = norm of a (+ plus, which `total` gets), times weight; and out in fixed point."""
    out = call.out
    present = [x for x in (a, weight, plus, total) if x is not None]
    width = pack_width(out, *present)
    threads = threads_for(out.ne[0] // width)
    held = next((n for n in (1, 2, 4) if n * threads * width >= out.ne[0]), 0)
    together = fixed is not None and width == 4 and held > 0
    flags = (str(flag).lower() for flag in (weight is not None, together))
    call.launch(
        "norm.cu",
        f"rms_norm<{width}, {held}, {', '.join(flags)}>",
        grid=row_grid(out),
        block=threads,
        args=[
            out.tensor,
            a.tensor,
            (weight or a).tensor,
            np.float32(eps),
            (plus or ABSENT).tensor,
            (total or ABSENT).tensor,
            fixed.pointer if fixed is not None and together else np.uint64(0),
        ],
    )
    if fixed is not None and not together:
        launch_quantize(call, out, fixed.pointer, 2)
