"""One node of a graph by itself: its sources become leaves, seen through the same views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyggml.errors import DTypeError, GraphError, UnknownNameError
from pyggml.graph import Graph, rebuilt
from pyggml.interning import inherit
from pyggml.node import Node, label_of
from pyggml.ops import input, state_of
from pyggml.ops.leaf import constant_op, data_of, input_op, state_op
from pyggml.parity.case import Case, Source
from pyggml.parity.check import numeric_class
from pyggml.quants import decode_rows
from pyggml.runtime.arrays import stored
from pyggml.runtime.compile import compile
from pyggml.runtime.places import parse
from pyggml.runtime.plan import Plan

Array = NDArray[Any]
#: Tensor with its own memory (leaf or computed node) -> contents in the type's storage.
Values = Mapping[Node, Array]


@dataclass(frozen=True, slots=True)
class Alone:
    """A graph of one node, and of the views through which it reads its sources.

    node    the node in its original graph
    result  the node here; the whole state, if the node writes
    leaves  tensor that the node reads -> the leaf that replaces it (a leaf stays itself)
    state   the state that the node writes
    """

    node: Node
    result: Node
    leaves: Mapping[Node, Node]
    state: Node | None

    def run(self, place: str, values: Values) -> tuple[Array, float]:
        """(the result in its type's storage, the bound for the numeric classes of the place)."""
        plan = compile({"y": self.result}, backends=[place]).bind()
        arrays = {leaf: values[of] for of, leaf in self.leaves.items()}
        return run_with(plan, arrays)["y"], self._bound(plan, place, values)

    def _bound(self, plan: Plan, place: str, values: Values) -> float:
        """The bound, by the op and the classes of the nodes that the place runs for it."""
        device = parse(place).backend
        computed = [n for n in plan.graph.nodes if not n.op.leaf and n.op.view is None]
        classes = [numeric_class(device, node) for node in computed]
        return self._case(values).bound(self.node, *classes)

    def _case(self, values: Values) -> Case:
        """The node as a case, with all that bounds depend on: types and the largest position."""
        sources = [
            None if s is None else Source(s.dtype.name, s.ne, f"<{_largest(values[s.root])}")
            for s in self.node.src
        ]
        return Case(self.node.op.name, tuple(sources), self.node.attrs)


def _largest(array: Array) -> int:
    return int(array.max()) if array.dtype.kind == "i" else 0


def alone(node: Node) -> Alone:
    """`node` over leaves, with the strides that its sources have in its graph."""
    roots = {s.root: None for s in node.src if s is not None}
    names = {root.attrs["name"] for root in roots if root.op.leaf}
    leaves: dict[Node, Node] = {}
    for root in roots:
        leaves[root] = root
        if not root.op.leaf:
            label = label_of(root)
            while label in names:
                label += "'"
            names.add(label)
            leaves[root] = input(label, root.dtype, ne=root.ne[: root.spec.rank])
    src = tuple(None if s is None else _seen(s, leaves) for s in node.src)
    result = inherit(rebuilt(node, src), node)
    if node.op.writes is None:
        return Alone(node, result, leaves, None)
    return Alone(node, state_of(result), leaves, node.root)


def _seen(node: Node, leaves: Mapping[Node, Node]) -> Node:
    """`node`, a source, as views of the leaf of its root, which already has what was written."""
    views = []
    while node not in leaves and node.op is not state_of:
        if node.op.view is not None:
            views.append(node)
        source = node.src[node.op.writes or 0]
        assert source is not None
        node = source
    result = leaves[node.root]
    for view in reversed(views):
        result = rebuilt(view, (result,))
    return result


def run_with(plan: Plan, leaves: Values) -> dict[str, Array]:
    """Outputs of a plan for these contents of its leaves: copies in their types' storage."""
    plan.bind()
    for node, array in leaves.items():
        if node.op is state_op:
            plan.store.write(node.attrs["name"], array)
    inputs = {n.attrs["name"]: array for n, array in leaves.items() if n.op is input_op}
    return {key: np.array(output) for key, output in plan.views(inputs).items()}


def decoded(node: Node, array: Array) -> Array:
    """The values of an array in the storage of the node's type."""
    return array if node.dtype.numpy is not None else decode_rows(node.dtype, array)


def contents(
    graph: Graph, inputs: Mapping[str, ArrayLike], states: Mapping[str, ArrayLike]
) -> dict[Node, Array]:
    """Leaf -> its array in the type's storage. Errors name what is missing or does not fit."""
    leaves = [node for node in graph.nodes if node.op.leaf]
    arrays = {leaf: data_of(leaf) for leaf in leaves if leaf.op is constant_op}
    for what, op, arguments in (("input", input_op, inputs), ("state", state_op, states)):
        if not isinstance(arguments, Mapping):
            got = type(arguments).__name__
            raise DTypeError(f"{what}s must be a dict of names to arrays, got {got}")
        named = {leaf.attrs["name"]: leaf for leaf in leaves if leaf.op is op}
        for key in arguments:
            if key not in named:
                known = ", ".join(named) or "none"
                raise UnknownNameError(f"the graph has no {what} {key!r}; its {what}s: {known}")
        missing = [f"{key} ({leaf.spec})" for key, leaf in named.items() if key not in arguments]
        if missing and op is input_op:
            raise GraphError(f"parity needs inputs: {', '.join(missing)} (sizes in ne order)")
        for key, leaf in named.items():
            given = key in arguments
            array = arguments[key] if given else np.zeros(leaf.shape, leaf.dtype.numpy or "f4")
            arrays[leaf] = stored(f"{what} {key!r}", leaf.spec, array)
    return arrays
