"""A product of a few columns whose result is copied with other dimensions in order, as one step: it
writes where the copy would. Values of heads, each a product of its own, come side by side."""

from __future__ import annotations

from functools import partial

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear.routes import Product
from pyggml.node import Node
from pyggml.ops.leaf import constant_op


def turned_product(node: Node, run: Run) -> Fused | None:
    """cont(permute(w b)): rows stay rows."""
    turned = node["a"]
    if turned.op is not ops.permute or turned.attrs["axes"][0] != 0:
        return None
    y = turned["a"]
    if y.op is not ops.mul_mat or not run.only(y, node) or y.dtype is not node.dtype:
        return None
    product, w = Product.of(y), y["a"]
    if product.route != "vec" or w.root.op is not constant_op:
        return None
    record = partial(_record, y=y, axes=turned.attrs["axes"])
    reads = {"a": w, "b": y["b"]}
    return Fused((y, node), reads, record, scratch=product.scratch)


def _record(call: Call, y: Node, axes: tuple[int, ...]) -> None:
    n0, n1, n2, n3 = (call.out.nb[axis] for axis in axes)
    out = Operand(call.out.ptr, y.ne, (n0, n1, n2, n3), y.dtype)
    Product.of(y).launches(call, (call["a"],), out)
