"""The attention memory budget: cuts attentions that exceed it into loops of the fewest pieces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

from pyggml.backends.base import Backend
from pyggml.backends.step import Step
from pyggml.errors import BudgetError
from pyggml.graph import Graph, rebuilt, toposort
from pyggml.loop import loop_of
from pyggml.node import Node, label_of, line_of
from pyggml.passes.cut import Region, cut, standalone, structure
from pyggml.passes.order import state_edges
from pyggml.passes.regions import regions, score_tensors
from pyggml.passes.work import Work
from pyggml.traits import Axis

Finish = Callable[[Work], Work]
Cuts = tuple[tuple[Axis, int], ...]

#: Pieces of one attention above which a budget is likely a mistake: each piece is a few launches.
MANY = 4096

#: A product of fewer keys takes other paths through BLAS, whose rounding would show, and thousands
#: of blocks are slow.
FINEST_KEYS = 32

_MIB = 2**20


def within_budget(work: Work, finish: Finish) -> Work:
    """Replace every attention that needs more than the budget by a loop over its pieces.

    Attentions with an output or an observed tensor inside are left whole, with a warning.
    BudgetError with the least budget where no pieces fit.
    """
    amb = work.amb
    if amb is None:
        return replace(work, scores=frozenset(score_tensors(work.graph)))
    work, found = _bounded(work)
    search = _Search(work, found, _Chooser(finish))
    trial = search.fit(amb)
    if trial is None:
        raise _too_small(search, amb)
    split = trial.work
    if trial.most > MANY:
        split = replace(split, warnings=(*split.warnings, _many(search, trial, amb)))
    return replace(split, scores=split.scores | split.exempt)


def _bounded(work: Work) -> tuple[Work, dict[Node, Region]]:
    """The attentions that may be cut, by their results; the work with what it says of others."""
    roots = {root.root: root for root in work.graph.roots}
    edges = state_edges(work.graph.nodes)
    stale: dict[Node, list[Node]] = {}
    for write, readers in edges.items():
        for reader in readers:
            stale.setdefault(reader, []).append(write)
    bounded: dict[Node, Region] = {}
    exempt: set[Node] = set()
    warnings = list(work.warnings)
    for region in regions(work.graph):
        label = label_of(region.out)
        outputs = [roots[n] for n in region.counted if n in roots]
        places = {work.home(node).place for node in region.inside}
        if not outputs and len(places) == 1:
            bounded[region.out] = _in_time(region, stale, edges)
            continue
        exempt |= region.counted
        if outputs:
            warnings.append(
                f"{label_of(outputs[0])} is an output: the attention of {label} "
                "stays whole, outside the budget"
            )
        else:
            warnings.append(
                f"the attention of {label} runs on {', '.join(sorted(places))}: it "
                "stays whole, outside the budget; pin it to one place"
            )
    return replace(work, exempt=frozenset(exempt), warnings=tuple(warnings)), bounded


def _in_time(
    region: Region, stale: Mapping[Node, list[Node]], edges: dict[Node, tuple[Node, ...]]
) -> Region:
    """The region without nodes that must run before a write that the region's result needs.

    A loop reads its sources when the result is made. Adds the edges that a loop brings to `edges`.

    stale  nodes that read states which are written later, and those writes
    """
    reads = {node: stale[node] for node in region.inside if node in stale}
    if not reads:
        return region
    before = set(toposort([region.out], edges))
    early = frozenset(node for node, writes in reads.items() if before.intersection(writes))
    for write in {write for node in reads.keys() - early for write in stale[node]}:
        edges[write] = (*edges.get(write, ()), region.out)
    return replace(region, early=early)


# -- one attention ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Choice:
    """How one attention is cut, into how many pieces, and the counted bytes it needs alone.

    cuts  None leaves it as it is (0 pieces), () is a loop of one piece
    """

    need: int
    cuts: Cuts | None
    pieces: int


@dataclass(slots=True)
class _Chooser:
    """Finds for an attention the fewest pieces that fit; equal ones are measured once."""

    finish: Finish
    known: dict[object, int | None] = field(default_factory=dict)

    def choose(self, region: Region, home: Backend, limit: int) -> _Choice:
        """The fewest pieces that fit `limit`; where none fit, those that need least."""
        measure = _Measure(self, region, home)
        whole = measure.choice(None)
        assert whole is not None
        if whole.need <= limit:
            return whole
        best, least = None, whole
        for steps in measure.ways():
            if best is not None:  # only fewer pieces are better
                steps = [cuts for cuts in steps if region.pieces(cuts) < best.pieces]
            finest = measure.choice(steps[-1]) if steps else None
            if finest is not None and finest.need < least.need:
                least = finest
            if finest is not None and finest.need <= limit:
                best = measure.first(steps, limit)
        return best or least


class _Measure:
    """What one attention needs, cut in any way."""

    def __init__(self, chooser: _Chooser, region: Region, home: Backend) -> None:
        self.chooser, self.region, self.home = chooser, region, home
        self.key = structure(region), home.place

    @cached_property
    def alone(self) -> Region:
        return standalone(self.region)

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
        return ways

    def choice(self, cuts: Cuts | None) -> _Choice | None:
        """These pieces measured; None where they are illegal."""
        key = self.key, cuts
        if key not in self.chooser.known:
            self.chooser.known[key] = self._need(cuts)
        need = self.chooser.known[key]
        pieces = 0 if cuts is None else self.region.pieces(cuts)
        return None if need is None else _Choice(need, cuts, pieces)

    def first(self, steps: list[Cuts], limit: int) -> _Choice | None:
        """The first of `steps` that fits `limit`, where all after it do too."""
        best = None
        low, high = 0, len(steps)
        while low < high:
            at = middle = (low + high) // 2
            choice = self.choice(steps[at])
            while choice is None and at + 1 < high:  # not every step keeps groups of heads together
                at += 1
                choice = self.choice(steps[at])
            if choice is None or choice.need <= limit:
                best, high = choice or best, middle
            else:
                low = at + 1
        return best

    def _need(self, cuts: Cuts | None) -> int | None:
        """Most counted bytes alive at once when the attention runs alone, cut so."""
        out, scores = self.alone.out, self.alone.counted
        if cuts is not None:
            loop = cut(self.alone, cuts)
            if loop is None or not _runs(loop.node, self.home):
                return None
            out, scores = loop.node, loop.counted
        work = Work(Graph({"out": out}), (self.home,), scores=frozenset(scores))
        return self.chooser.finish(work).placed.score_peak


def _steps(total: int, finest: int) -> list[int]:
    """The smallest pieces of each number, from two pieces on: they are the most even ones."""
    steps = [total]
    while steps[-1] > finest:
        count = -(-total // (steps[-1] - 1))
        steps.append(max(finest, -(-total // count)))
    return steps[1:]


def _runs(node: Node, home: Backend) -> bool:
    """Whether the device has every op of a loop, and of what makes its result the region's."""
    nodes = [n for n in toposort([node]) if not n.op.leaf and n.op.view is None]
    loops = [loop for loop in map(loop_of, nodes) if loop is not None]
    nodes += [n for loop in loops for body in loop.bodies() for n in toposort([body.out])]
    plain = (n for n in nodes if not n.op.leaf and n.op.view is None and loop_of(n) is None)
    return all(home.supports(n) is None for n in plain)


# -- all of them ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Trial:
    """The graph cut in one way. Its peak counts everything that is alive together.

    choices  of every attention that may be cut, in graph order
    """

    work: Work
    choices: tuple[_Choice, ...]
    peak: int

    @property
    def pieces(self) -> int:
        return sum(choice.pieces for choice in self.choices)

    @property
    def most(self) -> int:
        """Pieces of the attention that has most."""
        return max((choice.pieces for choice in self.choices), default=0)


class _Search:
    """Finds for a graph the fewest pieces that fit.

    Each attention is cut so that it fits a limit alone. Those that are alive together need more
    than each: then the limit is lowered, or what fits whole becomes a loop of one piece, whose
    tensors no other attention meets.
    """

    def __init__(self, work: Work, found: Mapping[Node, Region], chooser: _Chooser) -> None:
        self.work, self.found, self.chooser = work, found, chooser
        self.trials: dict[object, _Trial] = {}

    @cached_property
    def largest(self) -> int:
        """What the largest attention needs whole."""
        choices = self.trial(2**63, alone=False).choices
        return max((choice.need for choice in choices), default=0)

    def fit(self, amb: int) -> _Trial | None:
        """The fewest pieces within `amb`, None where none are."""
        trial = self.trial(amb, alone=False)
        if trial.peak <= amb:
            return trial
        best = None
        for alone in (False, True):
            low, _ = self._border(lambda t: t.peak <= amb, alone)
            if low >= 0 and (best is None or self.trial(low, alone).pieces < best.pieces):
                best = self.trial(low, alone)
        return best

    def least(self) -> int:
        """The smallest budget for which `fit` finds pieces."""
        least = min(trial.peak for trial in self.trials.values())
        while (smaller := self.fit(least - 1)) is not None:
            least = smaller.peak
        return least

    def least_with(self, most: int) -> int:
        """The smallest budget that cuts no attention into more than `most` pieces."""
        peaks = []
        for alone in (False, True):
            _, high = self._border(lambda t: t.most > most, alone)
            peaks.append(self.trial(high, alone).peak)
        return min(peaks)

    def _border(self, holds: Callable[[_Trial], bool], alone: bool) -> tuple[int, int]:
        """The highest limit (or -1) whose trial `holds`, and the lowest whose trial does not."""
        low, high = -1, self.largest + 1
        while high - low > 1:
            middle = (low + high) // 2
            trial = self.trial(middle, alone)
            if holds(trial):
                low = middle
            else:  # down to what it needs, a limit gives the same pieces
                needs = [c.need for c in trial.choices if c.need <= middle]
                high = max((low + 1, *needs))
        return low, high

    def trial(self, limit: int, alone: bool) -> _Trial:
        """Every attention cut so that it fits `limit`; `alone`: those left whole as loops too."""
        key = min(limit, 2**63), alone
        if key not in self.trials:
            work, choices = self._split(limit, alone)
            cuts = tuple(choice.cuts for choice in choices)
            if cuts not in self.trials:
                peak = self.chooser.finish(work).placed.score_peak
                self.trials[cuts] = _Trial(work, choices, peak)
            self.trials[key] = self.trials[cuts]
        return self.trials[key]

    def _split(self, limit: int, alone: bool) -> tuple[Work, tuple[_Choice, ...]]:
        work, new = self.work, dict[Node, Node]()
        counted: set[Node] = set()
        homes: dict[Node, Backend] = {}
        choices: list[_Choice] = []

        def rebuild(node: Node, src: tuple[Node | None, ...]) -> Node:
            made = new[node] = rebuilt(node, src)
            home = homes[made] = work.home(node)
            if node in self.found:
                region = self.found[node].mapped(new)
                choice = self.chooser.choose(region, home, limit)
                if choice.cuts is None and alone:
                    choice = replace(choice, cuts=(), pieces=1)
                choices.append(choice)
                counted.update(region.counted)
                if choice.cuts is not None:
                    loop = cut(region, choice.cuts)
                    assert loop is not None
                    counted.update(loop.counted)
                    made = new[node] = loop.node
                    _settle(made, home, homes)
            return made

        graph = work.graph.rewrite(rebuild)
        exempt = frozenset(new[node] for node in work.exempt)
        scores = frozenset(counted)
        work = replace(work, graph=graph, scores=scores, exempt=exempt, homes=homes)
        return work, tuple(choices)


def _settle(node: Node, home: Backend, homes: dict[Node, Backend]) -> None:
    """A loop, and what makes its result the region's, are where the region was."""
    stack = [node]
    while stack:
        part = stack.pop()
        if part not in homes and not part.op.leaf:
            homes[part] = home
            stack += [s for s in part.src if s is not None]


# -- what is said -----------------------------------------------------------------------------


def _many(search: _Search, trial: _Trial, amb: int) -> str:
    region = next(r for r, c in zip(search.found.values(), trial.choices) if c.pieces == trial.most)
    return (
        f"amb={amb / _MIB:g} MiB cuts the attention of {label_of(region.out)} (at "
        f"{line_of(region.out)}) into {trial.most:,} pieces; the least budget with at most "
        f"{MANY:,} is amb={search.least_with(MANY) / _MIB!r}"
    )


def _too_small(search: _Search, amb: int) -> BudgetError:
    least = search.least()
    needs = [search.chooser.choose(r, search.work.home(r.out), 0) for r in search.found.values()]
    alone = [r.out for r, choice in zip(search.found.values(), needs) if choice.need > amb]
    what = f"{alone[0]!r} (at {line_of(alone[0])})" if alone else "what is alive together"
    trial = next(t for t in search.trials.values() if t.peak == least)
    step = max(_counted_steps(search.chooser.finish(trial.work)), key=lambda step: step.scratch)
    scratch = ""
    if step.scratch:
        scratch = (
            f", {step.scratch / _MIB:g} MiB of it scratch of {step.node.op.name}, "
            "which pieces of any size need"
        )
    mib = least / _MIB
    return BudgetError(
        f"amb={amb / _MIB:g} MiB is too small for {what}: the smallest pieces need {mib!r} MiB "
        f"({least} bytes){scratch}; give amb={mib!r} or more",
        mib,
    )


def _counted_steps(work: Work) -> list[Step]:
    """The steps that read or make what is counted, those of loops' bodies too."""
    bodies = (body.steps for step in work.steps for body in step.bodies)
    steps = chain((step for step in work.steps if not step.bodies), *bodies)
    return [s for s in steps if any(n in work.scores for n in (*s.nodes, *s.reads))]
