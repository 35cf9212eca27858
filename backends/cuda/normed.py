"""Norms that are left to what reads them (kernels/include/normed.cuh)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from pyggml import ops
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.fusion import Run, behind_reshapes
from pyggml.backends.cuda.launch import ABSENT, Call
from pyggml.backends.cuda.norm import can_fix, weighted
from pyggml.joint import joint_reduce
from pyggml.node import Node


class NormedRow(Struct):
    """The struct `NormedRow` of normed.cuh."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("x", "plus", "weight")),
        *((name, ctypes.c_float) for name in ("eps", "part")),
        ("n", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Norm:
    """rms_norm(x) * weight with x = a + b, of one row.

    nodes  x, the norm and the product
    """

    nodes: tuple[Node, Node, Node]

    @property
    def sum(self) -> Node:
        return self.nodes[0]

    @property
    def eps(self) -> float:
        return float(self.nodes[1].attrs["eps"])

    @property
    def reads(self) -> dict[str, Node]:
        total, _, product = self.nodes
        return {"row": total["a"], "row_plus": total["b"], "row_weight": product["b"]}


def norm_of(product: Node, run: Run) -> Norm | None:
    """The norm of a sum whose last node this is, if its kernel can be left out: a sum over GPUs
    normalizes with its own kernel."""
    known = product.op is ops.mul and product in run.number
    match = weighted(product, run) if known and can_fix(product) else None
    if match is None or match[0].op is not ops.add or match[0] not in run.number:
        return None
    total, normed, _ = match
    rows = total["a"], total["b"]
    if rows[0].ne != rows[1].ne or any(behind_reshapes(x).op is joint_reduce for x in rows):
        return None
    return Norm((total, normed, product))


def normed_row(call: Call, eps: float) -> NormedRow:
    """The kernel argument of a step that reads what a norm does."""
    row = call["row"]
    return NormedRow(
        x=row.ptr,
        plus=(call.get("row_plus") or ABSENT).ptr,
        weight=call["row_weight"].ptr,
        eps=eps,
        part=1 / row.ne[0],
        n=row.ne[0],
    )
