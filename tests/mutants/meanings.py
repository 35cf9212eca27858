"""Mutants of meanings and of weights.

A mutant of a meaning is `fn(right, *nodes, **attributes) -> node`. A mutant of weights is called
with the right function and the arguments of `Backend.weight`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyggml import ops
from pyggml.node import Node
from tests.mutants.mutant import Mutant, Wrong, maker

MUTANTS: list[Mutant] = []
meaning = maker(MUTANTS, "meaning")
weight = maker(MUTANTS, "weight")

# -- meanings -----------------------------------------------------------------------------------

meaning("glu", "halves swapped")(
    lambda right, *src, swapped, **attrs: right(*src, swapped=not swapped, **attrs)
)
meaning("moe_up_gate", "up and gate swapped")(
    lambda right, up, gate, *src, **attrs: right(gate, up, *src, **attrs)
)
meaning("moe_up_gate", "SiLU for every activation")(
    lambda right, *src, act, **attrs: right(*src, act="silu", **attrs)
)
meaning("fused_up_gate", "up and gate swapped")(
    lambda right, up, gate, b, **attrs: right(gate, up, b, **attrs)
)
for _op in ("glu", "moe_up_gate", "fused_up_gate"):
    meaning(_op, "without the limit")(
        lambda right, *src, limit, **attrs: right(*src, limit=None, **attrs)
    )
meaning("dsv4_hc_comb", "one iteration more")(
    lambda right, *src, n_iter, **attrs: right(*src, n_iter=n_iter + 1, **attrs)
)
meaning("dsv4_hc_maps", "one iteration more")(
    lambda right, *src, n_iter, **attrs: right(*src, n_iter=n_iter + 1, **attrs)
)
meaning("dsv4_hc_post", "the matrix transposed")(
    lambda right, *src: right(*src[:3], *(c and ops.transpose(c) for c in src[3:]))
)
meaning("dsv4_hc_post", "without the matrix")(lambda right, *src: right(*src[:3]))
meaning("mul_multi_add", "the sum without the weights")(lambda right, a, b: ops.multi_add(a))


@meaning("glu", "without the activation of two sources")
def _(right: Any, a: Node, b: Node | None, **attrs: Any) -> Node:
    result: Node = right(a, b, **attrs) if b is None else ops.mul(a, b)
    return result


@meaning("moe_up_gate", "the first row of b for every expert")
def _(right: Any, up: Node, gate: Node, b: Node, ids: Node, **attrs: Any) -> Node:
    first = ops.view(b, ne=(b.ne[0], 1, b.ne[2]))
    result: Node = right(up, gate, first, ids, **attrs)
    return result


# -- weights ------------------------------------------------------------------------------------


def _stored(order: Any) -> Wrong:
    """A mutant that stores a weight's data in another order."""

    def run(right: Any, constant: Node, layout: Any, data: Any) -> Any:
        return right(constant, layout, np.ascontiguousarray(order(data)))

    return run


weight("mul_mat", "rows in reverse order")(_stored(lambda a: a[..., ::-1, :]))
weight("mul_mat_id", "experts in reverse order")(_stored(lambda a: a[:, ::-1]))
weight("add", "the first row for all")(_stored(lambda a: np.broadcast_to(a[..., :1, :], a.shape)))


@weight("mul_mat", "floats stored by columns")
@_stored
def _(a: Any) -> Any:
    return a if a.dtype == np.uint8 else a.swapaxes(-1, -2).reshape(a.shape)


@weight("get_rows", "a row's even bytes before its odd ones")
@_stored
def _(a: Any) -> Any:
    if a.dtype != np.uint8:
        return a
    return a.reshape(*a.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(a.shape)
