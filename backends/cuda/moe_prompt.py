"""The experts of a prompt and their weighted sum, as one step.

Where the kernel for Hopper can compute the products, what one hands to the next is f16, in scratch:

    up, gate   rows that `down` reads, in the order of experts
    down       short rows that the sum reads (kernels/include/short_rows.cuh)

If a norm is behind the sum, as that of the next layer, it is part of the step; so is the sum over
the experts of another GPU.

Numbers that f16 cannot hold are kept beside it; `rescale_rows` and the sum look for them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from pyggml import ops
from pyggml.backends.cuda import peer_rows
from pyggml.backends.cuda.argument import Argument
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import blocks_for
from pyggml.backends.cuda.launch import ABSENT, Call, Launch, Operand
from pyggml.backends.cuda.linear import experts, ring
from pyggml.backends.cuda.linear.common import PREPARE, aligned, dense
from pyggml.backends.cuda.linear.halves import DEPTH, half_of, rows_and_scales, tile_scratch
from pyggml.backends.cuda.linear.routes import Product
from pyggml.backends.cuda.moe import launch_sum, sums
from pyggml.backends.cuda.norm import EACH, NO_NORM, left_norm, record_norm, row_threads, weighted
from pyggml.backends.cuda.peer_sum import Part, joint_sum, record_sum
from pyggml.dtypes import F16, F32
from pyggml.node import Node
from pyggml.ops.leaf import constant_op
from pyggml.spec import Ne

FILE = "moe_prompt.cu"
#: Where the norm is left as f16; products read theirs from call["halves"].
LEFT = "left_halves"


def sum_of_experts(node: Node, run: Run) -> Fused | None:
    """mul_multi_add(down x, w) + c + d, of a prompt's tokens, also with x = moe_up_gate(b)."""
    return _sum_of_experts(node, run, None)


def normed_sum_of_experts(node: Node, run: Run) -> Fused | None:
    """rms_norm(x) * w of such a sum x; it stays in memory if others read it."""
    match = weighted(node, run)
    if match is None or match[0] not in run.number:
        return None
    x, normed, weight = match
    return _sum_of_experts(x, run, Norm(x, normed, node, weight))


def joint_sum_of_experts(node: Node, run: Run) -> Fused | None:
    """rms_norm(x) * w with x = such a sum of all GPUs + a, as joint_sum_norm of peer_sum.py."""
    match = joint_sum(node, run)
    if match is None or not peer_rows.width_of(match.joint):
        return None
    joint, x, plus, normed, weight = match
    part = joint["part"]
    if not run.only(part, joint):
        return None
    return _sum_of_experts(part, run, Norm(x, normed, node, weight, joint, plus))


class Norm(NamedTuple):
    """What is behind a sum: rms_norm(x) * weight, of x = the sum, or of x = the sum of those of all
    GPUs + residual."""

    x: Node
    normed: Node
    last: Node
    weight: Node
    joint: Node | None = None
    residual: Node | None = None

    @property
    def eps(self) -> float:
        eps: float = self.normed.attrs["eps"]
        return eps


def _sum_of_experts(node: Node, run: Run, norm: Norm | None) -> Fused | None:
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
    reads |= dict(zip(("plus", "plus2"), more))
    results = {}
    if norm is not None:
        results = {} if run.only(norm.x, norm.normed) else {"sum": norm.x}
        reads["weight"] = norm.weight
        if norm.joint is not None and norm.residual is not None:
            nodes, reads["residual"] = (*nodes, norm.joint, norm.x), norm.residual
            more, scratch = (*more, norm.residual), scratch + aligned(node.spec.nbytes)
        nodes = (*nodes, norm.normed, norm.last)
    return Fused(
        nodes,
        reads,
        partial(_record, hidden=None if hidden is None else hidden.ne, norm=norm),
        results=results,
        inplace=more,
        halves=0 if norm is None else 1,
        scratch=scratch,
        product=down,
        rows=None if hidden is None else hidden["b"],
        at=None if norm is None else norm.joint,
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


def _record(call: Call, hidden: Ne | None, norm: Norm | None) -> None:
    """hidden: the sizes of what up and gate compute, if they are part of the step."""
    down, ids, shares = call["down"], call["ids"], call["shares"]
    out, joint = call.get("sum") or call.out, None if norm is None else norm.joint
    if joint is not None:
        out = dense(call.scratch(joint.spec.nbytes), joint.ne, F32)
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
    _record_sum(call, out, norm, (rows, short, shares, plus))


def _record_sum(
    call: Call,
    out: Operand,
    norm: Norm | None,
    terms: tuple[Operand, experts.ShortRows | None, Operand, list[Operand]],
) -> None:
    """Record the weighted sum into `out`, which is this GPU's part if others have some, and what is
    behind it. terms: the rows, f32 or short, their weights, and what is added."""
    own, (rows, short, shares, plus) = None, terms
    joint = None if norm is None else norm.joint
    if short is None:
        launch_sum(call, out, rows, shares)
    else:
        args: list[Argument] = [rows.pointer, *short, shares.tensor, *(x.tensor for x in plus)]
        left = None if norm is None or joint is not None else left_norm(call, norm.eps, LEFT)
        most, threads = (256, 256) if left is None else row_threads(out.ne[0])
        total = replace(out, ptr=0) if left and call.get("sum") is None else out
        call.launch(
            FILE,
            f"add_short<{most}, {str(left is not None).lower()}>",
            grid=(out.ne[1], blocks_for(out.ne[0], most * EACH)),
            block=threads,
            args=[total.tensor, *args, left or NO_NORM],
        )
        if left is not None:
            return
        launch = call.records[-1]
        if plus[1] is ABSENT and isinstance(launch, Launch):
            own = Part(FILE, "add_short_joint", tuple(args[:-1]), (launch,))
    if norm is not None and joint is None:
        record_norm(call, norm.eps, out, None, LEFT)
    elif norm is not None and joint is not None:
        record_sum(call, joint, norm.eps, out, out.ptr, call["residual"], LEFT, own)


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
