"""The experts of a prompt and their weighted sum, as one step.

Where the kernel for Hopper can compute the products, what one hands to the next is f16, in scratch:

    up, gate   rows that `down` reads, in the order of experts
    down       short rows that the sum reads (kernels/include/short_rows.cuh)

If a norm is behind the sum, as that of the next layer, it is part of the step.

Numbers that f16 cannot hold are kept beside it; `rescale_rows` and the sum look for them.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from functools import partial

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.argument import Struct, Tensor
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import blocks_for
from pyggml.backends.cuda.launch import ABSENT, Call, Operand
from pyggml.backends.cuda.linear import experts, ring
from pyggml.backends.cuda.linear.common import PREPARE, aligned, dense
from pyggml.backends.cuda.linear.halves import DEPTH, half_of, rows_and_scales, tile_scratch
from pyggml.backends.cuda.linear.routes import Product
from pyggml.backends.cuda.moe import launch_sum, sums
from pyggml.backends.cuda.norm import record_norm, weighted
from pyggml.dtypes import F16, F32
from pyggml.node import Node
from pyggml.ops.leaf import constant_op
from pyggml.spec import Ne

#: Elements that a thread adds up at once, and the most threads of a block that has a whole token.
EACH, THREADS = 8, (256, 512, 1024)


class Normed(Struct):
    """The struct `Normed` of moe_prompt.cu."""

    _fields_ = (
        ("y", Tensor),
        ("w", Tensor),
        ("eps", ctypes.c_float),
        ("halves", ctypes.c_uint64),
        ("scales", ctypes.c_uint64),
    )


NO_NORM = Normed(y=ABSENT.tensor, w=ABSENT.tensor, eps=0.0, halves=0, scales=0)


def sum_of_experts(node: Node, run: Run) -> Fused | None:
    """mul_multi_add(down x, w) + c + d, of a prompt's tokens, also with x = moe_up_gate(b)."""
    return _sum_of_experts(node, run, None)


def normed_sum_of_experts(node: Node, run: Run) -> Fused | None:
    """rms_norm(x) * w of such a sum x; it stays in memory if others read it."""
    match = weighted(node, run)
    if match is None or match[0] not in run.number:
        return None
    return _sum_of_experts(match[0], run, (match[1], node, match[2]))


def _sum_of_experts(node: Node, run: Run, norm: tuple[Node, Node, Node] | None) -> Fused | None:
    """norm: what normalizes the sum `node`, that times the weight, and the weight."""
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
    hidden = down["b"] if _can_hand_on(down["b"], down, run) else None
    reads = {"down": down[down.op.weights[0]], "ids": down["ids"], "shares": total["b"]}
    scratch = product.scratch + _bytes(down.ne)
    if hidden is None:
        reads["b"] = down["b"]
    else:
        reads |= {"b": hidden["b"], "up": hidden["up"], "gate": hidden["gate"]}
        inner = max(each.scratch for each in Product.all_of(hidden))
        scratch = max(inner, scratch) + _handed(hidden.ne)
    nodes = (hidden, down, total, *additions) if hidden else (down, total, *additions)
    results, eps = {}, None
    if norm is not None:
        normed, last, weight = norm
        nodes, reads["weight"], eps = (*nodes, normed, last), weight, normed.attrs["eps"]
        results = {} if run.only(node, normed) else {"sum": node}
    return Fused(
        nodes,
        reads | dict(zip(("plus", "plus2"), more)),
        partial(_record, hidden=None if hidden is None else hidden.ne, eps=eps),
        results=results,
        inplace=more,
        halves=0 if norm is None else 1,
        scratch=scratch,
        product=down,
        rows=None if hidden is None else hidden["b"],
    )


def _can_hand_on(hidden: Node, down: Node, run: Run) -> bool:
    """Whether up and gate can write what down reads: whole steps of f16, after silu. Weights that a
    run loads stay apart, for each load goes on beside the product before."""
    if hidden.op is not ops.moe_up_gate or not run.only(hidden, down):
        return False
    up, gate, last = hidden["up"], hidden["gate"], down[down.op.weights[0]]
    product, layouts = Product.of(hidden), {run.layout(up), run.layout(gate)}
    return (
        (product.route, product.in_order) == ("tile", True)
        and (up.dtype, layouts) == (gate.dtype, {"tiles8"})
        and hidden["ids"] is down["ids"]
        and up.ne[2] == last.ne[2]
        and half_of(up.dtype) == half_of(last.dtype) == "__half"
        and all(w.root.op is constant_op for w in (up, gate, last))
        and (hidden.attrs["act"], hidden.attrs["limit"]) == ("silu", None)
        and up.ne[1] % DEPTH == 0
    )


def _bytes(ne: Ne) -> int:
    """Of results, which are f32 on other GPUs."""
    return aligned(4 * ne[0] * ne[1] * ne[2])


def _rows(ne: Ne) -> Ne:
    return ne[0], ne[1] * ne[2], 1, 1


def _handed(ne: Ne) -> int:
    """Of what up and gate leave: rows and their scales, further words, and which rows have some. Or
    f32."""
    pairs = ne[1] * ne[2]
    return max(tile_scratch(_rows(ne)) + aligned(2 * ne[0] * pairs, 4 * pairs), _bytes(ne))


def _record(call: Call, hidden: Ne | None, eps: float | None) -> None:
    """hidden: the sizes of what up and gate compute, if they are part of the step; eps: of the norm
    behind the sum, if there is one."""
    down, ids, shares = call["down"], call["ids"], call["shares"]
    out = call.get("sum") or call.out
    plus = [call.get(name) or ABSENT for name in ("plus", "plus2")]
    adjacent = all(x.nb[0] in (0, 4) and x.aligned(16) for x in (out, *plus))
    ne = (out.ne[0], *ids.ne[:2], 1)
    b, handed, short = call["b"], None, None
    if hidden is not None:
        b = dense(call.scratch(_handed(hidden)), hidden, F32)
        with call.briefly():
            if adjacent and ring.can_ring(call, (down,), dense(0, ne, F32)):
                handed = _hand_on(call, hidden, b.ptr)
            if handed is None:
                experts.tile(call, (call["up"], call["gate"]), call["b"], ids, b)
    rows = dense(call.scratch(_bytes(ne)), ne, F32)
    if handed is None:
        short = experts.tile(call, (down,), b, ids, rows, short=adjacent)
    else:
        lists = experts.lists_of(call, ids, down.ne[2], b)
        ring.launch(call, (down,), rows, handed, lists.columns, lists.width, short=True)
        short = experts.ShortRows(np.uint64(lists.places), handed[1])
    if short is None:
        launch_sum(call, out, rows, shares)
        norm = None
    else:
        norm = None if eps is None else _norm_of(call, eps)
        n = out.ne[0]
        threads = 256 if norm is None else next(t for t in THREADS if n <= EACH * t)
        total = replace(out, ptr=0) if norm and call.get("sum") is None else out
        call.launch(
            "moe_prompt.cu",
            f"add_short<{threads}, {str(norm is not None).lower()}>",
            grid=(out.ne[1], blocks_for(n, threads * EACH)),
            block=min(threads, 32 * blocks_for(n, 32 * EACH)) if norm else threads,
            args=[
                total.tensor, rows.pointer, *short, shares.tensor, *(x.tensor for x in plus),
                norm or NO_NORM,
            ],
        )  # fmt: skip
    if eps is not None and norm is None:
        record_norm(call, eps, out, None)


def _norm_of(call: Call, eps: float) -> Normed | None:
    """The kernel's argument if the sum can leave the norm."""
    out, weight, halves = call.out, call["weight"], call.get("left_halves")
    fits = out.ne[0] <= EACH * THREADS[-1] and out.ne[0] % DEPTH == 0
    adjacent = out.nb[0] == weight.nb[0] == 4 and out.aligned(16) and weight.aligned(16)
    if halves is None or not fits or not adjacent:
        return None
    rows, scales = rows_and_scales(out.ne, halves.ptr)
    y = replace(out, ptr=0) if call.unread else out
    return Normed(y=y.tensor, w=weight.tensor, eps=eps, halves=int(rows), scales=int(scales))


def _hand_on(call: Call, ne: Ne, at: int) -> tuple[np.uint64, np.uint64] | None:
    """Record up and gate, whose results are written as what down reads; where the rows and their
    scales are. None if the kernel for Hopper cannot."""
    up, gate, ids, b = call["up"], call["gate"], call["ids"], call["b"]
    k, pairs, further = ne[0], experts.pairs_of(ids.ne), tile_scratch(_rows(ne))
    y = Operand(at, _rows(ne), (2, 2 * k, further, further), F16)
    if not ring.can_ring(call, (up, gate), y):
        return None
    are_long = at + further + aligned(2 * k * pairs)
    rows, scales = rows_and_scales(_rows(ne), at)
    lists = experts.lists_of(call, ids, up.ne[2], b)
    halves = experts.ordered(call, up, b, ids, lists.places, are_long, call.get("rows"))
    ring.launch(
        call, (up, gate), y, halves, lists.columns, lists.width,
        short=True, handed=(int(scales), are_long),
    )  # fmt: skip
    call.launch(
        PREPARE,
        "rescale_rows",
        grid=blocks_for(pairs, 8),
        block=256,
        args=[
            rows, scales, np.uint64(are_long), np.uint64(lists.places),
            np.int32(pairs), np.int32(k), np.int64(further),
        ],
    )  # fmt: skip
    return rows, scales
