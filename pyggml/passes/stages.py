"""Which devices of a sharded graph compute a node: those of a stage, or that of a pin."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from pyggml.backends.base import Backend
from pyggml.graph import Graph
from pyggml.node import Node
from pyggml.ops.leaf import constant_op, input_op, state_op
from pyggml.ops.views import bases
from pyggml.passes.order import soon, state_edges
from pyggml.passes.work import Work

#: How far from its ideal place, as a share of all bytes, a stage may end, so that less is sent.
SLACK = 0.04


@dataclass(frozen=True, slots=True)
class Shard:
    """How a graph is spread over devices.

    cuts     "heads", "rows", "experts", "sequence", "layers" -> how many devices or stages
    shares   of the devices of a stage; their proportion is that of the parts
    stages   shares of the stages of a pipeline
    devices  the devices, stage by stage
    strict   whether a cut that fits nothing is an error
    """

    cuts: Mapping[str, int]
    shares: tuple[float, ...]
    stages: tuple[float, ...]
    devices: tuple[Backend, ...]
    strict: bool = True

    def group(self, stage: int) -> tuple[int, ...]:
        """The numbers of the devices of a stage."""
        n = len(self.shares)
        return tuple(range(stage * n, (stage + 1) * n))

    def __str__(self) -> str:
        return ", ".join(f"{name} over {n}" for name, n in self.cuts.items())


@dataclass(slots=True)
class Stages:
    """The devices of every node.

    devices  those of the shard, then those of pins, by number
    groups   node -> numbers of devices
    """

    devices: list[Backend]
    groups: dict[Node, tuple[int, ...]] = field(default_factory=dict)


def stages_of(work: Work, shard: Shard) -> Stages:
    """The devices that compute each node; a leaf's are those of its first reader."""
    result = Stages(list(shard.devices))
    every = tuple(range(len(shard.devices)))
    fixed = _fixed(work, shard)
    stage_of = _pipeline(work.graph, shard, fixed)
    for node in work.graph.nodes:
        home = fixed.get(node)
        if home is not None:
            if home not in result.devices:
                result.devices.append(home)
            result.groups[node] = (result.devices.index(home),)
        elif node in stage_of:
            result.groups[node] = shard.group(stage_of[node])
        else:
            result.groups[node] = every
    return result


def _fixed(work: Work, shard: Shard) -> dict[Node, Backend]:
    """The nodes that stay on one device: pinned, or on a device outside of the shard."""
    first = shard.devices[0]
    fixed: dict[Node, Backend] = {}
    for node in work.graph.nodes:
        if node.op is state_op:
            home = work.homes.get(node)
            if home is not None and (home is not first or work.pinned(node) is not None):
                fixed[node] = home
        elif node.op.view is not None:
            if node.base in fixed:
                fixed[node] = fixed[node.base]
        elif not node.op.leaf:
            home = work.home(node)
            pins = [work.pinned(node), *(work.pinned(s.root) for s in node.src if s is not None)]
            if home is not first or home in pins:
                fixed[node] = home
    return fixed


def _pipeline(graph: Graph, shard: Shard, fixed: Mapping[Node, Backend]) -> dict[Node, int]:
    """The stage of each node that depends on a weight or a state; others are computed where they
    are read."""
    count = len(shard.stages)
    if count == 1:
        return {}
    heavy = _heavy(graph)
    nodes = soon(graph, state_edges(graph.nodes))
    order = [node for node in nodes if node in heavy and node.op.view is None]
    ends = _ends(graph, order, shard.stages)
    number = {node: i for i, node in enumerate(order)}
    stage: dict[Node, int] = {}
    for node in order:
        own = bisect_right(ends, number[node])
        sources = [stage[base] for base in bases(node) if base in stage]
        stage[node] = min(max([own, *sources]), count - 1)
    for node in graph.nodes:  # states are where they are written, and read
        if node.op.writes is not None and node.root.op is state_op:
            stage[node.root] = max(stage.get(node.root, 0), stage.get(node, 0))
    settled: dict[Node, int] = {}
    for node in graph.nodes:
        if node.op.leaf:
            if node.op is state_op:
                settled[node] = stage.get(node, 0)
            continue
        if node.op.view is not None:
            base = node.base
            if base in settled:
                settled[node] = settled[base]
            continue
        if node not in heavy:
            continue
        reads = [settled[base] for base in bases(node) if base in settled]
        settled[node] = max([stage.get(node, 0), *reads])
        if node.op.writes is not None and node.root in settled:
            settled[node] = settled[node.root]
    return {node: s for node, s in settled.items() if node not in fixed}


def _heavy(graph: Graph) -> set[Node]:
    """The nodes that depend on a state or on a weight with more than one row, and states."""
    heavy: set[Node] = set()
    for node in graph.nodes:
        weight = node.op is constant_op and node.spec.elements > node.ne[0]
        reads = not node.op.leaf and any(s in heavy for s in node.src)
        if weight or reads or node.op is state_op:
            heavy.add(node)
    return {node for node in heavy if node.op is not constant_op}


def _ends(graph: Graph, order: Sequence[Node], shares: Sequence[float]) -> list[int]:
    """The numbers in `order` at which the later stages begin."""
    seen: set[Node] = set()
    weights = []
    for node in order:
        leaves = {s.root for s in node.src if s is not None and s.root.op.leaf} - seen
        seen |= leaves
        weights.append(sum(x.spec.nbytes for x in leaves if x.op is not input_op))
    crossing = _crossing(graph, order)
    gaps = _between_states(graph, order, crossing)
    if len(gaps) >= len(shares) - 1:
        return at_gaps(gaps, weights, shares)
    sums = list(accumulate(weights))
    total = sums[-1] if sums else 0
    ends: list[int] = []
    for share in list(accumulate(shares))[:-1]:
        ideal = total * share / sum(shares)
        near = [i for i, done in enumerate(sums[:-1]) if abs(done - ideal) <= SLACK * total]
        if not near and sums:
            near = [min(range(len(sums)), key=lambda i: abs(sums[i] - ideal))]
        after = [i for i in near if not ends or i + 1 > ends[-1]]
        best = min(after or near, key=lambda i: (crossing[i], abs(sums[i] - ideal)), default=0)
        ends.append(best + 1)
    return ends


def _between_states(graph: Graph, order: Sequence[Node], crossing: Sequence[int]) -> list[int]:
    """The numbers in `order` between the uses of one state, or of states that are used together,
    and those of the next: where the fewest bytes cross.

    States that are only written do not count: other graphs of the store may read them. Those after
    all others are used together: the last layer of a graph without outputs.
    """
    written = {node.root for node in graph.nodes if node.op.writes is not None}
    read: set[Node] = set()
    at: dict[Node, list[int]] = {}
    for i, node in enumerate(order):
        for source in node.src:
            if source is not None and source.root in written and source.root.op is state_op:
                at.setdefault(source.root, []).append(i)
                if node.op.writes is None:
                    read.add(source.root)
    uses = [(min(numbers), max(numbers)) for state, numbers in at.items() if state in read]
    end = max((last for _, last in uses), default=-1)
    rest = [i for numbers in at.values() for i in numbers if i > end]
    if rest:
        uses.append((min(rest), max(rest)))
    gaps: list[int] = []
    end = -1
    for first, last in sorted(uses):
        if 0 <= end < first:
            gaps.append(1 + min(range(end, first), key=lambda i: (crossing[i], -i)))
        end = max(end, last)
    return gaps


def at_gaps(gaps: Sequence[int], weights: Sequence[int], shares: Sequence[float]) -> list[int]:
    """The gaps that divide the weights best.

    A graph may lack what follows the last states (batches without outputs do). All plans of a store
    must divide its states alike, so what follows the last gap counts as much as what precedes it.
    """
    starts = [0, *gaps[:-1]]
    bytes_before = [sum(weights[a:b]) for a, b in zip(starts, gaps)]
    sums = list(accumulate([*bytes_before, bytes_before[-1]]))
    ends: list[int] = []
    for number, share in enumerate(list(accumulate(shares))[:-1]):
        ideal = sums[-1] * share / sum(shares)
        able = range(number, len(gaps) - (len(shares) - 2 - number))
        left = [i for i in able if not ends or gaps[i] > ends[-1]]
        ends.append(gaps[min(left, key=lambda i: abs(sums[i] - ideal))])
    return ends


def _crossing(graph: Graph, order: Sequence[Node]) -> list[int]:
    """For each position in `order`, the bytes computed up to there that later nodes read. States do
    not count: they are where they are read."""
    number = {node: i for i, node in enumerate(order)}
    last = dict(number)
    for node in graph.nodes:
        if node in number:
            for base in bases(node):
                if base in last:
                    last[base] = max(last[base], number[node])
    change = [0] * (len(order) + 1)
    for node, i in number.items():
        if node.op.leaf:
            continue
        change[i] += node.spec.nbytes
        change[last[node]] -= node.spec.nbytes
    return list(accumulate(change))[: len(order)]
