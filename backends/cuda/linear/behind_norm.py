"""Joined products of one column and the norm in front of them as one launch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

from pyggml import ops
from pyggml.backends.cuda.fusion import CudaStep
from pyggml.backends.cuda.geometry import blocks_for
from pyggml.backends.cuda.gpu import H200
from pyggml.backends.cuda.launch import ABSENT, Call, Form, Operand
from pyggml.backends.cuda.linear import blocks
from pyggml.backends.cuda.linear.common import VEC
from pyggml.backends.cuda.linear.joined import argument_of, products_of, record_few
from pyggml.backends.cuda.normed import Norm, adds, normed_row
from pyggml.backends.cuda.weights.packing import TILE
from pyggml.backends.step import Layouts
from pyggml.joint import joint_reduce
from pyggml.node import Node

#: Of `vec_normed`: warps and tiles of rows of a block, and elements that its warps take at once.
NORMED_WARPS, NORMED_TILES = 16, 2
LONGEST = NORMED_WARPS * 4 * 32


def with_norms(
    steps: Sequence[CudaStep],
    keep: Collection[Node],
    layouts: Layouts,
    one: Callable[[Node], CudaStep],
) -> Iterator[CudaStep]:
    """The steps, with a norm as part of the joined products behind it if only these read its
    result. They may run as early as the norm, because all else that they read is constant. A sum
    over GPUs in front of the norm is again a step of its own, made by `one`."""
    readers: dict[Node, set[CudaStep]] = {}
    for step in steps:
        for read in step.reads:
            readers.setdefault(read.base, set()).add(step)
    whole: dict[CudaStep, CudaStep | None] = {}
    for step in steps:
        form, node = step.results.get("fixed"), step.node
        if form is None or node in keep:
            continue
        behind = readers.get(form, set()) | readers.get(node, set())
        products = next(iter(behind), step)
        if len(behind) == 1 and products.record is record_few and _fits(step, products, layouts):
            whole |= {step: _normed(step, products), products: None}
    for step in steps:
        own = whole.get(step, step)
        if own is not None and own is not step and _is_joint(step):
            yield one(step.nodes[0])
        if own is not None:
            yield own


def _is_joint(norm: CudaStep) -> bool:
    """Whether the step adds up parts of several GPUs first."""
    return norm.nodes[0].op is joint_reduce


def _fits(norm: CudaStep, products: CudaStep, layouts: Layouts) -> bool:
    """Whether the step is rms_norm(x (+ plus)) * weight of one row, and the products, of weights in
    tiles, are one wave of blocks."""
    *added, normed, _, node = norm.nodes
    weights = [product["a"] for product in products.nodes]
    tiled = all(w in layouts and layouts[w].name == "tiles8" for w in weights)
    return (
        node.op is ops.mul
        and normed.op is ops.rms_norm
        and [n.op for n in added] in ([], [ops.add], [joint_reduce, ops.add])
        and node.ne == (weights[0].ne[0], 1, 1, 1)
        and all(row.contiguous for row in norm.operands.values())
        and tiled
        and node.ne[0] <= LONGEST
        and sum(_blocks_of(weights)) <= 2 * H200.sms
    )


def _blocks_of(weights: Sequence[Node] | Sequence[Operand]) -> list[int]:
    return [blocks_for(w.ne[1], TILE * NORMED_TILES) for w in weights]


def _normed(norm: CudaStep, products: CudaStep) -> CudaStep:
    *added, normed, _, node = norm.nodes
    if _is_joint(norm):
        added = added[1:]
        operands = Norm((added[0], normed, node)).reads
    else:
        names = {"a": "row", "plus": "row_plus", "weight": "row_weight"}
        operands = {names[name]: x for name, x in norm.operands.items()}
    operands |= {name: x for name, x in products.operands.items() if name not in ("b", "fixed")}
    sums = {"row_sum": norm.results["sum"]} if "sum" in norm.results else {}
    step = CudaStep(
        (*added, normed, node, *products.nodes),
        operands,
        partial(_record_normed, eps=normed.attrs["eps"]),
        results={**sums, **products.results},
    )
    step.strided = False
    return step


def _record_normed(call: Call, eps: float) -> None:
    weights, outs = products_of(call)
    counts, row = _blocks_of(weights), normed_row(call, eps)
    form, products = blocks.cpp_format(weights[0]), argument_of(weights, outs, counts)
    total = (call.get("row_sum") or ABSENT).pointer
    call.launch(
        VEC,
        f"vec_normed<{form}, NormedRow>",
        grid=sum(counts),
        block=(32, NORMED_WARPS),
        args=[products, row, total],
        meeting=adds(
            row,
            lambda summed: Form(f"vec_normed<{form}, SummedRow>", [products, summed, total]),
        ),
    )
