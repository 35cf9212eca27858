"""The order of reading and writing states: what data edges do not say."""

from __future__ import annotations

from collections.abc import Iterable

from pyggml.errors import GraphError
from pyggml.graph import Graph
from pyggml.node import Node, line_of
from pyggml.ops.copy import cont
from pyggml.ops.leaf import state_op


def versions(nodes: Iterable[Node]) -> dict[Node, Node]:
    """For every node that looks at a state: the handle whose values it sees.

    The state itself before any write, else the write (`set_rows`, `cpy`) that made the handle.
    """
    seen: dict[Node, Node] = {}
    for node in nodes:
        if node.op is state_op or node.op.writes is not None:
            seen[node] = node
        elif node.op.view is not None and node.src[0] in seen:
            seen[node] = seen[node.src[0]]
    return seen


def _writes(nodes: Iterable[Node], seen: dict[Node, Node]) -> dict[Node, Node]:
    """Handle -> the one write that replaces it."""
    writes: dict[Node, Node] = {}
    for node in nodes:
        if node.op.writes is None:
            continue
        target = node.src[node.op.writes]
        assert target is not None
        first = writes.setdefault(seen[target], node)
        if first is not node:
            raise GraphError(
                f"{node!r} (at {line_of(node)}) and {first!r} (at {line_of(first)}) write the same "
                f"handle of {seen[target]!r}: let the second write into what the first returned "
                "(after cpy into a part, into a view of state_of(...) of it)"
            )
    return writes


def state_edges(nodes: Iterable[Node]) -> dict[Node, tuple[Node, ...]]:
    """For each write the readers of the handle it replaces: they run before it."""
    nodes = tuple(nodes)
    seen = versions(nodes)
    writes = _writes(nodes, seen)
    before: dict[Node, list[Node]] = {}
    for node in nodes:
        if node.op.view is not None:
            continue
        for i, source in enumerate(node.src):
            if source is None or i == node.op.writes or source not in seen:
                continue
            write = writes.get(seen[source])
            if write is node:
                raise GraphError(
                    f"{node!r} (at {line_of(node)}) reads the state that it writes; "
                    "copy what it reads with cont first"
                )
            if write is not None:
                before.setdefault(write, []).append(node)
    return {write: tuple(readers) for write, readers in before.items()}


def keep_outputs(graph: Graph) -> Graph:
    """Outputs that look at a handle which the run overwrites become copies taken in time."""
    seen = versions(graph.nodes)
    writes = _writes(graph.nodes, seen)
    stale = {key: cont(node) for key, node in graph.outputs.items() if seen.get(node) in writes}
    return Graph({**graph.outputs, **stale}, graph.updates) if stale else graph
