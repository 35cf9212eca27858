"""Borders between devices: nodes moved so that less crosses them, and a transfer for what does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from pyggml.backends.base import Backend
from pyggml.graph import Graph, rebuilt, toposort
from pyggml.node import Node, inherit
from pyggml.ops.leaf import constant_op, input_op, state_op
from pyggml.ops.views import state_of, view, view_op
from pyggml.passes.states import state_edges
from pyggml.passes.work import Work
from pyggml.transfer import transfer

Homes = dict[Node, Backend]

#: Walks over the graph in search of a better place for free nodes; one mostly is enough.
WALKS = 4


def bases(node: Node) -> Iterator[Node]:
    """What the sources of `node` are, or look at through views."""
    return (source.base for source in node.src if source is not None)


# -- what may move ------------------------------------------------------------------------------


def fewer_copies(
    backends: Sequence[Backend],
    graph: Graph,
    homes: Mapping[Node, Backend],
    free: Mapping[Node, Backend],
) -> Homes:
    """Homes with nodes that want nothing moved to where the fewest bytes are copied for them.

    free  those nodes, and where each would be for the sake of its sources. They move only between
          that device, the preferred one and those of their neighbours that are not free
    """
    found = dict(homes)
    rank = {backend: i for i, backend in enumerate(backends)}
    users: dict[Node, list[Node]] = {node: [] for node in found}
    for node in graph.nodes:
        if node in found and not node.op.leaf:
            for base in bases(node):
                if base in users:
                    users[base].append(node)
    order = [node for node in graph.nodes if node in free]
    for walk in range(WALKS):
        moved = False
        for node in order[:: -1 if walk % 2 else 1]:
            near = [*users[node], *(b for b in bases(node) if b in found)]
            ways = {
                found[node],
                free[node],
                backends[0],
                *(found[n] for n in near if n not in free),
            }
            best = min(ways, key=lambda way: (_copied(node, way, found, users), rank[way]))
            if best is not found[node] and best.supports(node) is None:
                found[node], moved = best, True
        if not moved:
            break
    return found


def _copied(
    node: Node, way: Backend, homes: Homes, users: Mapping[Node, list[Node]]
) -> tuple[int, int]:
    """Bytes that are copied because `node` is on `way`, and in how many copies."""
    total = count = 0
    for base in dict.fromkeys(bases(node)):
        here = base in homes and homes[base].device != way.device and not base.op.leaf
        if here and not any(homes[u].device == way.device for u in users[base] if u is not node):
            total += base.spec.nbytes
            count += 1
    far = {homes[user].device for user in users[node]} - {way.device}
    return total + len(far) * node.spec.nbytes, count + len(far)


def leaf_homes(work: Work, graph: Graph, homes: Mapping[Node, Backend]) -> Homes:
    """Homes of leaves: pinned, where the store has a state, else with the first user.

    A weight pinned to a device where none of its readers runs is with the first of them too; on
    the host it stays, and is brought to them.
    """
    found: Homes = {}
    read: dict[Node, set[Backend]] = {}
    for node in graph.nodes:
        if node in homes and not node.op.leaf:
            for base in bases(node):
                read.setdefault(base, set()).add(homes[node])

    def settle(leaf: Node, user: Backend) -> None:
        if leaf.op.leaf and leaf not in homes and leaf not in found:
            held = work.settled.get(leaf.attrs["name"]) if leaf.op is state_op else None
            pin = work.pinned(leaf)
            if pin is not None and pin not in read.get(leaf, {pin}) and leaf.op is constant_op:
                pin = pin if pin.device == "host" else None
            found[leaf] = held or pin or user

    for node in graph.nodes:
        if node in homes and not node.op.leaf:
            for base in bases(node):
                settle(base, homes[node])
    for node in graph.nodes:  # what only an output looks at
        settle(node, work.backends[0])
    return found


# -- transfers ----------------------------------------------------------------------------------


def cross_borders(work: Work) -> Work:
    """Every source that is on another device is read from a transfer of it; one each."""
    if not work.several:
        return work
    toposort(work.graph.roots, state_edges(work.graph.nodes))  # while it names the user's nodes
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
