"""The loop node: pieces of one computation, written once and run in turn.

The pieces of a computation are one node: a body graph, how its sources are cut, and where results
go. A first piece that differs (shorter, or the start of a sum) has a body of its own; there are
never more than two. A body is lowered and placed once, and its arena is the scratch of the loop's
step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from pyggml.graph import toposort
from pyggml.node import Node
from pyggml.operation import Op, cost_of
from pyggml.spec import Spec
from pyggml.traits import Axis, Cost, Cut


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension that is cut: a first piece of `first` elements, then pieces of `step`."""

    total: int
    step: int
    first: int

    @property
    def count(self) -> int:
        return 1 + (self.total - self.first) // self.step

    def start(self, index: int) -> int:
        """Where piece `index` begins."""
        return 0 if index == 0 else self.first + (index - 1) * self.step


@dataclass(frozen=True, slots=True)
class Chain:
    """How far along `axis` of an outer tensor a piece starts: cuts applied one after another.

    dim   which of the loop's dimensions it follows
    """

    dim: int
    axis: int
    maps: tuple[Cut, ...]

    def then(self, cut: Cut) -> Chain:
        """One more cut. Cuts that change nothing are left out: deep graphs have long chains."""
        step = replace(cut, axis=0)  # what it does to a start, whatever the axis
        maps = (*self.maps, step)
        if step == Cut(0):
            maps = self.maps
        elif maps[-2:] == (Cut(0, mul=step.div), step):  # (i * n) // n
            maps = self.maps[:-1]
        return Chain(self.dim, cut.axis, maps)

    def at(self, start: int) -> int:
        for cut in self.maps:
            start = start * cut.mul // cut.div
            start = (start % cut.mod if cut.mod else start) + cut.add
        return start


@dataclass(frozen=True, slots=True)
class Take:
    """A leaf of a body that stands for a part of the loop's source number `source`."""

    piece: Node
    source: int
    chains: tuple[Chain, ...]


@dataclass(frozen=True, slots=True)
class Shift:
    """An attribute of a body's node that grows by `per` for each element of the piece's start."""

    node: Node
    attr: str
    per: int
    chain: Chain


@dataclass(frozen=True, slots=True)
class Body:
    """One piece's computation.

    out    its result; stands in the loop's result at the piece's place
    takes  the leaves that are parts of the loop's sources
    carry  a leaf that is the loop's result so far at that place, where pieces are merged
    """

    out: Node
    takes: tuple[Take, ...]
    shifts: tuple[Shift, ...]
    carry: Node | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Loop:
    """What a loop node does: for every combination of pieces, run a body.

    dims   the dimensions cut; the last turns fastest
    fill   for each of dims the axis of the result it walks along, or the reduction it merges
    first  the body of the first piece of the last dimension
    rest   the body of all others, None where it is the same or there are none
    """

    dims: tuple[Dim, ...]
    fill: tuple[Axis, ...]
    first: Body
    rest: Body | None

    def pieces(self) -> Iterator[tuple[Body, tuple[int, ...]]]:
        """Each piece: its body and its start along every dimension."""
        for index in product(*(range(dim.count) for dim in self.dims)):
            body = self.first if self.rest is None or not any(index[-1:]) else self.rest
            yield body, tuple(dim.start(i) for dim, i in zip(self.dims, index))

    def bodies(self) -> tuple[Body, ...]:
        return (self.first,) if self.rest is None else (self.first, self.rest)

    def __str__(self) -> str:
        cuts = (
            f"{axis if isinstance(axis, str) else f'ne{axis}'}:{dim.count}x{dim.step}"
            for dim, axis in zip(self.dims, self.fill)
        )
        return f"<{' '.join(cuts)}>"


def _rule(*, loop: Loop, made: Spec) -> Spec:
    return made


loop_op = Op(_rule, name="loop")


@loop_op.cost
def _(node: Node) -> Cost:
    """What the pieces compute; sources and result are read and written once."""
    loop: Loop = node.attrs["loop"]
    runs = prod(dim.count for dim in loop.dims)
    first = runs if loop.rest is None else runs // loop.dims[-1].count
    counts = (first, runs - first)
    bodies = ((n, toposort([body.out])) for n, body in zip(counts, loop.bodies()))
    flops = sum(n * cost_of(inner).flops for n, nodes in bodies for inner in nodes)
    moved = sum(s.spec.nbytes for s in node.src if s is not None) + node.spec.nbytes
    return Cost(flops, float(moved))


def make_loop(sources: tuple[Node, ...], loop: Loop, made: Spec) -> Node:
    """The node that runs `loop` over `sources`."""
    return loop_op.make(sources, {"loop": loop}, made, line=False)


def loop_of(node: Node) -> Loop | None:
    """The loop of a loop node, None for every other node."""
    return node.attrs["loop"] if node.op is loop_op else None
