"""What products read in a form of their own, prepared once for all that read it.

    fixed_point    activations for `vec`
    halves         activations for `tile`
    expert_groups  (token, slot) pairs sorted by expert, for `tile`

These are nodes private to the backend, so the planner sees their memory. A cache inside the runner
would hide it. What only one product reads, its own launches prepare.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count
from math import prod
from typing import Any, NamedTuple

from pyggml import ops
from pyggml.backends.cuda.fusion import CudaStep, Fused, behind_reshapes
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.linear import blocks
from pyggml.backends.cuda.linear.common import aligned, in_blocks
from pyggml.backends.cuda.linear.experts import group_scratch, launch_groups
from pyggml.backends.cuda.linear.halves import half_of, launch_halves, tile_scratch
from pyggml.backends.cuda.linear.routes import Product
from pyggml.backends.cuda.table import kernel
from pyggml.dtypes import TYPES
from pyggml.node import Node
from pyggml.operation import Op
from pyggml.ops.leaf import constant_op
from pyggml.spec import Spec
from pyggml.transfer import origin

# Backend-private ops: user graphs never contain them. `run` is the number of the call of `lower`:
# nodes lowered separately do not share what is prepared.


def _fixed_point(b: Node, *, levels: int, run: int) -> Spec:
    return _bytes(blocks.fixed_bytes(b.ne, levels))


def _halves(b: Node, *, half: str, run: int) -> Spec:
    return _bytes(tile_scratch(b.ne))


def _expert_groups(ids: Node, *, experts: int, run: int) -> Spec:
    return _bytes(group_scratch(ids.ne, experts))


def _bytes(n: int) -> Spec:
    return Spec.of(TYPES["i8"], (n,))


fixed_point = Op(_fixed_point, name="fixed_point")
halves = Op(_halves, name="halves")
expert_groups = Op(_expert_groups, name="expert_groups")
_runs = count()


@kernel(fixed_point, types=None)
def _prepare_fixed_point(call: Call) -> None:
    blocks.launch_quantize(call, call["b"], call.out.pointer, call.attrs["levels"])


@kernel(halves, types=None)
def _prepare_halves(call: Call) -> None:
    launch_halves(call, call["b"], call.out.ptr, call.attrs["half"])


@kernel(expert_groups, types=None)
def _prepare_groups(call: Call) -> None:
    launch_groups(call, call["ids"], call.attrs["experts"], call.out.ptr)


#: The operand of a product that is what a node of this op prepared.
_NAMES = {fixed_point: "fixed", halves: "halves", expert_groups: "groups"}
_RECORDS = {
    fixed_point: _prepare_fixed_point,
    halves: _prepare_halves,
    expert_groups: _prepare_groups,
}


class Need(NamedTuple):
    """What a product reads in a form of its own: `op` of `source` with one attribute."""

    op: Op[Any]
    source: Node
    attribute: tuple[str, Any]

    def node(self, run: int) -> Node:
        return self.op(self.source, **dict([self.attribute]), run=run)


def needs_of(node: Node) -> Iterator[Need]:
    """What the product reads that others may read too.

    Activations only for weights that are constants: the kernels read these before earlier steps
    have ended. Those of `tile` must not even come from the host in the run.
    """
    if not node.op.weights:
        return
    weights = [node[name] for name in node.op.weights]
    products = Product.all_of(node)
    routes = {product.route for product in products}
    if routes == {"vec"}:
        if all(in_blocks(w.dtype) and origin(w).op is constant_op for w in weights):
            yield Need(fixed_point, _groups_of(node["b"]), ("levels", products[0].levels))
    elif routes == {"tile"}:
        if products[0].ids is not None:
            yield Need(expert_groups, node["ids"], ("experts", weights[0].ne[2]))
            if all(product.in_order for product in products):
                return
        kinds = {half_of(w.dtype) for w in weights}
        if len(kinds) == 1 and all(w.root.op is constant_op for w in weights):
            yield _halves_of(node["b"], kinds.pop())


def _halves_of(b: Node, half: str = "__half") -> Need:
    return Need(halves, _rows_of(b), ("half", half))


def _needs(step: CudaStep) -> Iterator[Need]:
    """What the step reads: products of a pattern read what it says."""
    product = _product(step)
    if product is not None:
        yield from needs_of(product)
    elif isinstance(step, Fused) and step.quantized is not None:
        yield Need(fixed_point, _groups_of(step.quantized), ("levels", 2))


def _product(step: CudaStep) -> Node | None:
    """The product whose launches the step has."""
    if len(step.nodes) > 1:
        return step.product if isinstance(step, Fused) else None
    return step.node if step.node.op.weights else None


def _rows_of(b: Node) -> Node:
    """The node whose rows b views unchanged."""
    while b.op is ops.reshape and b["a"].ne[0] == b.ne[0]:
        b = b["a"]
    return b


def _groups_of(b: Node) -> Node:
    """The node whose groups b views in the same order. Unlike those of `halves`, they do not
    depend on where a row ends."""
    b = _rows_of(b)
    while b.op.view is not None and b.contiguous:
        source = b.src[0]
        if source is None or not source.contiguous or source.ne[0] % 32 or b.ne[0] % 32:
            break
        if source.spec.elements != b.spec.elements:
            break
        b = source
    return b


def prepare_once(steps: Sequence[CudaStep]) -> Iterator[CudaStep]:
    """The steps, with those inserted that prepare what several products read.

    If the step that computes b can also write it in such a form, it does, even for one product.
    """
    run = next(_runs)
    needs = {step: list(_needs(step)) for step in steps}
    readers = Counter(need for own in needs.values() for need in own)
    needed = {need for step, own in needs.items() if len(step.nodes) > 1 for need in own}
    prepared: dict[Need, Node] = {}
    by_source: dict[Node, list[Need]] = {}
    for need in readers:
        by_source.setdefault(behind_reshapes(need.source), []).append(need)
    for original in steps:
        step, multiplies = original, _product(original) is not None
        for need in _leaves(step, by_source.get(step.node, ())):
            prepared[need] = need.node(run)
            step = _leaving(step, prepared[need], multiplies)
        own = needs[original]
        for need in own:
            if need not in prepared and (readers[need] > 1 or need in needed):
                node = prepared[need] = need.node(run)
                operands = {name: need.source for name in node.op.operands}
                yield CudaStep((node,), operands, _RECORDS[need.op])
        rows = (
            isinstance(original, Fused)
            and original.rows
            and prepared.get(_halves_of(original.rows))
        )
        ready = [prepared[need] for need in own if need in prepared]
        yield _reading(step, ready, rows or None, spares=multiplies)


def _leaves(step: CudaStep, needs: Iterable[Need]) -> list[Need]:
    """Those of the needs, of the step's result, that are forms which the step can also write."""
    if not isinstance(step, Fused):
        return []
    forms = {(halves, ("half", "__half")): step.halves, (fixed_point, ("levels", 2)): step.fixed}
    left = dict[Op[Any], Need]()
    for need in needs:
        n = forms.get((need.op, need.attribute), 0)
        if n and need.source.ne[0] == prod(step.node.ne[:n]):
            left.setdefault(need.op, need)
    return list(left.values())


def left_unread(steps: Sequence[CudaStep], keep: Collection[Node]) -> Iterator[CudaStep]:
    """The steps, each knowing whether others read its result only as f16 that it leaves."""
    readers: dict[Node, list[CudaStep]] = {}
    for step in steps:
        for node in {read.base for read in step.reads}:
            readers.setdefault(node, []).append(step)
    for step in steps:
        node, form = step.node, step.results.get("halves") or step.results.get("left_halves")
        if form is not None and node not in keep:
            step.unread = all(_reads_only(other, node, form) for other in readers.get(node, ()))
        yield step


def _reads_only(step: CudaStep, node: Node, form: Node) -> bool:
    """Whether a step reads of the node only the form: if it is products of all columns, by `b`."""
    names = {name for name, read in step.operands.items() if read.base is node}
    dense = all(each.op.weights and each.op.ids is None for each in step.nodes)
    return dense and names == {"b"} and step.operands.get("halves") is form


def _leaving(step: CudaStep, form: Node, multiplies: bool) -> CudaStep:
    """The step, with a form of its result as an additional result. If it multiplies, its products
    look for what they read by the same names."""
    nodes = (*step.nodes[:-1], form, step.node)
    name = f"left_{_NAMES[form.op]}" if multiplies else _NAMES[form.op]
    results = {**step.results, name: form}
    return CudaStep(
        nodes, step.operands, step.record,
        results=results, inplace=step.inplace, scratch=step.scratch,
    )  # fmt: skip


def _reading(step: CudaStep, prepared: Sequence[Node], rows: Node | None, spares: bool) -> CudaStep:
    """The step, with what is prepared as additional operands and, if it has the launches of a
    product, not in its scratch. rows: what it can read, too."""
    if not prepared and rows is None:
        return step
    operands = {**step.operands, **{_NAMES[node.op]: node for node in prepared}}
    if rows is not None:
        operands["rows"] = rows
    spared = sum(aligned(node.spec.nbytes) for node in prepared) if spares else 0
    return CudaStep(
        step.nodes, operands, step.record,
        results=step.results, inplace=step.inplace, scratch=step.scratch - spared,
    )  # fmt: skip
