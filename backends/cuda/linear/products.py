"""The ops that are matrix products; routes.py chooses their kernels."""

from __future__ import annotations

from pyggml import ops
from pyggml.backends.cuda.geometry import over_rows
from pyggml.backends.cuda.launch import Call, Operand
from pyggml.backends.cuda.linear.common import PREPARE, act_of, aligned, dense, limit_of, rows_in
from pyggml.backends.cuda.linear.routes import Product, together, widest
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import F32
from pyggml.node import Node


def _scratch(node: Node) -> int:
    """Bytes of scratch; for up and gate including the gate's result, as they may be two
    products."""
    products = Product.all_of(node)
    between = aligned(4 * node.spec.elements) if len(products) == 2 else 0
    return between + max(product.scratch for product in products)


def _numeric(node: Node) -> str:
    return widest(*(product.numeric for product in Product.all_of(node)))


def _cublas(node: Node) -> bool:
    return any(product.route == "cublas" for product in Product.all_of(node))


@kernel(ops.mul_mat, types=None, scratch=_scratch, numeric=_numeric, cublas=_cublas)
@kernel(ops.mul_mat_id, types=None, scratch=_scratch, numeric=_numeric)
def multiply(call: Call) -> None:
    (weights,) = call.node.op.weights
    Product.of(call.node).launches(call, (call[weights],), call.out)


@kernel(ops.fused_up_gate, types=None, scratch=_scratch, numeric=_numeric, cublas=_cublas)
@kernel(ops.moe_up_gate, types=None, scratch=_scratch, numeric=_numeric)
def up_gate(call: Call) -> None:
    up, gate, products = call["up"], call["gate"], Product.all_of(call.node)
    if together(up, gate) and not products[0].exact:
        products[0].launches(call, (up, gate), call.out)
        return
    y = call.out
    activated = dense(call.scratch(4 * y.ne[0] * rows_in(y.ne)), y.ne, F32)
    for product, weights, out in zip(products, (up, gate), (y, activated)):
        with call.briefly():
            product.launches(call, (weights,), out)
    _gate_rows(call, activated)


def _gate_rows(call: Call, gate: Operand) -> None:
    """out = act(gate) * out."""
    y, limit = call.out, limit_of(call.attrs)[1]
    grid, block = over_rows(y.ne[0], rows_in(y.ne))
    call.launch(
        PREPARE,
        "gate_rows_limited" if limit else "gate_rows",
        grid=grid,
        block=block,
        args=[y.tensor, gate.pointer, act_of(call), *limit],
    )
