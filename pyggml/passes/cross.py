"""Inserts a transfer node for every tensor that another device reads."""

from __future__ import annotations

from dataclasses import replace

from pyggml.backends.base import Backend
from pyggml.graph import Graph, rebuilt
from pyggml.interning import inherit
from pyggml.joint import joint_receive
from pyggml.node import Node
from pyggml.ops.leaf import constant_op, input_op
from pyggml.ops.views import state_of, view, view_op
from pyggml.passes.jointly import Meeting, Meetings, meetings
from pyggml.passes.order import checked_order
from pyggml.passes.work import Work, viewed
from pyggml.transfer import transfer

#: (node, device) -> the first row that the device reads, and the row after the last. Rows are
#: parts along the node's outermost axis.
RowsRead = dict[tuple[Node, str], tuple[int, int]]


def cross(work: Work) -> Work:
    """The graph in which each device reads only its own memory, with one transfer per tensor and
    device."""
    if not work.several:
        return work
    crossing = _Crossing(work, meetings(work, checked_order(work.graph)))
    for node in work.graph.nodes:
        if not _is_free_view(node):
            crossing.rebuild(node)
    outputs = {key: crossing.at_home(node) for key, node in work.graph.outputs.items()}
    updates = [crossing.at_home(node) for node in work.graph.updates]
    graph = Graph(outputs, [*updates, *crossing.unread()])
    scores = frozenset(crossing.new.get(node, node) for node in work.scores)
    return replace(work, graph=graph, homes=crossing.homes, scores=scores)


class _Crossing:
    """The new graph, built sources first. Views are rebuilt where a device reads them.

    homes  of new nodes
    new    old node -> new node, except views
    on     (old node, device) -> the new node that the device reads
    met    (turn, number of a device) -> its joint node
    """

    def __init__(self, work: Work, meetings: Meetings) -> None:
        self.work, self.meetings = work, meetings
        self.met: dict[tuple[int, int], Node] = {}
        self.sent: set[tuple[int, int]] = set()  # those whose result nobody reads
        self.homes: dict[Node, Backend] = {}
        self.new: dict[Node, Node] = {}
        self.on: dict[tuple[Node, str], Node] = {}
        self.rows = _rows_read(work)

    def rebuild(self, node: Node) -> None:
        """Build the new form of a node that is not a view."""
        home = self.work.home(node)
        meeting = self.meetings.collectives.get(node)
        if meeting is not None:
            joint = self._joint(meeting, meeting.number(home))
            self.new[node] = inherit(meeting.shown(node, joint), node)
            self.homes[self.new[node]] = home
            return
        if node.op is transfer:  # of a sharded graph: each device computes the sum of all parts
            self.new[node] = self.read(node["a"], home)
            return
        src = tuple(None if s is None else self.read(s, home) for s in node.src)
        self.new[node] = inherit(rebuilt(node, src), node)
        self.homes[self.new[node]] = home

    def _joint(self, meeting: Meeting, number: int) -> Node:
        """The step of one of the devices that meet."""
        key = (meeting.turn, number)
        if key not in self.met:
            part, home = meeting.parts[number], meeting.devices[number]
            self._meet(meeting, number, self.read(part, home))
        return self.met[key]

    def _meet(self, meeting: Meeting, number: int, part: Node) -> Node:
        joint = inherit(meeting.joint(part, number), meeting.parts[number])
        self.homes[joint] = meeting.devices[number]
        self.met[meeting.turn, number] = joint
        return joint

    def unread(self) -> list[Node]:
        """The steps of devices that take part in a meeting and do not read its result."""
        before = {key for key in self.met if key not in self.sent}
        for meeting in dict.fromkeys(self.meetings.collectives.values()):
            for number in range(len(meeting.parts)):
                self._joint(meeting, number)
        return [joint for key, joint in self.met.items() if key not in before]

    def at_home(self, node: Node) -> Node:
        """The new node for `node`, on the device of `node`."""
        return self.read(node, self.work.home(node))

    def read(self, node: Node, backend: Backend) -> Node:
        """The new node that `backend` reads for `node`."""
        views = []
        while _is_free_view(node) and (node, backend.device) not in self.on:
            views.append(node)
            node = viewed(node)
        new = self.on.get((node, backend.device))
        if new is None:
            here = self.work.home(node).device == backend.device
            new = self.new[node] if here else self._transfer(node, backend)
            self.on[node, backend.device] = new
        for old in reversed(views):
            new = inherit(self._view(old, new), old)
            self.homes[new] = backend
            self.on[old, backend.device] = new
        return new

    def _view(self, old: Node, source: Node) -> Node:
        """The view `old` of `source`, which may be a transfer of only some rows."""
        base = viewed(old)
        first, _ = self.rows.get((base, self.homes[source].device), (0, 0))
        if source.op not in (transfer, joint_receive) or first == 0:
            return rebuilt(old, (source,))
        start = list(old.attrs["start"])
        start[_outermost(base)] -= first
        return view_op.make((source,), {**old.attrs, "start": tuple(start)}, old.spec, line=False)

    def _transfer(self, node: Node, backend: Backend) -> Node:
        """A transfer to `backend` of the rows of `node` that it reads."""
        source = self.new[node]
        axis = _outermost(node)
        first, end = self.rows.get((node, backend.device), (0, node.ne[axis]))
        if end - first < node.ne[axis]:
            ne, start = list(node.ne), [0, 0, 0, 0]
            ne[axis], start[axis] = end - first, first
            source = view(source, ne=ne[: node.spec.rank], start=start)
            self.homes[source] = self.homes[self.new[node]]
        meeting = self.meetings.copies.get((node, backend.device))
        if meeting is not None:
            self._meet(meeting, 0, source)
            self.sent.add((meeting.turn, 0))
            return self._meet(meeting, 1, source)
        attrs = {"to": backend.place, "resident": self._is_resident(node, backend)}
        new = transfer.make((source,), attrs, source.spec, line=False)
        self.homes[new] = backend
        return new

    def _is_resident(self, node: Node, backend: Backend) -> bool:
        """Whether the store keeps a leaf on this device too. A pinned weight is instead copied
        while a device needs it; but the host always has all weights."""
        if node.op is constant_op:
            return self.work.pinned(node) is None or backend.device == "host"
        return node.op is input_op


def _is_free_view(node: Node) -> bool:
    """Whether the node is a view that any device can take of its copy of the source. `state_of` is
    not: it shows more than its source."""
    return node.op.view is not None and node.op is not state_of


def _outermost(node: Node) -> int:
    """The last axis with more than one element; parts along it are contiguous."""
    return max((axis for axis in range(4) if node.ne[axis] > 1), default=0)


def _rows_read(work: Work) -> RowsRead:
    """The rows that each device reads of computed nodes and states."""
    rows: RowsRead = {}
    direct: dict[Node, Node] = {}  # view -> the view directly on its base that it sees through
    for node in work.graph.nodes:
        if _is_free_view(node):
            direct[node] = direct.get(viewed(node), node)
            continue
        device = work.home(node).device
        for source in node.src:
            if source is None:
                continue
            shown = direct.get(source, source)
            base = viewed(shown) if _is_free_view(shown) else shown
            if base.op in (constant_op, input_op):
                continue
            first, end = _rows(shown, base)
            known = rows.get((base, device), (first, end))
            rows[base, device] = min(first, known[0]), max(end, known[1])
    return rows


def _rows(shown: Node, base: Node) -> tuple[int, int]:
    """The first row of `base` that `shown`, the base itself or a view of it, shows, and the row
    after the last."""
    axis = _outermost(base)
    if shown.op is not view_op or axis == 0:
        return 0, base.ne[axis]
    start, step = shown.attrs["start"][axis], shown.attrs["step"][axis]
    return start, start + (shown.ne[axis] - 1) * step + 1
