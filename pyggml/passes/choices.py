"""How one attention may be cut, and the bytes that each choice needs when it runs alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from pyggml.backends.base import Backend
from pyggml.graph import Graph, rebuilt, toposort
from pyggml.loop import loop_of
from pyggml.node import Node
from pyggml.passes.bodies import piece_of
from pyggml.passes.cut import Cuts, cut
from pyggml.passes.regions import Region
from pyggml.passes.work import Work

#: Products of fewer keys take other paths through BLAS and round differently, and thousands of
#: blocks are slow.
FINEST_KEYS = 32


@dataclass(frozen=True, slots=True)
class Choice:
    """The pieces of an attention.

    need  the lowest limit that gives them: the counted bytes that the attention needs alone, or
          more if something that bisection had to ask about first needs more
    cuts  None leaves the attention whole (0 pieces); () makes a loop of one piece
    """

    need: int
    cuts: Cuts | None
    pieces: int


class Choices:
    """The choices for an attention; attentions of the same structure share them.

    Each way to cut gives a row of choices, from few pieces to many, and `best` finds one by
    bisection: it would take minutes to measure thousands. Bisection asks the same questions for
    every limit until the answers differ. There the larger limit fits, which leads to fewer pieces.
    So a larger limit never gives more pieces, even if more pieces sometimes need more memory.
    """

    def __init__(self, region: Region, home: Backend, finish: Callable[[Work], Work]) -> None:
        self.region, self.home, self.finish = _standalone(region), home, finish
        self.needs: dict[Cuts | None, int | None] = {}

    @cached_property
    def whole(self) -> Choice:
        need = self._need(None)
        assert need is not None
        return Choice(need, None, 0)

    @cached_property
    def least(self) -> int:
        """The lowest limit that something fits."""
        finest = (self._need(way[-1]) for way in self.ways)
        return min([self.whole.need, *(need for need in finest if need is not None)])

    @cached_property
    def ways(self) -> list[list[Cuts]]:
        """For each way to cut, every number of pieces that it can give, fewest first."""
        ways = []
        for way in self.region.ways:
            axes = [axis for axis in way if self.region.extent(axis) > 1]
            if axes:
                outer = tuple((axis, 1) for axis in axes[:-1])
                finest = FINEST_KEYS if axes[-1] == "kv" else 1
                steps = _steps(self.region.extent(axes[-1]), finest)
                ways.append([(*outer, (axes[-1], step)) for step in steps])
        return [way for way in ways if way]

    def best(self, limit: int) -> Choice:
        """The fewest pieces that need at most `limit`, which is `least` or more."""
        if self.whole.need <= limit:
            return self.whole
        best: Choice | None = None
        for way in self.ways:
            if best is None or self.region.pieces(way[0]) < best.pieces:
                first = self._first(way, limit)
                if first is not None and (best is None or first.pieces < best.pieces):
                    best = first
        assert best is not None, f"the limit {limit} is below {self.least}"
        return best

    def _first(self, way: list[Cuts], limit: int) -> Choice | None:
        """The choice at which bisection of a way ends; None if the last one does not fit."""
        cuts, most = way[-1], self._need(way[-1])
        if most is None or most > limit:
            return None
        low, high = 0, len(way) - 1
        while low < high:
            at = middle = (low + high) // 2
            need = self._need(way[at])
            while need is None and at + 1 < high:  # not every step keeps groups of heads together
                at += 1
                need = self._need(way[at])
            if need is None:
                high = middle
            elif need <= limit:
                cuts, most, high = way[at], max(most, need), middle
            else:
                low = at + 1
        return Choice(most, cuts, self.region.pieces(cuts))

    def _need(self, cuts: Cuts | None) -> int | None:
        """The counted bytes that the attention needs alone in these pieces; None if illegal."""
        if cuts not in self.needs:
            self.needs[cuts] = self._measured(cuts)
        return self.needs[cuts]

    def _measured(self, cuts: Cuts | None) -> int | None:
        out, scores = self.region.out, self.region.counted
        if cuts is not None:
            loop = cut(self.region, cuts)
            if loop is None or not _runs(loop.node, self.home):
                return None
            out, scores = loop.node, loop.counted
        work = Work(Graph({"out": out}), (self.home,), scores=frozenset(scores))
        return self.finish(work).placed.score_peak


def _steps(total: int, finest: int) -> list[int]:
    """The sizes of the most even pieces, for each number of pieces from two on."""
    steps = [total]
    while steps[-1] > finest:
        count = -(-total // (steps[-1] - 1))
        steps.append(max(finest, -(-total // count)))
    return steps[1:]


def _runs(node: Node, home: Backend) -> bool:
    """Whether the device has a kernel for every op of a loop and of what follows it."""
    nodes = [n for n in toposort([node]) if not n.op.leaf and n.op.view is None]
    loops = [loop for loop in map(loop_of, nodes) if loop is not None]
    nodes += [n for loop in loops for body in loop.bodies() for n in toposort([body.out])]
    plain = (n for n in nodes if not n.op.leaf and n.op.view is None and loop_of(n) is None)
    return all(home.supports(n) is None for n in plain)


def structure(region: Region) -> object:
    """A key that is equal for regions of the same shapes, types, attributes and wiring."""
    index: dict[Node, int] = {}
    rows: list[object] = []

    def number(node: Node) -> int:
        if node not in index:
            index[node] = len(index)
            rows.append((node.spec, node.nb, node in region.counted))
        return index[node]

    for node in region.inside:
        src = tuple(None if s is None else number(s) for s in node.src)
        index[node] = len(index)
        attrs = tuple(node.attrs.items())
        rows.append((node.op, src, attrs, node.spec, node in region.counted))
    return tuple(rows), region.ways


def _standalone(region: Region) -> Region:
    """The same region over leaves, so that it can be planned alone."""
    new: dict[Node, Node] = {}
    for node in region.inside:
        for source in node.src:
            if source is not None and source not in new:
                new[source] = piece_of(source, source.ne)
        new[node] = rebuilt(node, tuple(None if s is None else new[s] for s in node.src))
    return region.mapped(new)
