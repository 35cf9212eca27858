"""One node of a graph by itself: its sources as leaves, seen as the node sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pyggml.errors import DTypeError, GraphError, UnknownNameError
from pyggml.graph import Graph, rebuilt
from pyggml.node import Node, inherit, label_of
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
#: Tensors with memory of their own (leaves and computed nodes) -> contents, as the type is stored.
Values = Mapping[Node, Array]


@dataclass(frozen=True, slots=True)
class Alone:
    """A graph of one node, and of the views through which it sees its sources.

    node    of the graph that it is taken from
    result  what computes it here; of a node that writes, all of the state
    leaves  tensor that the node reads -> the leaf in its place: itself, unless it is computed
    state   the state that the node writes
    """

    node: Node
    result: Node
    leaves: Mapping[Node, Node]
    state: Node | None

    def run(self, place: str, values: Values) -> tuple[Array, float]:
        """(the result as its type is stored, the bound that the place's numbers call for)."""
        plan = compile({"y": self.result}, backends=[place]).bind()
        given = {leaf: values[of] for of, leaf in self.leaves.items()}
        return run_with(plan, given)["y"], self._bound(plan, place, values)

    def _bound(self, plan: Plan, place: str, values: Values) -> float:
        """By the op and the classes of the nodes that it became there."""
        device = parse(place).backend
        computed = [n for n in plan.graph.nodes if not n.op.leaf and n.op.view is None]
        classes = [numeric_class(device, node) for node in computed]
        return self._case(values).bound(self.node, *classes)

    def _case(self, values: Values) -> Case:
        """The node as a case, as far as bounds depend on it: types, and how far positions go."""
        sources = [
            None if s is None else Source(s.dtype.name, s.ne, f"<{_largest(values[s.root])}")
            for s in self.node.src
        ]
        return Case(self.node.op.name, tuple(sources), self.node.attrs)


def _largest(array: Array) -> int:
    return int(array.max()) if array.dtype.kind == "i" else 0


def alone(node: Node) -> Alone:
    """`node` over leaves. Strides of what it sees are those in its graph."""
    roots = {s.root: None for s in node.src if s is not None}
    taken = {root.attrs["name"] for root in roots if root.op.leaf}
    leaves: dict[Node, Node] = {}
    for root in roots:
        leaves[root] = root
        if not root.op.leaf:
            label = label_of(root)
            while label in taken:
                label += "'"
            taken.add(label)
            leaves[root] = input(label, root.dtype, ne=root.ne[: root.spec.rank])
    src = tuple(None if s is None else _seen(s, leaves) for s in node.src)
    made = inherit(rebuilt(node, src), node)
    if node.op.writes is None:
        return Alone(node, made, leaves, None)
    return Alone(node, state_of(made), leaves, node.root)


def _seen(node: Node, leaves: Mapping[Node, Node]) -> Node:
    """`node`, a source, over the leaf of its root: what was written stands there already."""
    views = []
    while node not in leaves and node.op is not state_of:
        if node.op.view is not None:
            views.append(node)
        source = node.src[node.op.writes or 0]
        assert source is not None
        node = source
    made = leaves[node.root]
    for view in reversed(views):
        made = rebuilt(view, (made,))
    return made


def run_with(plan: Plan, leaves: Values) -> dict[str, Array]:
    """What a plan makes of its leaves' contents: copies, as the types are stored."""
    plan.bind()
    for node, array in leaves.items():
        if node.op is state_op:
            plan.store.write(node.attrs["name"], array)
    inputs = {n.attrs["name"]: array for n, array in leaves.items() if n.op is input_op}
    return {key: np.array(found) for key, found in plan.views(inputs).items()}


def decoded(node: Node, array: Array) -> Array:
    """What a tensor of the node's type holds, as numbers."""
    return array if node.dtype.numpy is not None else decode_rows(node.dtype, array)


def contents(
    graph: Graph, inputs: Mapping[str, ArrayLike], states: Mapping[str, ArrayLike]
) -> dict[Node, Array]:
    """Leaf -> its array as the type is stored. Errors name what is missing or does not fit."""
    leaves = [node for node in graph.nodes if node.op.leaf]
    found = {leaf: data_of(leaf) for leaf in leaves if leaf.op is constant_op}
    for what, kind, given in (("input", input_op, inputs), ("state", state_op, states)):
        if not isinstance(given, Mapping):
            raise DTypeError(f"{what}s are a dict of names to arrays, not {type(given).__name__}")
        mine = {leaf.attrs["name"]: leaf for leaf in leaves if leaf.op is kind}
        for key in given:
            if key not in mine:
                known = ", ".join(mine) or "none"
                raise UnknownNameError(f"the graph has no {what} {key!r}; its {what}s: {known}")
        missing = [f"{key} ({leaf.spec})" for key, leaf in mine.items() if key not in given]
        if missing and kind is input_op:
            raise GraphError(f"parity lacks inputs: {', '.join(missing)} (sizes in ne order)")
        for key, leaf in mine.items():
            array = given[key] if key in given else np.zeros(leaf.shape, leaf.dtype.numpy or "f4")
            found[leaf] = stored(f"{what} {key!r}", leaf.spec, array)
    return found
