"""Which nodes run as they are, and which are said in simpler ops."""

from __future__ import annotations

from pyggml.backends.base import Backend
from pyggml.dag import Graph, rebuilt
from pyggml.errors import GraphError, UnsupportedOp
from pyggml.graph import Node, inherit, line_of, stand_at
from pyggml.loop import loop_op


def expand(graph: Graph, backend: Backend) -> Graph:
    """Replace every node that the backend lacks by its meaning; UnsupportedOp where it has none."""
    return graph.rewrite(lambda node, src: _settle(rebuilt(node, src), backend))


def _settle(node: Node, backend: Backend) -> Node:
    """`node`, or its meaning with every part settled in turn."""
    if node.op.leaf or node.op.view is not None or node.op is loop_op:
        return node
    reason = backend.supports(node)
    if reason is None:
        return node
    if node.op.meaning is None:
        raise UnsupportedOp(
            f"no backend runs {node!r} (at {line_of(node)}): {backend.name}: {reason}; "
            f"{node.op.name} has no meaning in simpler ops"
        )
    settled: dict[Node, Node] = {s: s for s in node.src if s is not None}

    def settle(part: Node) -> Node:
        if part not in settled:
            src = tuple(None if s is None else settle(s) for s in part.src)
            settled[part] = inherit(_settle(rebuilt(stand_at(part, node), src), backend), part)
        return settled[part]

    meant = settle(node.op.meaning(*node.src, **node.attrs))
    if meant.spec != node.spec:
        raise GraphError(
            f"{node!r} (at {line_of(node)}): the meaning of {node.op.name} gives {meant.spec}, "
            f"its shape rule {node.spec}"
        )
    return meant
