"""Matrix products: block types decoded in our kernels, plain types by cuBLAS for many columns.

    columns of b    block types                         f32, f16, bf16
    up to 8         vec: 16-bit fixed-point b           vec_plain (f16, bf16: 1 column)
    more            tile: f16 on the tensor cores       cuBLAS in the type of a

Of block matrices with more than 8 Mi elements up to 4 columns are `vec`'s. Up to 128 columns,
blocks of `tile` share the k of a tile where there are too few tiles to fill a GPU (of one matrix:
up and gate together do not). mxfp4 is bf16 on the tensor cores.

prec="f32" keeps to `vec` with 24-bit b for block types, and to f32 products for plain ones.
"""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.geometry import blocks_for
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear import blocks, plain
from pyggml.backends.cuda.linear.blocks import CLASS, half_of
from pyggml.backends.cuda.linear.common import (
    PREPARE,
    act_of,
    aligned,
    dense,
    in_blocks,
    is_few,
    rows_in,
)
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import F32
from pyggml.node import Node


def product_scratch(a: Node, b: Node, exact: bool) -> int:
    if in_blocks(a.dtype):
        if is_few(a.ne, b.ne, exact):
            return blocks.vec_scratch(b.ne, 3 if exact else 2)
        return blocks.tile_scratch(b.ne) + blocks.split_scratch(a.ne, b.ne)
    if not by_cublas(a, b, exact):
        return 0
    return plain.many_plain_scratch(a.ne, a.dtype, b.ne, exact)


def by_cublas(a: Node, b: Node, exact: bool) -> bool:
    """Whether the product is left to cuBLAS."""
    return not in_blocks(a.dtype) and not plain.is_few(a.dtype, a.ne, b.ne, exact)


def widest(*classes: str) -> str:
    """The class of a result that is computed through all of these."""
    return max(classes, key=("f32", "f16", "bf16").index)


def product_numeric(a: Node, b: Node, exact: bool) -> str:
    if in_blocks(a.dtype):
        few = is_few(a.ne, b.ne, exact)
        return "f32" if exact else "f16" if few else CLASS[half_of(a.dtype)]
    return "f32" if exact or not by_cublas(a, b, exact) else a.dtype.name


def is_exact(node: Node) -> bool:
    """Whether nothing less than f32 is allowed."""
    return bool(node.attrs["prec"] == "f32")


def operands(node: Node, matrix: int = 0) -> tuple[Node, Node, bool]:
    a, b = node.src[matrix], node.src[-1]
    assert a is not None and b is not None
    return a, b, is_exact(node)


@kernel(
    ops.mul_mat,
    types=None,
    scratch=lambda node: product_scratch(*operands(node)),
    numeric=lambda node: product_numeric(*operands(node)),
    cublas=lambda node: by_cublas(*operands(node)),
)
def mul_mat(call: Call) -> None:
    product(call, call.operand(0), call.operand(1), call.out)


def product(call: Call, a: Operand, b: Operand, y: Operand) -> None:
    if in_blocks(a.dtype):
        blocks.product(call, (a,), b, y, is_exact(call.node))
    else:
        plain.product(call, a, b, y, is_exact(call.node))


def together(up: Operand | Node, gate: Operand | Node) -> bool:
    """Whether one kernel computes both products."""
    same_layout = getattr(up, "layout", None) == getattr(gate, "layout", None)
    return up.dtype is gate.dtype and in_blocks(up.dtype) and same_layout


def _fused_scratch(node: Node) -> int:
    up, gate = (product_scratch(*operands(node, i)) for i in range(2))
    return up + aligned(4 * node.spec.elements) + gate


def _fused_numeric(node: Node) -> str:
    return widest(*(product_numeric(*operands(node, i)) for i in range(2)))


def gate_rows(call: Call, gate: Operand) -> None:
    """out = act(gate) * out."""
    y = call.out
    columns = rows_in(y.ne)
    call.launch(
        PREPARE,
        "gate_rows",
        grid=min(blocks_for(y.ne[0] * columns), 1 << 16),
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
    numeric=_fused_numeric,
    cublas=lambda node: any(by_cublas(*operands(node, i)) for i in range(2)),
)
def fused_up_gate(call: Call) -> None:
    up, gate, b = (call.operand(i) for i in range(3))
    if together(up, gate) and not is_exact(call.node):
        blocks.product(call, (up, gate), b, call.out, False)
        return
    other = beside(call)
    product(call, up, b, call.out)
    product(call, gate, b, other)
    gate_rows(call, other)
