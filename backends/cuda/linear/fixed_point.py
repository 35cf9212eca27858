"""Fixed-point activations for `vec`: b is quantized once for all products that read it.

Quantized activations that several products share are a node private to the backend, so the
planner sees their memory. A cache inside the runner would hide it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

from pyggml import ops
from pyggml.backends.cuda.fusion import CudaStep, Fused
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.linear.blocks import fixed_bytes, launch_quantize
from pyggml.backends.cuda.linear.common import in_blocks
from pyggml.backends.cuda.linear.routes import Product
from pyggml.backends.cuda.norm import can_prepare
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import TYPES
from pyggml.node import Node
from pyggml.operation import Op
from pyggml.ops.leaf import constant_op
from pyggml.spec import Spec
from pyggml.transfer import origin


def _rule(b: Node, *, levels: int, run: int) -> Spec:
    """b [k, columns] as written by `quantize` of linear_vec.cu. A backend-private op: user graphs
    never contain it.

    run  number of the call of `lower`: nodes lowered separately do not share fixed-point tensors
    """
    return Spec.of(TYPES["i8"], (fixed_bytes(b.ne, levels),))


fixed_point = Op(_rule, name="fixed_point")
_runs = count()


@kernel(fixed_point, types=None)
def prepare(call: Call) -> None:
    launch_quantize(call, call["b"], call.out.pointer, call.attrs["levels"])


def levels_of(node: Node) -> int:
    """Bytes per value of b in the fixed point that the product reads; 0 if it reads none.

    Only for products whose weights are constants: they read these before earlier steps have ended.
    """
    weights = [node[name] for name in node.op.weights]
    packed = all(in_blocks(w.dtype) and origin(w).op is constant_op for w in weights)
    return Product.of(node).levels if weights and packed else 0


def _rows_of(b: Node) -> Node:
    """The node whose rows b views unchanged."""
    while b.op is ops.reshape and b["a"].ne[0] == b.ne[0]:
        b = b["a"]
    return b


def prepare_once(steps: Sequence[CudaStep]) -> Iterator[CudaStep]:
    """The steps, with those inserted that quantize a b which several products read.

    If the step that computes b can also write it in fixed point, it does, even for one product.
    """
    readers: dict[Node, list[CudaStep]] = {}
    fixed_of: dict[CudaStep, Node] = {}
    run = next(_runs)
    for step in steps:
        if len(step.nodes) == 1 and (levels := levels_of(step.node)):
            fixed = fixed_point(_rows_of(step.node["b"]), levels=levels, run=run)
            readers.setdefault(fixed, []).append(step)
            fixed_of[step] = fixed
    prepared: set[Node] = set()
    for step in steps:
        if isinstance(step, Fused) and can_prepare(step):
            fixed = fixed_point(step.node, levels=2, run=run)
            if fixed in readers:
                prepared.add(fixed)
                step = _leaving(step, fixed)
        elif step in fixed_of:
            fixed = fixed_of[step]
            if fixed not in prepared and len(readers[fixed]) > 1:
                prepared.add(fixed)
                yield CudaStep((fixed,), {"b": fixed["b"]}, prepare)
            if fixed in prepared:
                step = _reading(step, fixed)
        yield step


def _leaving(step: CudaStep, fixed: Node) -> CudaStep:
    """The step, with its result in fixed point as an additional result."""
    nodes = (*step.nodes[:-1], fixed, step.node)
    results = {**step.results, "fixed": fixed}
    return CudaStep(nodes, step.operands, step.record, results=results, inplace=step.inplace)


def _reading(product: CudaStep, fixed: Node) -> CudaStep:
    """The product, with its b in fixed point as an additional operand."""
    operands = {**product.operands, "fixed": fixed}
    return CudaStep(product.nodes, operands, product.record, scratch=product.scratch)
