"""Lifetimes of steps -> offsets in one arena: who may share memory with whom, and when.

Steps are lowered before memory is planned, so the scratch of a step is an interval like every
tensor. Kernels can write strided results: a part of a `concat` is written where it belongs if its
step and all its views allow it; parts that must be copied are counted in `print(plan)`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

from pyggml.backends.step import Spot, Step, own_nodes
from pyggml.node import Node
from pyggml.passes.arena import Interval, live_bytes, pack
from pyggml.passes.work import Arena, Placement, Work
from pyggml.spec import Ne


def place(work: Work) -> Work:
    """Every tensor's place in an arena or in a leaf."""
    alignments: dict[str, int] = {}
    for backend in work.backends:
        alignments[backend.device] = max(backend.alignment, alignments.get(backend.device, 1))
    placed = place_steps(
        work.order,
        work.steps,
        frozenset(work.graph.roots),
        frozenset(work.leaves),
        work.scores,
        alignments,
        lambda node: work.home(node).device,
    )
    return replace(work, placement=placed)


def place_steps(
    nodes: Sequence[Node],
    steps: Sequence[Step],
    roots: Collection[Node],
    outside: Collection[Node],
    scores: Collection[Node],
    alignments: Mapping[str, int],
    device_of: Callable[[Node], str] = lambda node: "",
) -> Placement:
    """Give every tensor of `nodes` its place.

    steps       of all devices, in one order that holds for lifetimes on each of them
    roots       nodes whose memory must survive to the end
    outside     nodes with memory of their own: leaves, a loop body's result
    scores      nodes that the attention budget counts
    alignments  of each device's arena
    """
    return _Placer(nodes, steps, roots, outside, scores, alignments, device_of).placement()


class _Placer:
    def __init__(
        self,
        nodes: Sequence[Node],
        steps: Sequence[Step],
        roots: Collection[Node],
        outside: Collection[Node],
        scores: Collection[Node],
        alignments: Mapping[str, int],
        device_of: Callable[[Node], str],
    ) -> None:
        self.nodes = (*nodes, *own_nodes(nodes, steps))
        self.steps, self.alignments = steps, alignments
        self.device_of = device_of
        self.outside, self.scores = outside, scores
        self.owner = _owners(self.nodes, outside)
        self.made = self._results(roots)
        self.last = self._last_uses(roots)
        self.home: dict[Node, tuple[Node, Ne]] = {}  # part -> (parent, start in it)
        self.storage: dict[Node, Node] = {}  # owner -> the node whose block it uses
        self.copied_parts = 0

    def _results(self, roots: Collection[Node]) -> dict[Node, int]:
        """Node -> the step that leaves it in memory. What a step covers and only it reads has
        none."""
        read = {self.owner[n] for step in self.steps for n in step.reads}
        wanted = read | {self.owner[root] for root in roots}
        return {
            node: i
            for i, step in enumerate(self.steps)
            for node in step.nodes
            if node is step.node or node in wanted
        }

    def _last_uses(self, roots: Collection[Node]) -> dict[Node, int]:
        """Owner -> the last step that reads it; the end for roots."""
        last = {node: i for node, i in self.made.items() if self.owner[node] is node}
        for i, step in enumerate(self.steps):
            for read in step.reads:
                last[self.owner[read]] = i
        for root in roots:
            last[self.owner[root]] = len(self.steps)
        return last

    def placement(self) -> Placement:
        self._stand_in_parents()
        self._share_in_place()
        at: dict[Node, int] = {}
        scratch_at = [0] * len(self.steps)
        arenas = {}
        blocks, scratch = self._intervals()
        for device, alignment in self.alignments.items():
            mine = [node for node in blocks if self.device_of(node) == device]
            mine_scratch = [i for i in scratch if self.device_of(self.steps[i].node) == device]
            intervals = [blocks[n] for n in mine] + [scratch[i] for i in mine_scratch]
            offsets, nbytes = pack(intervals, alignment)
            at.update(zip(mine, offsets))
            for i, offset in zip(mine_scratch, offsets[len(mine) :]):
                scratch_at[i] = offset
            live = tuple(live_bytes(intervals, len(self.steps)))
            arenas[device] = Arena(nbytes, live, self._score_peak(device))
        return Placement(self._spots(at), tuple(scratch_at), arenas, self.copied_parts)

    # -- sharing ------------------------------------------------------------------------------

    def _in_arena(self, node: Node) -> bool:
        return node in self.made and self.owner[node] is node and node not in self.outside

    def _stand_in_parents(self) -> None:
        """Let the sources of a concat be written where the concat wants them."""
        views: dict[Node, list[Node]] = {}
        for node in self.nodes:
            if node.op.view is not None and node.src[0] is not None:
                views.setdefault(node.src[0], []).append(node)
        # Sources of loops and roots keep the layout that everyone expects.
        fixed = {self.owner[r] for step in self.steps if step.loop for r in step.reads}
        fixed |= {node for node, end in self.last.items() if end == len(self.steps)}
        for step in self.steps:
            node = step.node
            if node.op.parts is None or not self._in_arena(node):
                continue
            for part, start in zip(node.src, node.op.parts(node)):
                if part is not None and self._fits(part, node, fixed, views):
                    self.home[part] = (node, start)
                    self.last[node] = max(self.last[node], self.last[part])
                else:
                    self.copied_parts += 1

    def _fits(
        self, part: Node, parent: Node, fixed: set[Node], views: Mapping[Node, list[Node]]
    ) -> bool:
        return (
            self._in_arena(part)
            and part not in fixed
            and part not in self.home
            and parent not in self.home
            and self.steps[self.made[part]].strided
            and parent.src.count(part) == 1
            and _viewable(part, parent.spec.nb, views)
        )

    def _share_in_place(self) -> None:
        """Let results take over the memory of sources that nobody needs afterwards."""
        parents = {parent for parent, _ in self.home.values()}
        self.storage = {node: node for node in self.made if self._in_arena(node)}
        for i, step in enumerate(self.steps):
            node = step.node
            if not self._in_arena(node) or node in self.home or node in parents:
                continue
            for source in step.inplace:
                if self._may_take(node, source, i, step):
                    self.storage[node] = self.storage[self.owner[source]]
                    break

    def _may_take(self, node: Node, source: Node, i: int, step: Step) -> bool:
        own = self.owner[source]
        return (
            self._in_arena(own)
            and own not in self.home
            and self.steps[self.made[own]].layout is None
            and self.last[own] == i
            and source.spec.nbytes == own.spec.nbytes == node.spec.nbytes
            and source.nb == node.spec.nb
            and own.nb == own.spec.nb
            and all(read is source or self._apart(read, own) for read in step.reads)
        )

    def _apart(self, read: Node, own: Node) -> bool:
        other = self.owner[read]
        return not self._in_arena(other) or self._block(other) is not self.storage[own]

    # -- results ------------------------------------------------------------------------------

    def _block(self, node: Node) -> Node:
        """The node that stands for the block of memory `node` lives in."""
        parent = self.home.get(node)
        return self.storage[parent[0] if parent else node]

    def _intervals(self) -> tuple[dict[Node, Interval], dict[int, Interval]]:
        """Lifetimes of blocks, and of the scratch of steps that have some."""
        life: dict[Node, list[int]] = {}
        end = len(self.steps) - 1
        for node, i in self.made.items():
            if not self._in_arena(node):
                continue
            block = self._block(node)
            span = life.setdefault(block, [i, i])
            span[0] = min(span[0], i)
            span[1] = max(span[1], min(self.last[node], end))
        blocks = {node: Interval(a, b, self._nbytes(node)) for node, (a, b) in life.items()}
        scratch = {i: Interval(i, i, s.scratch) for i, s in enumerate(self.steps) if s.scratch}
        return blocks, scratch

    def _nbytes(self, node: Node) -> int:
        step = self.steps[self.made[node]]
        return step.nbytes if step.node is node else node.spec.nbytes

    def _spots(self, at: Mapping[Node, int]) -> dict[Node, Spot]:
        spots: dict[Node, Spot] = {}
        for node in self.nodes:
            if node in self.outside:
                spots[node] = Spot(node, 0, node.nb)
            elif node.op.view is not None or node.op.writes is not None:
                if self._source(node) in spots:  # else a step covers it, and nothing reads this
                    spots[node] = self._looked(node, spots)
            elif node in self.home:
                parent, start = self.home[node]
                units = (start[0] // node.dtype.block, *start[1:])
                inside = sum(s * b for s, b in zip(units, parent.spec.nb))
                spots[node] = Spot(None, at[self._block(node)] + inside, parent.spec.nb)
            elif node in self.made:
                spots[node] = Spot(None, at[self._block(node)], node.spec.nb)
        return spots

    @staticmethod
    def _source(node: Node) -> Node:
        """What a view looks at, or a write writes into."""
        source = node.src[node.op.writes or 0]
        assert source is not None
        return source

    def _looked(self, node: Node, spots: Mapping[Node, Spot]) -> Spot:
        seen = spots[self._source(node)]
        if node.op.view is None:
            return seen
        looked = node.op.view(node, seen.nb)
        assert looked is not None
        return Spot(seen.base, seen.offset + looked[0], looked[1])

    def _score_peak(self, device: str) -> int:
        """Distinct blocks of counted tensors alive in a step, and the scratch of their steps."""
        counted = [
            n
            for n in self.made
            if n in self.scores and self._in_arena(n) and self.device_of(n) == device
        ]
        starts: dict[int, list[Node]] = {}
        for node in counted:
            starts.setdefault(self.made[node], []).append(node)
        alive: dict[Node, int] = {}
        peak = 0
        for i, step in enumerate(self.steps):
            for node in starts.get(i, ()):
                alive[node] = self.last[node]
            total = sum(b.spec.nbytes for b in {self._block(node) for node in alive})
            if self.device_of(step.node) != device:
                pass
            elif step.bodies:
                total += max(body.score_peak for body in step.bodies)
            elif any(n in self.scores for n in (step.node, *map(self.owner.get, step.reads))):
                total += step.scratch
            peak = max(peak, total)
            alive = {node: end for node, end in alive.items() if end > i}
        return peak


def _owners(nodes: Sequence[Node], outside: Collection[Node]) -> dict[Node, Node]:
    """Node -> the node whose memory it looks at or writes into."""
    owner: dict[Node, Node] = {}
    for node in nodes:
        source = None
        if node not in outside and (node.op.view is not None or node.op.writes is not None):
            source = node.src[node.op.writes or 0]
        owner[node] = node if source is None else owner[source]
    return owner


def _viewable(node: Node, nb: Ne, views: Mapping[Node, list[Node]]) -> bool:
    """Whether every view of `node` still works with these strides."""
    shown = [(node, nb)]
    for source, strides in shown:
        for view in views.get(source, ()):
            assert view.op.view is not None
            looked = view.op.view(view, strides)
            if looked is None:
                return False
            shown.append((view, looked[1]))
    return True
