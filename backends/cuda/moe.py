"""Mixture of experts, apart from its products: top k within groups, weighted sums."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import blocks_for, row_grid, threads_for
from pyggml.backends.cuda.launch import ABSENT, Call, Operand
from pyggml.backends.cuda.reduce import power_of_two
from pyggml.backends.cuda.table import kernel
from pyggml.node import Node
from pyggml.ops.reduce import row_length

FILE = "moe.cu"
#: Bytes of shared memory that a block can use on every GPU from 8.0 on.
LEAST_SHARED = 99 << 10


def launch_sum(call: Call, out: Operand, a: Operand, weights: Operand | None = None) -> None:
    """Record out = sum over experts of a (times weights), + plus, + plus2."""
    first, second = (call.get(name) or ABSENT for name in ("plus", "plus2"))
    call.launch(
        FILE,
        f"multi_add<{'false' if weights is None else 'true'}>",
        grid=(out.ne[1], blocks_for(out.ne[0])),
        block=256,
        args=[out.tensor, a.tensor, (weights or a).tensor, first.tensor, second.tensor],
    )


@kernel(ops.multi_add)
def multi_add(call: Call) -> None:
    launch_sum(call, call.out, call["a"])


@kernel(ops.mul_multi_add)
def mul_multi_add(call: Call) -> None:
    launch_sum(call, call.out, call["a"], call["b"])


def sum_and_more(node: Node, run: Run) -> Fused | None:
    """mul_multi_add(a, w) + b + c: routed experts, shared experts, residual.

    The sums keep this order, whichever side of an addition the sum over experts is on.
    """
    match = sums(node, run, 2)
    if match is None:
        return None
    nodes, more = match
    reads = {"a": nodes[0]["a"], "b": nodes[0]["b"], **dict(zip(("plus", "plus2"), more))}
    return Fused(nodes, reads, mul_multi_add, inplace=more)


def sums(node: Node, run: Run, most: int) -> tuple[tuple[Node, ...], tuple[Node, ...]] | None:
    """A mul_multi_add and up to `most` additions that end in `node`, and the nodes they add."""
    if node.op is ops.mul_multi_add:
        return (node,), ()
    if node.op is not ops.add or not most:
        return None
    left, right = node["a"], node["b"]
    for inner, other in ((left, right), (right, left)):
        if inner in run.number and run.only(inner, node) and inner.ne == other.ne == node.ne:
            match = sums(inner, run, most - 1)
            if match is not None:
                return (*match[0], node), (*match[1], other)
    return None


def _shared(node: Node) -> int:
    """Bytes of shared memory for the keys of experts and groups, and for the scores."""
    n, groups = row_length(node), int(node.attrs["n_group"])
    return 8 * power_of_two(n) + 8 * groups + 4 * n


def _too_many(node: Node) -> str | None:
    if _shared(node) <= LEAST_SHARED:
        return None
    return f"{row_length(node)} experts do not fit into shared memory"


@kernel(ops.grouped_topk, refuses=_too_many)
def grouped_topk(call: Call) -> None:
    a, attrs = call["a"], call.attrs
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
