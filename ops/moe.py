"""Mixture of experts: fused up and gate products, routing, weighted sums."""

from __future__ import annotations

from pyggml.dtypes import F32, I32
from pyggml.errors import ShapeError
from pyggml.node import Node
from pyggml.operation import op
from pyggml.ops.elementwise import Activation, gated, mul, want_limit
from pyggml.ops.linear import (
    expert_cost,
    expert_slices,
    mul_mat,
    mul_mat_id,
    want_experts,
)
from pyggml.ops.rules import Precision, outer_slices, want_ne, want_readable, want_rows, want_type
from pyggml.spec import Spec
from pyggml.traits import Axis, Cost, Cut, Ids, Slice

__all__ = ["fused_up_gate", "grouped_topk", "moe_up_gate", "mul_multi_add", "multi_add"]


@op(
    weights=("up", "gate"),
    ids=Ids("ids", of="up", axis=2),
    cost=expert_cost,
    slices=expert_slices,
)
def moe_up_gate(
    up: Node,
    gate: Node,
    b: Node,
    ids: Node,
    *,
    act: Activation = "silu",
    prec: Precision = "default",
    limit: float | None = None,
) -> Spec:
    """Two products by expert id and a gated activation in one op:

    y[:, e, t] = act(gate[:, :, ids[e, t]] x) * (up[:, :, ids[e, t]] x),   x = b[:, e % n_b, t]

    up, gate  any float or block type  [k, n_ff, n_expert]
    b         f32 or f16               [k, n_b, n_tokens]
    ids       i32                      [n_used, n_tokens]     a negative id gives a zero row
    y         f32                      [n_ff, n_used, n_tokens]
    act       silu, gelu or relu
    prec      "default" or "f32", as in mul_mat
    limit     y = act(min(gate.., limit)) * clamp(up.., -limit, limit), as in glu; None: no limit
    """
    want_limit(limit)
    want_experts(up, b, ids, "up")
    want_experts(gate, b, ids, "gate")
    want_ne("gate", gate, up.ne, "up's size")
    return Spec.of(F32, (up.ne[1], ids.ne[0], ids.ne[1]), 3)


@moe_up_gate.means
def _(
    up: Node,
    gate: Node,
    b: Node,
    ids: Node,
    *,
    act: Activation = "silu",
    prec: Precision = "default",
    limit: float | None = None,
) -> Node:
    x, g = (mul_mat_id(w, b, ids, prec=prec) for w in (gate, up))
    return gated(act, x, g, limit)


@op(weights=("up", "gate"))
def fused_up_gate(
    up: Node,
    gate: Node,
    b: Node,
    *,
    act: Activation = "silu",
    prec: Precision = "default",
    limit: float | None = None,
) -> Spec:
    """The dense form of moe_up_gate:  y = act(gate b) * (up b).

    up, gate  any float or block type  [k, n_ff]
    b         f32 or f16               [k, n_tokens, ne2, ne3]
    y         f32                      [n_ff, n_tokens, ne2, ne3]
    prec      "default" or "f32", as in mul_mat
    limit     as in moe_up_gate
    """
    want_limit(limit)
    for what, node in (("up", up), ("gate", gate)):
        want_readable(what, node)
        want_rows(what, node)
        want_ne(what, node, (b.ne[0], up.ne[1], 1, 1), "[k, n_ff] with b's k")
    want_type("b", b, ("f32", "f16"))
    return Spec.of(F32, (up.ne[1], *b.ne[1:]), max(b.spec.rank, 2))


@fused_up_gate.means
def _(
    up: Node,
    gate: Node,
    b: Node,
    *,
    act: Activation = "silu",
    prec: Precision = "default",
    limit: float | None = None,
) -> Node:
    return gated(act, mul_mat(gate, b, prec=prec), mul_mat(up, b, prec=prec), limit)


@fused_up_gate.cost
def _(node: Node) -> Cost:
    read = sum(s.spec.nbytes for s in node.src if s is not None)
    return Cost(4.0 * node.spec.elements * node["up"].ne[0], float(read + node.spec.nbytes))


@fused_up_gate.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if axis == 0:
        return Slice((Cut(1), Cut(1), None))
    return Slice((None, None, Cut(axis))) if isinstance(axis, int) else None


@op(slices=outer_slices)
def grouped_topk(a: Node, *, n_group: int, n_group_used: int, n_top: int, k: int) -> Spec:
    """Ids of the k best experts of the n_group_used best groups, best first.

    a  f32  [n_expert, n_tokens]     n_group groups of n_expert / n_group consecutive experts
    y  i32  [k, n_tokens]
    A group's score is the sum of its n_top best experts' (DeepSeek-V2: 1, DeepSeek-V3: 2).
    """
    want_type("a", a, ("f32",))
    if n_group < 1 or a.ne[0] % n_group:
        raise ShapeError(f"n_group={n_group} does not divide a.ne[0]={a.ne[0]} experts")
    size = a.ne[0] // n_group
    if not 1 <= n_group_used <= n_group:
        raise ShapeError(f"n_group_used={n_group_used} must be 1 to n_group={n_group}")
    if not 1 <= n_top <= size:
        raise ShapeError(f"n_top={n_top} must be 1 to {size}, the size of a group")
    if not 1 <= k <= size * n_group_used:
        raise ShapeError(
            f"k={k} must be 1 to {size * n_group_used}, the experts of {n_group_used} groups "
            f"of {size}"
        )
    return Spec.of(I32, (k, *a.ne[1:]), a.spec.rank)


def _token_slices(node: Node, axis: Axis, n: int) -> Slice | None:
    """The slice rule of sums over a token's experts: elements and tokens are independent."""
    sources = len(node.src)
    if axis == 0:
        return Slice((Cut(0), None)[:sources])
    return Slice((Cut(2),) * sources) if axis == 1 else None


@op(slices=_token_slices, linear=("a",))
def multi_add(a: Node) -> Spec:
    """Sum over the experts of each token:  y[:, t] = sum_e a[:, e, t].

    a  f32  [n, n_used, n_tokens]
    y  f32  [n, n_tokens]
    """
    want_type("a", a, ("f32",))
    if a.ne[3] != 1:
        raise ShapeError(f"a must have three dimensions, but its ne3 is {a.ne[3]}")
    return Spec.of(F32, (a.ne[0], a.ne[2]), 2)


@op(slices=_token_slices, linear=("a",))
def mul_multi_add(a: Node, b: Node) -> Spec:
    """Weighted sum over the experts of each token:  y[:, t] = sum_e a[:, e, t] b[0, e, t].

    a  f32  [n, n_used, n_tokens]
    b  f32  [1, n_used, n_tokens]
    y  f32  [n, n_tokens]
    """
    want_type("a", a, ("f32",))
    want_type("b", b, ("f32",))
    if a.ne[3] != 1:
        raise ShapeError(f"a must have three dimensions, but its ne3 is {a.ne[3]}")
    want_ne("b", b, (1, a.ne[1], a.ne[2], 1), "a weight for each row of a")
    return Spec.of(F32, (a.ne[0], a.ne[2]), 2)


@mul_multi_add.means
def _(a: Node, b: Node) -> Node:
    return multi_add(mul(a, b))
