"""Norms that are left to what reads them (kernels/include/normed.cuh)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

from pyggml import ops
from pyggml.backends.cuda.argument import Argument, Struct
from pyggml.backends.cuda.fusion import Run, behind_reshapes
from pyggml.backends.cuda.launch import ABSENT, Call, Form, Meets
from pyggml.backends.cuda.norm import can_fix, weighted
from pyggml.backends.cuda.peers import Round
from pyggml.joint import joint_reduce
from pyggml.node import Node


class NormedRow(Struct):
    """The struct `NormedRow` of normed.cuh."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("x", "plus", "weight")),
        *((name, ctypes.c_float) for name in ("eps", "part")),
        ("n", ctypes.c_int32),
    )


class SummedRow(Struct):
    """The struct `SummedRow` of rounds.cuh."""

    _fields_ = (("row", NormedRow), ("sum", Round))


def adds(row: NormedRow, form: Callable[[Argument], Form]) -> Meets:
    """How a launch that reads this row meets those of other GPUs, whose parts it adds."""
    return row.x, False, lambda total: form(SummedRow(row=row, sum=total))


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
    def joint(self) -> bool:
        """Whether one of the rows is a sum over GPUs."""
        return is_joint(self.sum["a"]) or is_joint(self.sum["b"])

    @property
    def reads(self) -> dict[str, Node]:
        total, _, product = self.nodes
        row, plus = rows_of(total)
        return {"row": row, "row_plus": plus, "row_weight": product["b"]}


def is_joint(row: Node) -> bool:
    return behind_reshapes(row).op is joint_reduce


def rows_of(total: Node) -> tuple[Node, Node]:
    """The rows that are added; if one is a sum over GPUs, that is the first."""
    a, b = total["a"], total["b"]
    return (b, a) if is_joint(b) and not is_joint(a) else (a, b)


def norm_of(product: Node, run: Run) -> Norm | None:
    """The norm of a sum whose last node this is, if its kernel can be left out."""
    known = product.op is ops.mul and product in run.number
    match = weighted(product, run) if known and can_fix(product) else None
    if match is None or match[0].op is not ops.add or match[0] not in run.number:
        return None
    total, normed, _ = match
    row, plus = rows_of(total)
    if row.ne != plus.ne or is_joint(plus) or (is_joint(row) and not is_alone(row, total, run)):
        return None
    return Norm((total, normed, product))


def is_alone(row: Node, reader: Node, run: Run) -> bool:
    """Whether only `reader` reads a sum over GPUs, through reshapes or not."""
    while row.op is ops.reshape:
        if row in run.keep:
            return False
        row = row["a"]
    return run.only(row, reader)


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
