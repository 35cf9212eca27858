"""A transfer node for everything that one device makes and another reads."""

from __future__ import annotations

from dataclasses import replace

from pyggml.backends.base import Backend
from pyggml.graph import Graph, rebuilt
from pyggml.interning import inherit
from pyggml.node import Node
from pyggml.ops.leaf import constant_op, input_op
from pyggml.ops.views import state_of, view, view_op
from pyggml.passes.order import check_order
from pyggml.passes.work import Work
from pyggml.transfer import transfer

Homes = dict[Node, Backend]


def cross(work: Work) -> Work:
    """Every source that is on another device is read from a transfer of it; one each."""
    if not work.several:
        return work
    check_order(work.graph)
    maker = _Crossing(work)
    graph = work.graph
    for node in graph.nodes:
        maker.cross(node)
    outputs = {key: maker.own(node) for key, node in graph.outputs.items()}
    made = Graph(outputs, [maker.own(node) for node in graph.updates])
    scores = frozenset(maker.new.get(node, node) for node in work.scores)
    return replace(work, graph=made, homes=maker.homes, scores=scores)


class _Crossing:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.homes: Homes = {}
        self.new: dict[Node, Node] = {}
        self.brought: dict[tuple[Node, str], Node] = {}
        self.rows = _rows_read(work)

    def cross(self, node: Node) -> None:
        """Make the new form of a node that is no view; views are made where they are read."""
        if _looks(node):
            return
        home = self.work.home(node)
        src = tuple(None if s is None else self.on(s, home) for s in node.src)
        self.new[node] = inherit(rebuilt(node, src), node)
        self.homes[self.new[node]] = home

    def own(self, node: Node) -> Node:
        """The node on its own device."""
        return self.on(node, self.work.home(node))

    def on(self, node: Node, backend: Backend) -> Node:
        """The node as `backend` reads it."""
        views = []
        while _looks(node) and (node, backend.device) not in self.brought:
            views.append(node)
            node = _shown(node)
        made = self.brought.get((node, backend.device))
        if made is None:
            here = self.work.home(node).device == backend.device
            made = self.new[node] if here else self._transfer(node, backend)
            self.brought[node, backend.device] = made
        for node in reversed(views):
            made = inherit(self._view(node, made), node)
            self.homes[made] = backend
            self.brought[node, backend.device] = made
        return made

    def _view(self, node: Node, source: Node) -> Node:
        """The view `node` over `source`, which may be a transfer of the rows that are read."""
        first, _ = self.rows.get((node.src[0], self.homes[source].device), (0, 0))
        if source.op is not transfer or first == 0:
            return rebuilt(node, (source,))
        assert node.src[0] is not None
        start = list(node.attrs["start"])
        start[_outermost(node.src[0])] -= first
        return view_op.make((source,), {**node.attrs, "start": tuple(start)}, node.spec, line=False)

    def _transfer(self, node: Node, backend: Backend) -> Node:
        source = self.new[node]
        axis = _outermost(node)
        first, last = self.rows.get((node, backend.device), (0, node.ne[axis]))
        if last - first < node.ne[axis]:
            ne, start = list(node.ne), [0, 0, 0, 0]
            ne[axis], start[axis] = last - first, first
            source = view(source, ne=ne[: node.spec.rank], start=start)
            self.homes[source] = self.homes[self.new[node]]
        given = self._is_given(node, backend)
        attrs = {"to": backend.place, "resident": given}
        made = transfer.make((source,), attrs, source.spec, line=False)
        self.homes[made] = backend
        return made

    def _is_given(self, node: Node, backend: Backend) -> bool:
        """Whether the store gives a leaf to this device as well. Pinned weights are brought while
        they are needed, except to the host, where all weights are."""
        if node.op is constant_op:
            return self.work.pinned(node) is None or backend.device == "host"
        return node.op is input_op


def _looks(node: Node) -> bool:
    """Whether the node is a view that each device can take for itself."""
    return node.op.view is not None and node.op is not state_of


def _shown(view: Node) -> Node:
    """What a view looks at."""
    assert view.src[0] is not None
    return view.src[0]


def _outermost(node: Node) -> int:
    """The last axis with more than one element: parts along it lie together."""
    return max((axis for axis in range(4) if node.ne[axis] > 1), default=0)


def _rows_read(work: Work) -> dict[tuple[Node | None, str], tuple[int, int]]:
    """(node, device) -> the rows along its outermost axis, from and to, that are read there."""
    found: dict[tuple[Node | None, str], tuple[int, int]] = {}
    first: dict[Node, Node] = {}  # view -> the view by which it looks at its base
    for node in work.graph.nodes:
        if _looks(node):
            first[node] = first.get(_shown(node), node)
            continue
        device = work.home(node).device
        for source in node.src:
            if source is None:
                continue
            view = first.get(source, source)
            base = _shown(view) if _looks(view) else view
            if base.op in (constant_op, input_op):
                continue
            low, high = _rows(view, base)
            before = found.get((base, device), (low, high))
            found[base, device] = min(low, before[0]), max(high, before[1])
    return found


def _rows(first: Node, base: Node) -> tuple[int, int]:
    """Rows of `base` from the first to the last one that its view `first` (or it itself) shows."""
    axis = _outermost(base)
    if first.op is not view_op or axis == 0:
        return 0, base.ne[axis]
    start, step = first.attrs["start"][axis], first.attrs["step"][axis]
    return start, start + (first.ne[axis] - 1) * step + 1
