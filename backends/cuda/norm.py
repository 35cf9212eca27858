"""Normalisation of rows, with the weight that multiplies it."""

from __future__ import annotations

from functools import partial

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.fusion import Alone, Fused, fuses
from pyggml.backends.cuda.geometry import pack_width, row_grid, threads_for
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import F32
from pyggml.graph import Node


@kernel(ops.rms_norm, inplace=(0,))
def rms_norm(call: Call) -> None:
    _norm(call, eps=call.attrs["eps"])


@fuses(ops.mul)
def norm_times_row(node: Node, alone: Alone) -> Fused | None:
    """rms_norm(x) * w, w one row."""
    normed, weight = node.src
    assert normed is not None and weight is not None
    if normed.op is not ops.rms_norm or not alone(normed):
        return None
    x = normed.src[0]
    if x is None or weight.dtype is not F32 or weight.ne != (x.ne[0], 1, 1, 1):
        return None
    record = partial(_norm, eps=normed.attrs["eps"])
    return Fused((normed, node), (x, weight), record, inplace=(x,))


def _norm(call: Call, eps: float) -> None:
    """Record out = source 0, normalised, times source 1 where there is one."""
    out, a = call.out, call.operand(0)
    weighted = len(call.src) > 1
    weight = call.operand(1) if weighted else a
    width = pack_width(out, a, weight)
    threads = threads_for(out.ne[0] // width)
    held = next((n for n in (1, 2, 4) if n * threads * width >= out.ne[0]), 0)
    call.launch(
        "norm.cu",
        f"rms_norm<{width}, {held}, {'true' if weighted else 'false'}>",
        grid=row_grid(out),
        block=threads,
        args=[out.tensor, a.tensor, weight.tensor, np.float32(eps)],
    )
