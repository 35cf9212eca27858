"""The float64 value of a node through its meaning in simpler ops, down to ops of the oracle."""

from __future__ import annotations

from collections.abc import Mapping

from pyggml.errors import GraphError
from pyggml.graph import toposort
from pyggml.node import Node
from pyggml.parity import oracle
from pyggml.parity.values import Array


def meaning_of(node: Node) -> Node:
    """The meaning of a node: the same result in simpler ops."""
    if node.op.meaning is None or not node.op.composes(node):
        raise GraphError(f"{node.op.name} has no meaning in simpler ops")
    meaning: Node = node.op.meaning(*node.src, **node.attrs)
    if meaning.spec != node.spec:
        raise GraphError(
            f"{node.op.name}: its meaning gives {meaning.spec}, its shape rule {node.spec}"
        )
    return meaning


def evaluated(node: Node, known: Mapping[Node, Array]) -> Array:
    """The value of a node from known ones, without rounding between its parts."""
    values = dict(known)
    nodes: set[Node] = set()
    stack = [node]
    while stack:
        part = stack.pop()
        if part not in known and part not in nodes:
            nodes.add(part)
            stack += [s for s in part.src if s is not None]
    for part in (n for n in toposort([node]) if n in nodes):
        if part.op.name not in oracle.ORACLE:
            values[part] = evaluated(meaning_of(part), values)
            continue
        attrs = {key: value for key, value in part.attrs.items() if key != "rank"}
        sources = [None if s is None else values[s] for s in part.src]
        values[part] = oracle.run(part.op.name, sources, **attrs)
    return values[node]
