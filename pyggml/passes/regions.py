"""The attentions whose memory the budget bounds: what it counts, and how each may be cut.

Three kinds of tensors count: scores (a product that reaches a softmax whose result goes into a
product), the scores of an indexer (they reach a top_k), and keys and values that are computed from
a state before an attention reads them. No model is known here; how to cut comes from the slice
rules of the ops.

An indexer in simpler ops is a product whose keys come from a state. That tells it from a router,
whose product with weights reaches a top_k too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from pyggml.graph import Graph, toposort
from pyggml.interning import inherit
from pyggml.node import Node
from pyggml.operation import slice_of
from pyggml.ops.attention import flash_attn_ext
from pyggml.ops.copy import cast, cont
from pyggml.ops.elementwise import add, add_mask, mul, relu, scale, tanh
from pyggml.ops.indexer import lightning_indexer
from pyggml.ops.leaf import state_op
from pyggml.ops.linear import mul_mat
from pyggml.ops.moe import mul_multi_add, multi_add
from pyggml.ops.reduce import soft_max_ext, sum_rows, top_k
from pyggml.traits import Axis

#: Flash attention over expanded keys: groups of heads, streams, both, blocks of keys, then all at
#: once. (Queries with lists of keys are streams in simpler ops.)
_FLASH_WAYS: tuple[tuple[Axis, ...], ...] = ((1,), (3,), (1, 3), ("kv",), (1, 3, "kv"))

#: An indexer's scores: streams, then tokens.
_CHOICE_WAYS: tuple[tuple[Axis, ...], ...] = ((3,), (3, 2), (3, 2, 1))
#: Ops between a product and the softmax of its scores, and between one and the top_k of them.
_TO_SOFTMAX = frozenset((scale, add, tanh, cast, cont))
_TO_CHOICE = frozenset((*_TO_SOFTMAX, add_mask, relu, mul, mul_multi_add, multi_add, sum_rows))


@dataclass(frozen=True)
class Region:
    """An attention: a result, and the tensors on the way to it whose memory the budget bounds.

    out      the node whose pieces a loop computes
    counted  tensors between the region's sources and `out`, without `out`
    ways     how `out` may be cut, preferred first: axes, all but the last one into single
             elements; a reduction by its name
    outside  nodes that a loop reads but does not compute: other attentions' results, and readers of
             a state that must run before a write
    """

    out: Node
    counted: frozenset[Node]
    ways: tuple[tuple[Axis, ...], ...]
    outside: frozenset[Node] = frozenset()

    @cached_property
    def inside(self) -> tuple[Node, ...]:
        """The nodes that a body computes, in order: `out`, counted ones and the views between."""
        inside: dict[Node, None] = {}
        for node in toposort([self.out], stop=self._ends):
            if self._ends(node):
                continue
            if node.op.view is None or any(s in inside for s in node.src):
                inside[node] = None
        return tuple(inside)

    def _ends(self, node: Node) -> bool:
        """Whether the loop takes the node from outside."""
        if node is self.out:
            return False
        return node in self.outside or (node not in self.counted and node.op.view is None)

    def pieces(self, cuts: Iterable[tuple[Axis, int]]) -> int:
        """The number of pieces that cuts into so many elements along these axes give."""
        return prod(-(-self.extent(axis) // step) for axis, step in cuts)

    def extent(self, axis: Axis) -> int:
        """Elements of `out` along `axis`; for a reduction, of the axis that it reduces."""
        if isinstance(axis, int):
            return self.out.ne[axis]
        whole = slice_of(mergeable(self.out), axis, 1)
        assert whole is not None
        return next(
            s.ne[c.axis]
            for s, c in zip(self.out.src, whole.cuts)
            if c is not None and s is not None
        )

    def mapped(self, new: Mapping[Node, Node]) -> Region:
        """The region over rewritten nodes."""
        counted, outside = (
            frozenset(new[node] for node in nodes if node in new)
            for nodes in (self.counted, self.outside)
        )
        return Region(new[self.out], counted, self.ways, outside)


def mergeable(out: Node) -> Node:
    """`out` in the form whose partial results can be merged: flash attention with its lse."""
    if out.op is flash_attn_ext and not out.attrs["lse"]:
        return inherit(flash_attn_ext.again(out, lse=True), out)
    return out


def regions(graph: Graph) -> list[Region]:
    """Every attention that the budget can bound, in graph order.

    No region reaches behind the result of another one. So how one is cut does not change what
    another one can be cut into.
    """
    derived, soft = _origins(graph.nodes)
    overlapping: list[Region] = []
    for node in graph.nodes:
        if node.op is flash_attn_ext:
            region = _flash(node, derived)
        elif node.op is mul_mat and any(s in soft for s in node.src):
            region = _softmax(node, derived, soft)
        elif node.op is top_k:
            region = _choice(node, derived)
        else:
            continue
        if region is not None:
            overlapping.append(region)
    results = frozenset(region.out for region in overlapping)
    return [replace(region, outside=results - {region.out}) for region in overlapping]


def _flash(node: Node, derived: set[Node]) -> Region | None:
    """Flash attention, if its keys or values are computed from a state."""
    expanded = _expanded(node.src[1:3], derived)
    return Region(node, frozenset(expanded), _FLASH_WAYS) if expanded else None


def _choice(node: Node, derived: set[Node]) -> Region | None:
    """A top_k, if it is that of an indexer's scores."""

    def product(source: Node) -> bool:
        keys = source.src[0] if source.op is mul_mat else None
        return source.op is lightning_indexer or (keys is not None and keys in derived)

    scores = _path(node, product, _TO_CHOICE)
    if not scores:
        return None
    biases = [n.src[1] for n in scores if n.op is add_mask]
    masks = {bias for bias in biases if bias is not None and bias.op is cast}
    return Region(node, frozenset(scores | masks), _CHOICE_WAYS)


def _softmax(node: Node, derived: set[Node], soft: Mapping[Node, Node]) -> Region | None:
    """A product of a softmax, if the softmax is that of scores."""
    port = 1 if node.src[1] in soft else 0
    shown, values = node.src[port], node.src[1 - port]
    assert shown is not None
    top = soft[shown]
    scores = _scores(top)
    if scores is None:
        return None
    keys = [n.src[0] for n in scores if n.op is mul_mat]
    counted = scores | _copies(shown, top) | _expanded([values, *keys], derived)
    heads, streams, rows = (_result_axis(node, port, top, axis) for axis in (2, 3, 1))
    axes = tuple(axis for axis in (heads, streams, rows) if axis is not None)
    ways = tuple(axes[: i + 1] for i in range(len(axes)))
    if streams is not None:  # keys that all heads of a stream share stay whole in a loop of heads
        ways += ((streams,), (streams, *(axis for axis in axes if axis != streams)))
    return Region(node, frozenset(counted), ways)


def score_tensors(graph: Graph) -> set[Node]:
    """All tensors that the budget counts in a graph without loops."""
    return {node for region in regions(graph) for node in region.counted}


def _origins(nodes: Iterable[Node]) -> tuple[set[Node], dict[Node, Node]]:
    """Nodes computed from a state without an attention in between; and softmaxes.

    The second maps each softmax, and each view or copy of one, to the softmax.
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
        elif node.op in (flash_attn_ext, top_k) or any(s in soft for s in node.src):
            continue  # an attention's result belongs to the new tokens, ids are no data of a state
        elif any(s in derived for s in node.src):
            derived.add(node)
    return derived, soft


def _expanded(sources: Iterable[Node | None], derived: set[Node]) -> set[Node]:
    """Tensors that are computed from a state on the way to `sources`; views do not count."""
    expanded: set[Node] = set()
    stack = [s for s in sources if s in derived]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node is None or node.op is state_op or node.op.writes is not None:
            continue
        if node.op.view is None:
            expanded.add(node)
        fresh = [s for s in node.src if s in derived and s not in seen]
        seen.update(fresh)
        stack += fresh
    return expanded


def _scores(top: Node) -> set[Node] | None:
    """The softmax and the tensors before it, back to products; None if there is no product."""
    path = _path(top, lambda node: node.op is mul_mat, _TO_SOFTMAX)
    return path | {top} if path else None


def _path(top: Node, product: Callable[[Node], bool], through: Collection[object]) -> set[Node]:
    """The tensors from products to `top`, which reads them through ops of `through` and views; the
    products too, views and `top` not. Empty if it reads no product that way."""

    def ends(node: Node) -> bool:
        return node.op.view is None and node.op not in through

    path: set[Node] = set()
    assert top.src[0] is not None
    for node in toposort([top.src[0]], stop=ends):
        if product(node) or (not ends(node) and any(s in path for s in node.src)):
            path.add(node)
    return {node for node in path if node.op.view is None} if top.src[0] in path else set()


def _copies(node: Node | None, top: Node) -> set[Node]:
    """Copies of the softmax `top` on the way to `node`."""
    copies = set()
    while node is not None and node is not top:
        if node.op.view is None:
            copies.add(node)
        node = node.src[0]
    return copies


def _result_axis(out: Node, port: int, top: Node, axis: int) -> int | None:
    """The axis of `out` along which pieces read pieces of `axis` of `top`, its source `port`."""

    def leads_there(here: int) -> bool:
        node = out
        while node is not top:
            rule = slice_of(node, here, node.ne[here])
            i = port if node is out else 0
            source, step = node.src[i], None if rule is None else rule.cuts[i]
            if step is None or source is None:
                return False
            node, here = source, step.axis
        return here == axis

    if top.ne[axis] == 1:
        return None
    return next((a for a in range(4) if leads_there(a)), None)
