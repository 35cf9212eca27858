"""Mutants of meanings and of weights.

One of a meaning is `fn(right, *nodes, **attributes) -> node`; one of weights has the arguments of
`Backend.weight` behind the right one.
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
    lambda right, *src, swapped, **rest: right(*src, swapped=not swapped, **rest)
)
meaning("moe_up_gate", "up and gate swapped")(
    lambda right, up, gate, *src, **rest: right(gate, up, *src, **rest)
)
meaning("moe_up_gate", "SiLU for every activation")(
    lambda right, *src, act, **rest: right(*src, act="silu", **rest)
)
meaning("fused_up_gate", "up and gate swapped")(
    lambda right, up, gate, b, **rest: right(gate, up, b, **rest)
)
meaning("mul_multi_add", "the sum without the weights")(lambda right, a, b: ops.multi_add(a))


@meaning("glu", "without the activation of two sources")
def _(right: Any, a: Node, b: Node | None, **rest: Any) -> Node:
    made: Node = right(a, b, **rest) if b is None else ops.mul(a, b)
    return made


@meaning("moe_up_gate", "the first row of b for every expert")
def _(right: Any, up: Node, gate: Node, b: Node, ids: Node, **rest: Any) -> Node:
    made: Node = right(up, gate, ops.view(b, ne=(b.ne[0], 1, b.ne[2])), ids, **rest)
    return made


# -- weights ------------------------------------------------------------------------------------


def _kept(order: Any) -> Wrong:
    """Weights whose array, as it is stored, is put into another order."""

    def run(right: Any, constant: Node, layout: Any, data: Any) -> Any:
        return right(constant, layout, np.ascontiguousarray(order(data)))

    return run


weight("mul_mat", "rows from the last to the first")(_kept(lambda a: a[..., ::-1, :]))
weight("mul_mat_id", "experts from the last to the first")(_kept(lambda a: a[:, ::-1]))
weight("add", "the first row for all")(_kept(lambda a: np.broadcast_to(a[..., :1, :], a.shape)))


@weight("mul_mat", "columns after columns where they are floats")
@_kept
def _(a: Any) -> Any:
    return a if a.dtype == np.uint8 else a.swapaxes(-1, -2).reshape(a.shape)


@weight("get_rows", "the bytes of a row's blocks in two planes")
@_kept
def _(a: Any) -> Any:
    if a.dtype != np.uint8:
        return a
    return a.reshape(*a.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(a.shape)
