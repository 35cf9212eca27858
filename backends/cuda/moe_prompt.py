"""The last product of a prompt's experts with their weighted sum, as one step.

The product leaves its results in half the bytes (kernels/include/short_rows.cuh), where the kernel
for Hopper can compute it. They are in scratch.
"""

from __future__ import annotations

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import blocks_for
from pyggml.backends.cuda.launch import ABSENT, Call
from pyggml.backends.cuda.linear import experts
from pyggml.backends.cuda.linear.common import aligned, dense
from pyggml.backends.cuda.linear.routes import Product
from pyggml.backends.cuda.moe import FILE, launch_sum, sums
from pyggml.dtypes import F32
from pyggml.node import Node
from pyggml.spec import Ne

#: Elements that a thread adds up at once.
EACH = 8


def sum_of_experts(node: Node, run: Run) -> Fused | None:
    """mul_multi_add(down x, w) + c + d, of a prompt's tokens."""
    match = sums(node, run, 2)
    if match is None:
        return None
    (total, *additions), more = match
    down = total["a"]
    if down.op is not ops.mul_mat_id or not run.only(down, total) or down.ne[0] % EACH:
        return None
    product = Product.of(down)
    if product.route != "tile" or not product.in_order:
        return None
    weights = down.op.weights[0]
    reads = {weights: down[weights], "b": down["b"], "ids": down["ids"], "shares": total["b"]}
    return Fused(
        (down, total, *additions),
        {**reads, **dict(zip(("plus", "plus2"), more))},
        _record,
        inplace=more,
        scratch=product.scratch + _bytes(down.ne),
        product=down,
    )


def _bytes(ne: Ne) -> int:
    """Of the results, which are f32 on other GPUs."""
    return aligned(4 * ne[0] * ne[1] * ne[2])


def _record(call: Call) -> None:
    weights, ids, shares, out = (
        call[ops.mul_mat_id.weights[0]],
        call["ids"],
        call["shares"],
        call.out,
    )
    ne = (out.ne[0], *ids.ne[:2], 1)
    plus = [call.get(name) or ABSENT for name in ("plus", "plus2")]
    rows = dense(call.scratch(_bytes(ne)), ne, F32)
    adjacent = all(x.nb[0] in (0, 4) and x.aligned(16) for x in (out, *plus))
    short = experts.tile(call, (weights,), call["b"], ids, rows, short=adjacent)
    if short is None:
        launch_sum(call, rows, shares)
        return
    call.launch(
        FILE,
        "add_short",
        grid=(out.ne[1], blocks_for(out.ne[0], 256 * EACH)),
        block=256,
        args=[out.tensor, rows.pointer, *short, shares.tensor, *(x.tensor for x in plus)],
    )
