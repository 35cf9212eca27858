"""The attention memory budget: finds what it counts, and cuts what exceeds it into loops.

It knows no model. Two kinds of computation are counted: scores (a product that reaches a softmax
whose result goes into a product), and keys and values that are computed from a state before an
attention reads them. How to cut comes from the slice rules of the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from pyggml.backends.base import Backend
from pyggml.errors import BudgetError
from pyggml.graph import Graph, rebuilt, toposort
from pyggml.loop import loop_of
from pyggml.node import Axis, Node, label_of, line_of, slice_of
from pyggml.ops.attention import flash_attn_ext
from pyggml.ops.copy import cast, cont
from pyggml.ops.elementwise import add, scale, tanh
from pyggml.ops.leaf import state_op
from pyggml.ops.linear import mul_mat
from pyggml.ops.reduce import soft_max_ext
from pyggml.ops.views import root_of
from pyggml.passes.cutting import Region, cut, standalone, structure
from pyggml.passes.work import Work

Finish = Callable[[Work], Work]


#: Flash attention over expanded keys: groups of heads, streams, blocks of keys, then all at once.
_FLASH_WAYS: tuple[tuple[Axis, ...], ...] = ((1,), (1, 3), ("kv",), (1, 3, "kv"))


def _finest(axis: Axis) -> int:
    """The smallest pieces along an axis: of keys 32, since a product of fewer takes other paths
    through BLAS, whose rounding would show, and thousands of blocks are slow."""
    return 32 if axis == "kv" else 1


# -- what is counted --------------------------------------------------------------------------


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


# -- how it is cut ----------------------------------------------------------------------------


Cuts = tuple[tuple[Axis, int], ...]


@dataclass(slots=True)
class _Chooser:
    """Finds for a region the fewest pieces that fit; remembers equal regions."""

    finish: Finish
    known: dict[object, tuple[int, Cuts]]

    def need(self, region: Region, home: Backend, cuts: Cuts | None) -> int | None:
        """Most counted bytes alive at once when cut so (None: not at all); None where illegal."""
        if cuts is None:
            out, scores = region.out, region.counted
        else:
            made = cut(region, cuts)
            if made is None or not _runs(made.node, home):
                return None
            out, scores = made.node, made.counted
        work = Work(Graph({"out": out}), (home,), scores=frozenset(scores))
        return self.finish(work).placed.score_peak

    def choose(self, region: Region, home: Backend, amb: int) -> tuple[int, Cuts]:
        """What it needs, and how it is cut: not at all or into the fewest pieces that fit.

        Where none fit, as it needs least.
        """
        key = structure(region), home.place, amb
        if key not in self.known:
            self.known[key] = self._search(standalone(region), home, amb)
        return self.known[key]

    def _search(self, region: Region, home: Backend, amb: int) -> tuple[int, Cuts]:
        whole = self.need(region, home, None)
        assert whole is not None
        best: tuple[int, Cuts] = whole, ()
        for way in region.ways:
            if best[0] <= amb:
                break
            axes = [axis for axis in way if region.extent(axis) > 1]
            finest = tuple((axis, min(_finest(axis), region.extent(axis))) for axis in axes)
            size = self.need(region, home, finest) if finest else None
            if size is not None and size <= amb:
                best = self._coarsest(region, home, finest, amb)
            elif size is not None and size < best[0]:
                best = size, finest
        return best

    def _coarsest(self, region: Region, home: Backend, finest: Cuts, amb: int) -> tuple[int, Cuts]:
        """The largest step along the last axis that fits, evened out over its number of pieces."""
        *outer, (axis, step) = finest
        total = region.extent(axis)

        def at(step: int) -> tuple[int, Cuts] | None:
            cuts = (*outer, (axis, step))
            size = self.need(region, home, cuts)
            return None if size is None else (size, cuts)

        best = at(step)
        low, high = step, total  # low fits (as best), high does not
        while high - low > 1:
            step = middle = (low + high) // 2
            found = at(step)
            while found is None:  # not every step keeps groups of heads together
                step -= 1
                found = at(step)
            if found[0] <= amb:
                best, low = found, middle
            else:
                high = middle
        assert best is not None
        step = best[1][-1][1]
        even = at(max(-(-total // -(-total // step)), _finest(axis)))
        return even if even is not None and even[0] <= amb else best


def _runs(node: Node, home: Backend) -> bool:
    """Whether the device has every op of a loop, and of what makes its result the region's."""
    nodes = [n for n in toposort([node]) if not n.op.leaf and n.op.view is None]
    loops = [loop for loop in map(loop_of, nodes) if loop is not None]
    nodes += [n for loop in loops for body in loop.bodies() for n in toposort([body.out])]
    plain = (n for n in nodes if not n.op.leaf and n.op.view is None and loop_of(n) is None)
    return all(home.supports(n) is None for n in plain)


def apply_budget(work: Work, finish: Finish) -> Work:
    """Replace every region that needs more than the budget by a loop over its pieces.

    Regions that are outputs or observed inside are left whole, with a warning. BudgetError with the
    least budget where even the finest pieces do not fit.
    """
    amb = work.amb
    assert amb is not None
    chooser = _Chooser(finish, {})
    found, exempt, warnings = _bounded(work)
    work = replace(work, warnings=warnings, exempt=exempt)
    split, peak = _fitted(work, chooser, found, amb)
    if peak > amb:
        # Only the smallest pieces leave room for what must stay beside a loop.
        split, peak = _fitted(work, chooser, found, 0)
    if peak > amb:
        homes = {out: work.home(out) for out in found}
        alone = [out for out, r in found.items() if chooser.choose(r, homes[out], 0)[0] > amb]
        where = f"{alone[0]!r} (at {line_of(alone[0])})" if alone else "what is alive together"
        raise _too_small(amb, peak, where)
    return replace(split, scores=split.scores | split.exempt)


def _bounded(work: Work) -> tuple[dict[Node, Region], frozenset[Node], tuple[str, ...]]:
    """The regions that may be cut, by their results; the tensors of others, and what to say."""
    roots = {root_of(root): root for root in work.graph.roots}
    found: dict[Node, Region] = {}
    exempt: set[Node] = set()
    warnings = []
    for region in regions(work.graph):
        seen = [roots[n] for n in region.counted if n in roots]
        if seen:
            warnings.append(
                f"{label_of(seen[0])} is an output: the attention of {label_of(region.out)} "
                "stays whole, outside the budget"
            )
            exempt |= region.counted
            continue
        places = {work.home(node).place for node in region.inside}
        if len(places) > 1:
            warnings.append(
                f"the attention of {label_of(region.out)} runs on {', '.join(sorted(places))}: it "
                "stays whole, outside the budget; pin it to one place"
            )
            exempt |= region.counted
        else:
            found[region.out] = region
    return found, frozenset(exempt), tuple(warnings)


def _fitted(
    work: Work, chooser: _Chooser, found: Mapping[Node, Region], amb: int
) -> tuple[Work, int]:
    """The graph with its regions cut so that each fits, and what they need together."""
    split = _split(work, chooser, found, amb, atomic=False)
    peak = chooser.finish(split).placed.score_peak
    if peak > amb:
        # Regions that fit one by one may be alive together: a loop of one piece keeps them apart.
        apart = _split(work, chooser, found, amb, atomic=True)
        less = chooser.finish(apart).placed.score_peak
        if less < peak:
            return apart, less
    return split, peak


def _split(
    work: Work, chooser: _Chooser, found: Mapping[Node, Region], amb: int, atomic: bool
) -> Work:
    new: dict[Node, Node] = {}
    counted: set[Node] = set()
    homes: dict[Node, Backend] = {}

    def rebuild(node: Node, src: tuple[Node | None, ...]) -> Node:
        made = new[node] = rebuilt(node, src)
        home = homes[made] = work.home(node)
        if node in found:
            region = found[node].mapped(new)
            _, cuts = chooser.choose(region, home, amb)
            if not cuts and not atomic:
                counted.update(region.counted)
            else:
                done = cut(region, cuts)
                assert done is not None
                counted.update(done.counted)
                made = new[node] = done.node
                _settle(made, home, homes)
        return made

    graph = work.graph.rewrite(rebuild)
    exempt = frozenset(new[node] for node in work.exempt)
    return replace(work, graph=graph, scores=frozenset(counted), exempt=exempt, homes=homes)


def _settle(node: Node, home: Backend, homes: dict[Node, Backend]) -> None:
    """A loop, and what makes its result the region's, are where the region was."""
    stack = [node]
    while stack:
        part = stack.pop()
        if part not in homes and not part.op.leaf:
            homes[part] = home
            stack += [s for s in part.src if s is not None]


def _too_small(amb: int, least: int, what: str) -> BudgetError:
    mib = least / 2**20
    return BudgetError(
        f"amb={amb / 2**20:g} MiB is too small for {what}: the smallest pieces need {mib!r} MiB "
        f"({least} bytes); give amb={mib!r} or more",
        mib,
    )
