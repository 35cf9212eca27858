"""Dense products: mul_mat and fused_up_gate of weights in tiles."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.cpu.linear.columns import X_BYTES
from pyggml.backends.cpu.linear.floats import add_product, float_refusal
from pyggml.backends.cpu.linear.products import gated, product
from pyggml.backends.cpu.linear.quantize import quantize
from pyggml.backends.cpu.native.pool import n_threads
from pyggml.backends.cpu.table import Call, Operand, kernel
from pyggml.backends.cpu.weights.forms import GROUP, Tiles, tiles_of
from pyggml.backends.cpu.weights.tiles import may_be_tiled
from pyggml.dtypes import TYPES
from pyggml.node import Node

#: Bytes of tiles that a thread takes at once; less if there are too few for all threads.
SHARE = 1 << 16


def refusal(node: Node) -> str | None:
    """Why no product of weights in tiles can be the node; None if one can."""
    if not may_be_tiled(node, *node.op.weights):
        return f"{node.op.name} needs constants of block types"
    if node.attrs["prec"] == "f32":
        return "products here quantize activations, which prec='f32' forbids"
    if node.dtype.name != "f32":
        return f"{node.op.name} does not write {node.dtype}"
    return None


def x_bytes(node: Node) -> int:
    """Bytes of the quantized b of a product."""
    b = node["b"]
    return b.spec.elements // GROUP * X_BYTES


def quantized(call: Call, b: Operand) -> int:
    """Add the quantization of b to the program; the bytes of a row."""
    groups, rows = b.ne[0] // GROUP, b.ne[1] * b.ne[2] * b.ne[3]
    call.add(quantize(b.type), call.scratch, b.ptr, *b.nb, b.ne[1], b.ne[2], rows, groups)
    return groups * X_BYTES


def placed(weight: Operand) -> tuple[Tiles, tuple[int, int]]:
    """The sizes of a weight in tiles, and as arguments: its address and the bytes of a tile."""
    tiles = tiles_of(TYPES[weight.type], weight.ne)
    return tiles, (weight.ptr, tiles.tile)


def share_of(tiles: Tiles) -> int:
    """Tiles that a thread takes at once."""
    most = max(1, SHARE // tiles.tile)
    return max(1, min(most, tiles.tiles // (4 * n_threads())))


def _floats(node: Node) -> bool:
    return node["a"].dtype.block == 1


@kernel(
    ops.mul_mat,
    types=None,
    scratch=lambda node: 0 if _floats(node) else x_bytes(node),
    refuses=lambda node: float_refusal(node) if _floats(node) else refusal(node),
    numeric=lambda node: "f32" if _floats(node) else "quantized",
)
def mul_mat(call: Call) -> None:
    if _floats(call.node):
        add_product(call)
        return
    a, b, out = call["a"], call["b"], call.out
    x_row = quantized(call, b)
    tiles, weight = placed(a)
    n, n2, n3, nb1, nb2 = *b.ne[1:], out.nb[1], out.nb[2]
    if a.ne[2] == a.ne[3] == 1 and (n == 1 or nb2 == n * nb1):
        nb1 = nb2 if n == 1 else nb1  # all items share the matrix, so they are columns of one
        n, n2 = n * n2, 1
    call.add(
        product(a.type), *weight, a.ne[1], tiles.tiles, tiles.groups, call.scratch, x_row,
        n * x_row, n, out.ptr, nb1, nb2, out.nb[3], n2, n2 * n3,
        max(1, n2 // a.ne[2]), n3 // a.ne[3], a.ne[2], share_of(tiles),
    )  # fmt: skip


@kernel(ops.fused_up_gate, types=None, scratch=x_bytes, refuses=refusal, numeric="quantized")
def fused_up_gate(call: Call) -> None:
    up, gate, b, out = call["up"], call["gate"], call["b"], call.out
    x_row = quantized(call, b)
    tiles, up_weight = placed(up)
    _, gate_weight = placed(gate)
    for i3, i2 in np.ndindex(b.ne[3], b.ne[2]):
        call.add(
            gated(up.type, gate.type, call.attrs["act"]), *up_weight, *gate_weight, up.ne[1],
            tiles.groups, call.scratch + (i3 * b.ne[2] + i2) * b.ne[1] * x_row, x_row, b.ne[1],
            out.ptr + i2 * out.nb[2] + i3 * out.nb[3], out.nb[1], share_of(tiles),
        )  # fmt: skip
