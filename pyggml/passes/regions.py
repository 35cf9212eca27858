"""What the attention memory budget counts in a graph, and how each attention may be cut.

Two kinds of computation count: scores (a product that reaches a softmax whose result goes into a
product), and keys and values that are computed from a state before an attention reads them. This
knows no model; how to cut comes from the slice rules of the ops.
"""

from __future__ import annotations

from collections.abc import Iterable

from pyggml.graph import Graph, toposort
from pyggml.node import Node
from pyggml.operation import slice_of
from pyggml.ops.attention import flash_attn_ext
from pyggml.ops.copy import cast, cont
from pyggml.ops.elementwise import add, scale, tanh
from pyggml.ops.leaf import state_op
from pyggml.ops.linear import mul_mat
from pyggml.ops.reduce import soft_max_ext
from pyggml.passes.cut import Region
from pyggml.traits import Axis

#: Flash attention over expanded keys: groups of heads, streams, blocks of keys, then all at once.
_FLASH_WAYS: tuple[tuple[Axis, ...], ...] = ((1,), (1, 3), ("kv",), (1, 3, "kv"))


def regions(graph: Graph) -> list[Region]:
    """Every computation that the budget can bound, in graph order."""
    derived, soft = _origins(graph.nodes)
    found = []
    for node in graph.nodes:
        if node.op is flash_attn_ext:
            expanded = _expanded(node.src[1:3], derived)
            if expanded:
                found.append(Region(node, frozenset(expanded), _FLASH_WAYS))
        elif node.op is mul_mat and any(s in soft for s in node.src):
            port = 1 if node.src[1] in soft else 0
            shown, values = node.src[port], node.src[1 - port]
            assert shown is not None
            top = soft[shown]
            scores = _scores(top)
            if scores is None:
                continue
            keys = [n.src[0] for n in scores if n.op is mul_mat]
            counted = scores | _copies(shown, top) | _expanded([values, *keys], derived)
            heads, streams, rows = (_result_axis(node, port, top, axis) for axis in (2, 3, 1))
            axes = tuple(axis for axis in (heads, streams, rows) if axis is not None)
            ways = tuple(axes[: i + 1] for i in range(len(axes)))
            found.append(Region(node, frozenset(counted), ways))
    return found


def score_tensors(graph: Graph) -> set[Node]:
    """All tensors that the budget counts in a graph without loops."""
    return {node for region in regions(graph) for node in region.counted}


def _origins(nodes: Iterable[Node]) -> tuple[set[Node], dict[Node, Node]]:
    """Nodes computed from a state without an attention in between; and what shows a softmax.

    The second maps a softmax result, and every view or copy of it, to the softmax.
    """
    derived: set[Node] = set()
    soft: dict[Node, Node] = {}
    for node in nodes:
        first = node.src[0] if node.src else None
        if node.op is soft_max_ext:
            soft[node] = node
        elif first in soft and (node.op.view is not None or node.op in (cast, cont)):
            soft[node] = soft[first]
        elif node.op is state_op or node.op.writes is not None:
            derived.add(node)
        elif node.op is flash_attn_ext or any(s in soft for s in node.src):
            continue  # an attention's result: what follows is a new token, not the state
        elif any(s in derived for s in node.src):
            derived.add(node)
    return derived, soft


def _expanded(sources: Iterable[Node | None], derived: set[Node]) -> set[Node]:
    """What is computed from a state on the way to `sources`; views of states are not."""
    found: set[Node] = set()
    stack = [s for s in sources if s in derived]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None or node.op is state_op or node.op.writes is not None:
            continue
        if node.op.view is None:
            found.add(node)
        fresh = [s for s in node.src if s in derived and s not in seen]
        seen.update(fresh)
        stack += fresh
    return found


def _scores(top: Node) -> set[Node] | None:
    """The softmax and the tensors before it, back to a product; None where there is no product."""

    def ends(node: Node) -> bool:
        return node.op.view is None and node.op not in (scale, add, tanh, cast, cont)

    ways: set[Node] = set()  # on a way from a product to the softmax
    assert top.src[0] is not None
    for node in toposort([top.src[0]], stop=ends):
        if node.op is mul_mat or (not ends(node) and any(s in ways for s in node.src)):
            ways.add(node)
    if top.src[0] not in ways:
        return None
    return {node for node in ways if node.op.view is None} | {top}


def _copies(node: Node | None, top: Node) -> set[Node]:
    """Copies of the softmax `top` on the way to `node`."""
    found = set()
    while node is not None and node is not top:
        if node.op.view is None:
            found.add(node)
        node = node.src[0]
    return found


def _result_axis(out: Node, port: int, top: Node, axis: int) -> int | None:
    """The axis of `out` that walks along `axis` of `top`, which its source `port` shows."""

    def lands(here: int) -> bool:
        node = out
        while node is not top:
            rule = slice_of(node, here, node.ne[here])
            at = port if node is out else 0
            source, step = node.src[at], None if rule is None else rule.cuts[at]
            if step is None or source is None:
                return False
            node, here = source, step.axis
        return here == axis

    if top.ne[axis] == 1:
        return None
    return next((a for a in range(4) if lands(a)), None)
