"""Finds the fewest pieces with which the attentions of a graph fit a budget together.

A limit gives each attention the fewest pieces that need no more than the limit when it runs alone
(`choices`). Attentions that are alive together need more than each of them alone. Then a lower
limit may fit; or attentions that would stay whole become loops of one piece, whose tensors no other
attention meets. So the divisions of a graph are: uncut, and two for each limit, with and without
such loops. They and their needs do not depend on the budget, and `fit` tries them from few pieces
to many until one fits. So a larger budget never gives more pieces, and `least`, the smallest need
of all divisions, is exact. Most graphs take two trials: uncut, and with the budget as the limit.

The design that lost finds the limit by bisection. It takes few trials even if much is alive
together. But a lower limit sometimes needs more memory, so the result depended on the limits that
were tried: a larger budget could give more pieces, and less than the least budget could compile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import merge

from pyggml.backends.base import Backend
from pyggml.graph import rebuilt
from pyggml.node import Node
from pyggml.passes.choices import Choice, Choices, structure
from pyggml.passes.cut import Cut, Cuts, cut
from pyggml.passes.regions import Region
from pyggml.passes.work import Placement, Work

Division = tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """A division of the graph and what it needs.

    choices    one for each attention that may be cut, in graph order
    placement  of the whole graph
    need       the smallest budget that it fits: its peak or, if that is more, the lowest limit that
               gives it
    """

    work: Work
    choices: Division
    placement: Placement
    need: int

    @property
    def most(self) -> int:
        """Pieces of the attention that has most."""
        return _most(self.choices)


class Search:
    """The divisions of a graph and what they need.

    regions  the attentions that may be cut, in graph order
    finish   the passes that place a graph in memory
    """

    def __init__(
        self, work: Work, regions: Sequence[Region], finish: Callable[[Work], Work]
    ) -> None:
        self.work, self.regions, self.finish = work, regions, finish
        self.trials: dict[object, Trial] = {}
        self.loops: dict[object, Cut] = {}
        known: dict[object, Choices] = {}
        self.choices: list[Choices] = []
        for region in regions:
            home = work.home(region.out)
            key = structure(region), home.place
            if key not in known:
                known[key] = Choices(region, home, finish)
            self.choices.append(known[key])

    @cached_property
    def plain(self) -> Trial:
        """The graph uncut. It fits if its peak does, whatever its attentions need alone."""
        trial = self._trial(tuple(choices.whole for choices in self.choices))
        return replace(trial, need=trial.placement.score_peak)

    @cached_property
    def least_alone(self) -> list[int]:
        """The least that each attention needs alone."""
        return [choices.least for choices in self.choices]

    @property
    def lowest(self) -> int:
        """The lowest limit: below it no pieces of some attention fit."""
        return max(self.least_alone, default=0)

    def fit(self, amb: float) -> Trial | None:
        """The division of the fewest pieces that needs no more than `amb`, or None."""
        if self.plain.need <= amb:
            return self.plain
        divisions = (self._divisions(int(amb), self.lowest, loops) for loops in (False, True))
        trials = map(self._trial, merge(*divisions, key=_pieces))
        return next((trial for trial in trials if trial.need <= amb), None)

    def least(self) -> Trial:
        """The division that needs least."""
        return self._least_above(self.lowest)

    def least_with(self, most: int) -> Trial:
        """The division that needs least, of those with at most `most` pieces of an attention."""
        low, high = self.lowest - 1, max(choices.whole.need for choices in self.choices)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _most(self._at(middle)) <= most else (middle, high)
        return self._least_above(high)

    def _least_above(self, lowest: int) -> Trial:
        """The division that needs least, of limits from `lowest` on."""
        finest = self._at(lowest)
        trials = (self.plain, self._trial(finest), self._trial(_in_loops(finest)))
        least = min(trials, key=lambda trial: trial.need)
        for loops in (False, True):
            for division in self._divisions(least.need - 1, lowest, loops):
                if _limit(division) < least.need:
                    least = min(least, self._trial(division), key=lambda trial: trial.need)
        return least

    def _divisions(self, limit: int, lowest: int, loops: bool) -> Iterator[Division]:
        """The divisions for all limits from `limit` down to `lowest`: fewest pieces first.

        loops  whether attentions that would stay whole become loops of one piece
        """
        while limit >= lowest:
            division = self._at(limit)
            yield _in_loops(division) if loops else division
            limit = _limit(division) - 1

    def _at(self, limit: int) -> Division:
        return tuple(choices.best(limit) for choices in self.choices)

    def _trial(self, division: Division) -> Trial:
        key = tuple(choice.cuts for choice in division)
        if key not in self.trials:
            work = self._divided(division)
            placement = self.finish(work).placed
            need = max(placement.score_peak, _limit(division))
            self.trials[key] = Trial(work, division, placement, need)
        return self.trials[key]

    def _divided(self, division: Division) -> Work:
        """The graph with a loop in place of each attention that is cut."""
        work, new = self.work, dict[Node, Node]()
        if all(choice.cuts is None for choice in division):
            return replace(work, scores=frozenset().union(*(r.counted for r in self.regions)))
        counted: set[Node] = set()
        homes: dict[Node, Backend] = {}
        cuts = {r.out: (r, choice.cuts) for r, choice in zip(self.regions, division)}

        def rebuild(node: Node, src: tuple[Node | None, ...]) -> Node:
            result = new[node] = rebuilt(node, src)
            home = homes[result] = work.home(node)
            if node in cuts:
                region = cuts[node][0].mapped(new)
                counted.update(region.counted)
                if (axes := cuts[node][1]) is not None:
                    loop = self._loop(region, axes)
                    counted.update(loop.counted)
                    result = new[node] = loop.node
                    _settle(result, home, homes)
            return result

        graph = work.graph.rewrite(rebuild)
        exempt = frozenset(new[node] for node in work.exempt)
        scores = frozenset(counted)
        return replace(work, graph=graph, scores=scores, exempt=exempt, homes=homes)

    def _loop(self, region: Region, cuts: Cuts) -> Cut:
        """The region cut; most regions are the same nodes in many trials."""
        key = region.out, cuts
        if key not in self.loops:
            loop = cut(region, cuts)
            assert loop is not None, "other regions do not change what a region can be cut into"
            self.loops[key] = loop
        return self.loops[key]


def _settle(node: Node, home: Backend, homes: dict[Node, Backend]) -> None:
    """Put a loop, and the nodes that make its result the region's, where the region was."""
    stack = [node]
    while stack:
        part = stack.pop()
        if part not in homes and not part.op.leaf:
            homes[part] = home
            stack += [s for s in part.src if s is not None]


def _in_loops(division: Division) -> Division:
    """The same pieces, with loops of one piece for attentions that are whole."""
    return tuple(c if c.pieces else replace(c, cuts=(), pieces=1) for c in division)


def _pieces(division: Division) -> int:
    return sum(choice.pieces for choice in division)


def _most(division: Division) -> int:
    return max((choice.pieces for choice in division), default=0)


def _limit(division: Division) -> int:
    """The lowest limit that gives these pieces."""
    return max((choice.need for choice in division), default=0)
