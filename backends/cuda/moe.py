"""Mixture of experts beside its products: choice within groups, weighted sums."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.geometry import blocks, row_grid, threads_for
from pyggml.backends.cuda.launch import H200, Call, Operand
from pyggml.backends.cuda.reduce import power_of_two
from pyggml.backends.cuda.table import kernel
from pyggml.graph import Node
from pyggml.ops.reduce import row_length

FILE = "moe.cu"


def _sum(call: Call, weights: Operand) -> None:
    out, a = call.out, call.operand(0)
    call.launch(
        FILE,
        f"multi_add<{'false' if weights is a else 'true'}>",
        grid=(out.ne[1], blocks(out.ne[0])),
        block=256,
        args=[out.tensor, a.tensor, weights.tensor],
    )


@kernel(ops.multi_add)
def multi_add(call: Call) -> None:
    _sum(call, call.operand(0))


@kernel(ops.mul_multi_add)
def mul_multi_add(call: Call) -> None:
    _sum(call, call.operand(1))


def _shared(node: Node) -> int:
    """Bytes of keys of experts and groups, and of scores."""
    n, groups = row_length(node), int(node.attrs["n_group"])
    return 8 * power_of_two(n) + 8 * groups + 4 * n


def _too_many(node: Node) -> str | None:
    if _shared(node) <= H200.shared // 2:  # what every GPU from 8.0 on has
        return None
    return f"{row_length(node)} experts do not fit into shared memory"


@kernel(ops.grouped_topk, refuses=_too_many)
def grouped_topk(call: Call) -> None:
    a, attrs = call.operand(0), call.attrs
    padded = power_of_two(row_length(call.node))
    numbers = (padded, attrs["n_group"], attrs["n_group_used"], attrs["n_top"])
    call.launch(
        FILE,
        "grouped_topk",
        grid=row_grid(a),
        block=threads_for(padded // 2),
        args=[call.out.tensor, a.tensor, *map(np.int32, numbers)],
        shared=_shared(call.node),
    )
