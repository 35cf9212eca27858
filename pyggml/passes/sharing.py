"""Which tensors share a block of memory: parts of a concat, and results over a source."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from pyggml.backends.step import LoadStep, LoopStep, Step
from pyggml.node import Node
from pyggml.passes.work import viewed, written
from pyggml.spec import Ne


class Sharing:
    """The blocks of memory that the nodes of some steps need, and when they need them.

    owner         node -> the node whose memory it shows or writes into
    computed      node -> the step that materializes it; nodes used only inside a fused step are
                  absent
    last          owner -> the last step that reads it; for roots, the number of steps
    parent        part of a concat -> the concat that it is written into, and its start there
    copied_parts  parts that the concat must copy
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        steps: Sequence[Step],
        roots: Collection[Node],
        outside: Collection[Node],
    ) -> None:
        self.steps, self.outside = steps, outside
        self.owner = _owners(nodes, outside)
        self.computed = self._materialized(roots)
        self.last = self._last_reads(roots)
        self.parent: dict[Node, tuple[Node, Ne]] = {}
        self.copied_parts = 0
        self._write_into_parents(nodes)
        self._first: dict[Node, Node] = {}  # owner -> the first node in its memory
        self._share_in_place()

    def in_arena(self, node: Node) -> bool:
        """Whether a node has its own memory in an arena."""
        return node in self.computed and self.owner[node] is node and node not in self.outside

    def block(self, node: Node) -> Node:
        """The node that stands for the block of memory of an owner."""
        parent = self.parent.get(node)
        return self._first[parent[0] if parent else node]

    def _materialized(self, roots: Collection[Node]) -> dict[Node, int]:
        owners = {self.owner[n] for step in self.steps for n in step.reads}
        owners |= {self.owner[root] for root in roots}
        return {
            node: i
            for i, step in enumerate(self.steps)
            for node in step.nodes
            if node is step.node or node in owners
        }

    def _last_reads(self, roots: Collection[Node]) -> dict[Node, int]:
        last = {node: i for node, i in self.computed.items() if self.owner[node] is node}
        for i, step in enumerate(self.steps):
            for read in step.reads:
                last[self.owner[read]] = i
        for root in roots:
            last[self.owner[root]] = len(self.steps)
        return last

    # -- parts of a concat --------------------------------------------------------------------

    def _write_into_parents(self, nodes: Sequence[Node]) -> None:
        """Let sources of a concat be written directly into it."""
        views: dict[Node, list[Node]] = {}
        for node in nodes:
            if node.op.view is not None:
                views.setdefault(viewed(node), []).append(node)
        # Readers of roots and sources of loops expect the usual strides.
        loops = (step for step in self.steps if isinstance(step, LoopStep))
        fixed = {self.owner[read] for loop in loops for read in loop.reads}
        fixed |= {node for node, end in self.last.items() if end == len(self.steps)}
        for step in self.steps:
            node = step.node
            if node.op.parts is None or not self.in_arena(node):
                continue
            for part, start in zip(node.src, node.op.parts(node)):
                if part is not None and part not in fixed and self._fits(part, node, views):
                    self.parent[part] = (node, start)
                    self.last[node] = max(self.last[node], self.last[part])
                else:
                    self.copied_parts += 1

    def _fits(self, part: Node, concat: Node, views: Mapping[Node, list[Node]]) -> bool:
        """Whether the step of `part` can write into `concat`, and views of `part` can stay."""
        return (
            self.in_arena(part)
            and part not in self.parent
            and concat not in self.parent
            and self.steps[self.computed[part]].strided
            and concat.src.count(part) == 1
            and _viewable(part, concat.spec.nb, views)
        )

    # -- results over a source ----------------------------------------------------------------

    def _share_in_place(self) -> None:
        """Let results take over the memory of sources that no later step reads."""
        concats = {concat for concat, _ in self.parent.values()}
        self._first = {node: node for node in self.computed if self.in_arena(node)}
        for i, step in enumerate(self.steps):
            node = step.node
            if not self.in_arena(node) or node in self.parent or node in concats:
                continue
            source = next((s for s in step.inplace if self._may_take(s, i)), None)
            if source is not None:
                self._first[node] = self._first[self.owner[source]]

    def _may_take(self, source: Node, i: int) -> bool:
        """Whether the result of step `i` may overwrite `source`."""
        step, own = self.steps[i], self.owner[source]
        node = step.node
        return (
            self.in_arena(own)
            and own not in self.parent
            and not isinstance(self.steps[self.computed[own]], LoadStep)
            and self.last[own] == i
            and source.spec.nbytes == own.spec.nbytes == node.spec.nbytes
            and source.nb == node.spec.nb
            and own.nb == own.spec.nb
            and all(read is source or self._is_apart(read, own) for read in step.reads)
        )

    def _is_apart(self, read: Node, own: Node) -> bool:
        """Whether `read` is not in the memory of `own`."""
        other = self.owner[read]
        return not self.in_arena(other) or self.block(other) is not self._first[own]


def _owners(nodes: Sequence[Node], outside: Collection[Node]) -> dict[Node, Node]:
    owner: dict[Node, Node] = {}
    for node in nodes:
        if node in outside:
            owner[node] = node
        elif node.op.view is not None:
            owner[node] = owner[viewed(node)]
        elif node.op.writes is not None:
            owner[node] = owner[written(node)]
        else:
            owner[node] = node
    return owner


def _viewable(node: Node, nb: Ne, views: Mapping[Node, list[Node]]) -> bool:
    """Whether every view of `node` is possible if `node` has the strides `nb`."""
    strides = [(node, nb)]
    for source, source_nb in strides:
        for view in views.get(source, ()):
            assert view.op.view is not None
            place = view.op.view(view, source_nb)
            if place is None:
                return False
            strides.append((view, place[1]))
    return True
