"""Matrix products: block types decoded in our kernels, plain types by cuBLAS for many columns.

    columns of b    block types                         f32, f16, bf16
    up to 8         vec: 16-bit fixed-point b           vec_plain (f16, bf16: 1 column)
    more            tile: f16 on the tensor cores       cuBLAS in the type of a

prec="f32" keeps to `vec` with 24-bit b for block types, and to f32 products for plain ones.
"""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.cuda import linear_blocks, linear_plain
from pyggml.backends.cuda.geometry import blocks
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear_blocks import CLASS, half_of
from pyggml.backends.cuda.linear_common import (
    FEW,
    PREPARE,
    act_of,
    aligned,
    dense,
    in_blocks,
    plain_type,
    rows_in,
    shape_of,
)
from pyggml.backends.cuda.packing import layout_of, repack
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import F32
from pyggml.graph import Node
from pyggml.ops.leaf import constant_op
from pyggml.transfer import origin

__all__ = ["layout_of", "repack"]


def refusal(node: Node) -> str | None:
    """Only constants of a block type without a decoder here become bf16."""
    for a in node.src[: 2 if node.op in (ops.fused_up_gate, ops.moe_up_gate) else 1]:
        assert a is not None
        weight = origin(a).op is constant_op
        if a.dtype.kind == "block" and not in_blocks(a.dtype) and not weight:
            return f"{a.dtype} is decoded when a weight is loaded, not in the graph"
        if rounded(a) and node.attrs.get("prec") == "f32":
            return f"a weight of {a.dtype} is kept as bf16, which is less than prec='f32' asks"
    return None


def product_scratch(a: Node, b: Node, exact: bool) -> int:
    columns = shape_of(a.ne, b.ne).columns
    if in_blocks(a.dtype):
        few = exact or columns <= FEW
        return (
            linear_blocks.vec_scratch(b.ne, 3 if exact else 2)
            if few
            else linear_blocks.tile_scratch(b.ne)
        )
    kind = plain_type(a.dtype)
    if linear_plain.is_few(kind, a.ne, b.ne, exact):
        return 0
    return linear_plain.many_plain_scratch(a.ne, kind, b.ne, exact)


def rounded(a: Node) -> bool:
    """Whether the weight is kept as bf16, rounded from what its blocks say."""
    return a.dtype.kind == "block" and not in_blocks(a.dtype)


def widest(*classes: str) -> str:
    """The class of a result that is computed through all of these."""
    return max(classes, key=("f32", "f16", "bf16").index)


def product_numeric(a: Node, b: Node, exact: bool) -> str:
    if rounded(a):
        return "bf16"
    if in_blocks(a.dtype):
        few = shape_of(a.ne, b.ne).columns <= FEW
        return "f32" if exact else "f16" if few else CLASS[half_of(a.dtype)]
    kind = plain_type(a.dtype)
    return "f32" if exact or linear_plain.is_few(kind, a.ne, b.ne, exact) else kind.name


def operands(node: Node) -> tuple[Node, Node, bool]:
    a, b = node.src[0], node.src[-1]
    assert a is not None and b is not None
    return a, b, node.attrs.get("prec") == "f32"


@kernel(
    ops.mul_mat,
    types=None,
    scratch=lambda node: product_scratch(*operands(node)),
    refuses=refusal,
    numeric=lambda node: product_numeric(*operands(node)),
)
def mul_mat(call: Call) -> None:
    a, b, exact = call.operand(0), call.operand(1), call.attrs["prec"] == "f32"
    if in_blocks(a.dtype):
        linear_blocks.product(call, (a,), b, call.out, exact)
    else:
        linear_plain.product(call, a, b, call.out, exact)


def together(up: Operand | Node, gate: Operand | Node) -> bool:
    """Whether one kernel computes both products."""
    same_layout = getattr(up, "layout", None) == getattr(gate, "layout", None)
    return up.dtype is gate.dtype and in_blocks(up.dtype) and same_layout


def _fused_scratch(node: Node) -> int:
    up, gate, b = node.src
    assert up is not None and gate is not None and b is not None
    apart = aligned(4 * node.spec.elements) + product_scratch(gate, b, False)
    return product_scratch(up, b, False) + apart


def _fused_numeric(up: Node | None, gate: Node | None, b: Node | None) -> str:
    assert up is not None and gate is not None and b is not None
    return widest(*(product_numeric(a, b, False) for a in (up, gate)))


def gate_rows(call: Call, gate: Operand) -> None:
    """out = act(gate) * out."""
    y = call.out
    columns = rows_in(y.ne)
    call.launch(
        PREPARE,
        "gate_rows",
        grid=min(blocks(y.ne[0] * columns), 1 << 16),
        block=256,
        args=[y.tensor, gate.pointer, act_of(call), np.uint32(columns)],
    )


def beside(call: Call) -> Operand:
    """A tensor like the result in scratch."""
    return dense(call.scratch(4 * call.out.ne[0] * rows_in(call.out.ne)), call.out.ne, F32)


@kernel(
    ops.fused_up_gate,
    types=None,
    scratch=_fused_scratch,
    refuses=refusal,
    numeric=lambda node: _fused_numeric(*node.src),
)
def fused_up_gate(call: Call) -> None:
    up, gate, b = (call.operand(i) for i in range(3))
    if together(up, gate):
        linear_blocks.product(call, (up, gate), b, call.out, False)
        return
    other = beside(call)
    for a, y in ((up, call.out), (gate, other)):
        if in_blocks(a.dtype):
            linear_blocks.product(call, (a,), b, y, False)
        else:
            linear_plain.product(call, a, b, y, False)
    gate_rows(call, other)
