"""An op's value in float64 by its meaning in simpler ops, down to those that the oracle states."""

from __future__ import annotations

from collections.abc import Mapping

from pyggml.errors import GraphError
from pyggml.graph import toposort
from pyggml.node import Node
from pyggml.parity import oracle
from pyggml.parity.values import Array


def meaning_of(node: Node) -> Node:
    """The node in simpler ops."""
    if node.op.meaning is None:
        raise GraphError(f"{node.op.name} has no meaning in simpler ops")
    meant: Node = node.op.meaning(*node.src, **node.attrs)
    if meant.spec != node.spec:
        raise GraphError(
            f"the meaning of {node.op.name} gives {meant.spec}, its shape rule {node.spec}"
        )
    return meant


def evaluated(node: Node, known: Mapping[Node, Array]) -> Array:
    """The value of a node over known ones, each of its parts rounded to no type."""
    values = dict(known)
    needed: set[Node] = set()
    stack = [node]
    while stack:
        each = stack.pop()
        if each not in known and each not in needed:
            needed.add(each)
            stack += [s for s in each.src if s is not None]
    for each in (n for n in toposort([node]) if n in needed):
        if each.op.name not in oracle.ORACLE:
            values[each] = evaluated(meaning_of(each), values)
            continue
        attrs = {key: value for key, value in each.attrs.items() if key != "rank"}
        sources = [None if s is None else values[s] for s in each.src]
        values[each] = oracle.run(each.op.name, sources, **attrs)
    return values[node]
