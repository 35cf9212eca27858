"""Activations in fixed point for `vec`: what several products of one b read is prepared once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.linear import experts, products
from pyggml.backends.cuda.linear.blocks import fixed_bytes, launch_quantize
from pyggml.backends.cuda.linear.common import in_blocks, is_few
from pyggml.backends.cuda.table import KERNELS, kernel
from pyggml.dtypes import TYPES
from pyggml.node import Node, Op, Spec
from pyggml.ops.leaf import constant_op
from pyggml.transfer import origin

Part = Node | Fused


def _rule(b: Node, *, levels: int, run: int) -> Spec:
    """b [k, columns] as `quantize` of linear_vec.cu leaves it; no graph that users build has it.

    run  numbers the nodes lowered together: a later run, behind a loop or a load, makes its own
    """
    return Spec.of(TYPES["i8"], (fixed_bytes(b.ne, levels),))


_rule.__name__ = "fixed_point"
fixed_point = Op(_rule)
_runs = count()


@kernel(fixed_point, types=None)
def prepare(call: Call) -> None:
    launch_quantize(call, call.operand(0), call.out.pointer, call.attrs["levels"])


def levels_of(node: Node) -> int:
    """Bytes of a number of b in the fixed point that the product reads; 0 where it reads none.

    Only products with weights: they read them before the steps ahead of them have ended.
    """
    weights = node.src[:-2] if node.op in (ops.mul_mat_id, ops.moe_up_gate) else node.src[:-1]
    if node.op not in (ops.mul_mat, ops.mul_mat_id, ops.fused_up_gate, ops.moe_up_gate):
        return 0
    if not all(w is not None and in_blocks(w.dtype) and _constant(w) for w in weights):
        return 0
    a, exact = weights[0], products.is_exact(node)
    assert a is not None
    if node.op in (ops.mul_mat_id, ops.moe_up_gate):
        ids = node.src[-1]
        assert ids is not None
        few = experts.is_few(a.dtype, a.ne, ids.ne, exact)
    else:
        few = is_few(a.ne, _activations(node).ne, exact)
    return 0 if not few else 3 if exact else 2


def _constant(weight: Node) -> bool:
    return origin(weight).op is constant_op


def _activations(product: Node) -> Node:
    b = product.src[-2 if product.op in (ops.mul_mat_id, ops.moe_up_gate) else -1]
    assert b is not None
    return b


def _rows_of(b: Node) -> Node:
    """What b shows row by row."""
    while b.op is ops.reshape and b.src[0] is not None and b.src[0].ne[0] == b.ne[0]:
        b = b.src[0]
    return b


def shared(parts: Sequence[Part]) -> Iterator[Part]:
    """Parts, and among them steps that bring into fixed point what several products read, or one
    product where the step that makes it does so by the way."""
    readers: dict[Node, list[Node]] = {}
    run = next(_runs)
    for part in parts:
        if isinstance(part, Node) and (levels := levels_of(part)):
            made = fixed_point(_rows_of(_activations(part)), levels=levels, run=run)
            readers.setdefault(made, []).append(part)
    prepared = {p: made for made, found in readers.items() for p in found}
    done: set[Node] = set()
    for part in parts:
        if isinstance(part, Fused) and part.prepares is not None:
            made = fixed_point(part.nodes[-1], levels=2, run=run)
            if made in readers:
                done.add(made)
                nodes = (*part.nodes[:-1], made, part.nodes[-1])
                also, record = (*part.also, made), part.prepares
                part = replace(part, nodes=nodes, also=also, record=record)
        elif isinstance(part, Node) and part in prepared:
            made = prepared[part]
            if made not in done and len(readers[made]) > 1:
                done.add(made)
                yield made
            if made in done:
                yield _reading(part, made)
                continue
        yield part


def _reading(product: Node, made: Node) -> Fused:
    """The product, its b in fixed point as a further source."""
    row = KERNELS[product.op]
    sources = tuple(s for s in product.src if s is not None)
    scratch = row.scratch(product) if row.scratch is not None else 0
    return Fused((product,), (*sources, made), row.run, scratch=scratch)
