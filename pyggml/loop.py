"""The loop node: a computation cut into pieces that run one after another.

All pieces are one node. It holds a body (a small graph that computes one piece), how the sources
are cut, and where the results go. If the first piece differs, because it is shorter or starts a
sum, it has its own body; there are never more than two. A body is lowered and placed once, and its
arena is the scratch of the loop's step.
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
    """A dimension of `total` elements, cut into a piece of `first`, then pieces of `step`."""

    total: int
    step: int
    first: int

    @property
    def count(self) -> int:
        """The number of pieces."""
        return 1 + (self.total - self.first) // self.step

    def start(self, index: int) -> int:
        """The first element of piece `index`."""
        return 0 if index == 0 else self.first + (index - 1) * self.step


@dataclass(frozen=True, slots=True)
class Chain:
    """Where a piece starts along `axis` of a tensor.

    dim   the index of the loop's dimension that the start follows
    maps  cuts to apply to the start along that dimension, one after another
    """

    dim: int
    axis: int
    maps: tuple[Cut, ...]

    def then(self, cut: Cut) -> Chain:
        """Where the piece starts in a source of this tensor, whose part `cut` describes.

        Cuts that change nothing are left out, because deep graphs would have long chains.
        """
        mapping = replace(cut, axis=0)  # the axis does not change the arithmetic
        maps = (*self.maps, mapping)
        if mapping == Cut(0):
            maps = self.maps
        elif maps[-2:] == (Cut(0, mul=mapping.div), mapping):  # (i * n) // n
            maps = self.maps[:-1]
        return Chain(self.dim, cut.axis, maps)

    def at(self, start: int) -> int:
        """The start in the tensor, from the start along the loop's dimension."""
        for cut in self.maps:
            start = start * cut.mul // cut.div
            start = (start % cut.mod if cut.mod else start) + cut.add
        return start


@dataclass(frozen=True, slots=True)
class Take:
    """A leaf of a body, `piece`, whose data is a part of the loop's source number `source`.

    chains  where the part starts, along each axis that is cut
    """

    piece: Node
    source: int
    chains: tuple[Chain, ...]


@dataclass(frozen=True, slots=True)
class Shift:
    """An attribute in a body that grows by `per` for each element that the piece starts later."""

    node: Node
    attr: str
    per: int
    chain: Chain


@dataclass(frozen=True, slots=True)
class Body:
    """The computation of one piece.

    out     its result, a part of the loop's result
    takes   the leaves whose data are parts of the loop's sources
    shifts  the attributes that depend on where the piece starts
    carry   if pieces are merged: the leaf that holds this part of the loop's result so far
    """

    out: Node
    takes: tuple[Take, ...]
    shifts: tuple[Shift, ...]
    carry: Node | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Loop:
    """The work of a loop node: run a body for each combination of pieces.

    dims   the dimensions that are cut; the last one varies fastest
    fill   for each of `dims`, the axis of the result that it fills, or the reduction that it merges
    first  the body of the first piece along the last dimension
    rest   the body of all other pieces; None if it is the same or there are no others
    """

    dims: tuple[Dim, ...]
    fill: tuple[Axis, ...]
    first: Body
    rest: Body | None

    def pieces(self) -> Iterator[tuple[Body, tuple[int, ...]]]:
        """For each piece, its body and its start along every dimension."""
        for index in product(*(range(dim.count) for dim in self.dims)):
            body = self.first if self.rest is None or not any(index[-1:]) else self.rest
            yield body, tuple(dim.start(i) for dim, i in zip(self.dims, index))

    def bodies(self) -> tuple[Body, ...]:
        """The different bodies: one or two."""
        return (self.first,) if self.rest is None else (self.first, self.rest)

    def __str__(self) -> str:
        cuts = (
            f"{axis if isinstance(axis, str) else f'ne{axis}'}:{dim.count}x{dim.step}"
            for dim, axis in zip(self.dims, self.fill)
        )
        return f"<{' '.join(cuts)}>"


def _rule(*, loop: Loop, spec: Spec) -> Spec:
    return spec


loop_op = Op(_rule, name="loop")


@loop_op.cost
def _(node: Node) -> Cost:
    """The work of all pieces; sources and result are read and written once."""
    loop: Loop = node.attrs["loop"]
    pieces = prod(dim.count for dim in loop.dims)
    firsts = pieces if loop.rest is None else pieces // loop.dims[-1].count
    counts = (firsts, pieces - firsts)
    bodies = ((n, toposort([body.out])) for n, body in zip(counts, loop.bodies()))
    flops = sum(n * cost_of(inner).flops for n, nodes in bodies for inner in nodes)
    nbytes = sum(s.spec.nbytes for s in node.src if s is not None) + node.spec.nbytes
    return Cost(flops, float(nbytes))


def make_loop(sources: tuple[Node, ...], loop: Loop, spec: Spec) -> Node:
    """The node that runs `loop` over `sources`; its result has `spec`."""
    return loop_op.make(sources, {"loop": loop}, spec, line=False)


def loop_of(node: Node) -> Loop | None:
    """The loop of a loop node; None for any other node."""
    return node.attrs["loop"] if node.op is loop_op else None
