"""Cuts a part of a graph into a loop over pieces, by the slice rules of its ops."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, TypeAlias, TypeVar

from pyggml.errors import ShapeError
from pyggml.graph import rebuilt, toposort
from pyggml.interning import inherit
from pyggml.loop import Body, Chain, Dim, Loop, Shift, Take, loop_op, make_loop
from pyggml.node import Node
from pyggml.operation import slice_of
from pyggml.ops.attention import flash_attn_ext
from pyggml.ops.leaf import piece_op
from pyggml.ops.merge import lse_finish, lse_sum
from pyggml.spec import Spec
from pyggml.traits import Axis, Slice

Cuts = Sequence[tuple[Axis, int]]
T = TypeVar("T")
Steps: TypeAlias = Generator[Any, Any, T]


@dataclass(frozen=True)
class Region:
    """A result, and the tensors on the way to it whose memory is to be bounded.

    out      the node whose pieces the loop makes
    counted  tensors between the region's sources and `out` (never `out` itself)
    ways     how `out` may be cut, preferred first: axes, all but the last one into single
             elements; a reduction by its name
    early    nodes that cannot wait until `out` is made: they read a state that is written before
    """

    out: Node
    counted: frozenset[Node]
    ways: tuple[tuple[Axis, ...], ...]
    early: frozenset[Node] = frozenset()

    @cached_property
    def inside(self) -> tuple[Node, ...]:
        """Nodes that a body computes: `out`, the counted ones and the views between, in order."""
        inside: dict[Node, None] = {}
        for node in toposort([self.out], stop=self._ends):
            if self._ends(node):
                continue
            if node.op.view is None or any(s in inside for s in node.src):
                inside[node] = None
        return tuple(inside)

    def _ends(self, node: Node) -> bool:
        """Whether the loop takes the node from outside. Loops do not stand in loops."""
        if node is self.out:
            return False
        taken = node in self.early or node.op is loop_op
        return taken or (node not in self.counted and node.op.view is None)

    def pieces(self, cuts: Cuts) -> int:
        """How many pieces `cuts` gives."""
        return prod(-(-self.extent(axis) // step) for axis, step in cuts)

    def extent(self, axis: Axis) -> int:
        """Elements of `out` along `axis`; for a reduction the length of what it reduces."""
        if isinstance(axis, int):
            return self.out.ne[axis]
        whole = slice_of(_mergeable(self.out), axis, 1)
        assert whole is not None
        return next(
            s.ne[c.axis]
            for s, c in zip(self.out.src, whole.cuts)
            if c is not None and s is not None
        )

    def mapped(self, new: Mapping[Node, Node]) -> Region:
        """The region over rewritten nodes."""
        counted, early = (
            frozenset(new[node] for node in nodes if node in new)
            for nodes in (self.counted, self.early)
        )
        return Region(new[self.out], counted, self.ways, early)


@dataclass(frozen=True, slots=True)
class Made:
    """A loop in place of a region's result, and the tensors in it that the budget counts."""

    node: Node
    counted: frozenset[Node]


def structure(region: Region) -> object:
    """A key that is equal for regions of the same shape, types, attributes and wiring."""
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


def standalone(region: Region) -> Region:
    """The same region over leaves, so that it can be planned alone."""
    new: dict[Node, Node] = {}
    for node in region.inside:
        for source in node.src:
            if source is not None and source not in new:
                new[source] = _piece(source, source.ne)
        new[node] = rebuilt(node, tuple(None if s is None else new[s] for s in node.src))
    return region.mapped(new)


def _piece(source: Node, ne: tuple[int, ...]) -> Node:
    """A leaf for a part of `source`, with its strides."""
    node = piece_op.make(
        (), {"name": None}, Spec.of(source.dtype, ne, source.spec.rank), line=False
    )
    object.__setattr__(node, "nb", source.nb)
    return inherit(node, source)


def _mergeable(out: Node) -> Node:
    """`out` in the form whose partial results can be merged: flash attention with its lse."""
    if out.op is flash_attn_ext and not out.attrs["lse"]:
        return inherit(flash_attn_ext.again(out, lse=True), out)
    return out


# -- bodies -----------------------------------------------------------------------------------


def _unwound(call: Steps[T]) -> T:
    """The result of a recursive generator, in which `yield f(x)` is a call: regions are deep."""
    calls: list[Steps[Any]] = [call]
    result: Any = None
    while calls:
        try:
            calls.append(calls[-1].send(result))
            result = None
        except StopIteration as end:
            calls.pop()
            result = end.value
    made: T = result
    return made


class _Uncuttable(Exception):
    """A later dimension meets a tensor that it cannot cut."""


@dataclass(slots=True)
class _Piece:
    """A body under construction: its result, leaves and shifts, and what in it is counted.

    Leaves that are parts of counted tensors are counted too: they take no bytes of the body, but
    the scratch of kernels that read them belongs to the budget.
    """

    out: Node
    takes: dict[Node, Take]
    shifts: tuple[Shift, ...]
    counted: set[Node]


class _Cutter:
    """Cuts a body along one more dimension of the loop.

    Nodes that cannot be cut, or are needed whole, are not taken into the body of the first
    dimension: they are computed once, before the loop. Later dimensions keep them in the body.
    """

    def __init__(
        self, body: _Piece, inside: set[Node], dim: int, sources: dict[Node, int], first: bool
    ) -> None:
        self.body, self.inside, self.dim, self.first = body, inside, dim, first
        self.sources = sources
        self.memo: dict[tuple[Node, Chain | None, int], Node] = {}
        self.new_of: dict[Node, list[Node]] = {}
        self.takes: dict[Node, Take] = {}
        self.shifts: list[Shift] = []
        self.pieces: set[Node] = set()  # leaves for parts of what is counted

    def run(self, axis: Axis, n: int) -> _Piece | None:
        """The body for pieces of `n` along `axis` of its result, or None where that is illegal."""
        out = self.body.out
        rule = slice_of(out, axis, n)
        if rule is None:
            return None
        start = Chain(self.dim, axis if isinstance(axis, int) else -1, ())
        made = _unwound(self._apply(out, rule, start, n))
        if made is None:
            return None
        for shift in self.body.shifts:
            self.shifts += [replace(shift, node=node) for node in self.new_of.get(shift.node, ())]
        return _Piece(made, self.takes, tuple(self.shifts), self._counted())

    def uncut(self) -> _Piece:
        """The body of a loop of one piece: everything as it is."""
        out = _unwound(self._copy(self.body.out))
        return _Piece(out, self.takes, (), self._counted())

    def _counted(self) -> set[Node]:
        """What stands in the new body for the counted nodes of the old one."""
        return self.pieces.union(*(self.new_of.get(old, ()) for old in self.body.counted))

    def _apply(self, node: Node, rule: Slice, chain: Chain, n: int) -> Steps[Node | None]:
        """`node` for a piece: sources cut as the rule says, attributes changed."""
        src: list[Node | None] = []
        for source, step in zip(node.src, rule.cuts):
            if source is None:
                src.append(None)
                continue
            if step is None:
                src.append((yield self._whole(source)))
                continue
            extent = max(1, n * step.mul // step.div)
            extent = min(extent, step.mod) if step.mod else extent
            src.append((yield self._part(source, chain.then(step), extent)))
        try:
            made = inherit(node.op(*src, **{**node.attrs, **rule.attrs}), node)
        except ShapeError:
            return None
        self.new_of.setdefault(node, []).append(made)
        self.shifts += [Shift(made, key, per, chain) for key, per in rule.shift.items()]
        return made

    def _part(self, node: Node, chain: Chain, extent: int) -> Steps[Node]:
        """The part of `node` where `chain` leads: computed in the body, or taken from outside."""
        key = (node, chain, extent)
        if key in self.memo:
            return self.memo[key]
        made = None
        if node in self.inside:
            rule = slice_of(node, chain.axis, extent)
            if rule is not None:
                made = yield self._apply(node, rule, chain, extent)
            if made is None and not self.first:
                raise _Uncuttable
        if made is None:
            made = self._take(node, chain, extent)
        self.memo[key] = made
        return made

    def _whole(self, node: Node) -> Steps[Node]:
        key = (node, None, 0)
        if key not in self.memo:
            keep = node in self.inside and not self.first
            self.memo[key] = (yield self._copy(node)) if keep else self._take(node, None, 0)
        return self.memo[key]

    def _copy(self, node: Node) -> Steps[Node]:
        src: list[Node | None] = []
        for source in node.src:
            whole = None if source is None else (yield self._whole(source))
            src.append(whole)
        made = rebuilt(node, tuple(src))
        self.new_of.setdefault(node, []).append(inherit(made, node))
        return made

    def _take(self, node: Node, chain: Chain | None, extent: int) -> Node:
        """A leaf of the body: a part of a source of the loop."""
        old = self.body.takes.get(node)
        source = old.source if old else self.sources.setdefault(node, len(self.sources))
        chains = old.chains if old else ()
        sizes = list(node.ne)
        if chain is not None:
            sizes[chain.axis] = extent
            chains = (*chains, chain)
        leaf = _piece(node, tuple(sizes))
        self.takes[leaf] = Take(leaf, source, chains)
        if node in self.body.counted:
            self.pieces.add(leaf)
        return leaf


def _body(
    region: Region, cuts: Cuts, extents: Sequence[int], sources: dict[Node, int]
) -> _Piece | None:
    """The body for pieces of these extents, or None where a rule forbids them."""
    body = _Piece(region.out, {}, (), set(region.counted))
    inside = set(region.inside)
    if not cuts:
        return _Cutter(body, inside, 0, sources, first=False).uncut()
    for dim, ((axis, _), extent) in enumerate(zip(cuts, extents)):
        cutter = _Cutter(body, inside, dim, sources, first=dim == 0)
        try:
            made = cutter.run(axis, extent)
        except _Uncuttable:
            return None
        if made is None:
            return None
        body = made
        inside = {new for news in cutter.new_of.values() for new in news}
    return body


def _aligned(chain: Chain, dim: Dim) -> bool:
    """Whether every piece stays inside one group, or holds whole groups, at each map of a chain."""
    step, first, base = dim.step, dim.first, 0  # pieces begin at base, base + first, + step, ..
    for cut in chain.maps:
        step, first, base = step * cut.mul, first * cut.mul, base * cut.mul
        group = max(cut.div, cut.mod)
        whole = all(n % group == 0 for n in (base, first, step))
        if not whole and not (group % step == 0 and first == step and base % step == 0):
            return False
        if cut.div > 1:
            step, first, base = max(1, step // cut.div), max(1, first // cut.div), base // cut.div
        elif cut.mod:
            step, first, base = min(step, cut.mod), min(first, cut.mod), base % cut.mod
        base += cut.add
    return True


def _without_sinks(out: Node) -> Node:
    """Sinks are one more key: only the first block of keys has them."""
    src = (*out.src[:4], None, *out.src[5:])
    return (
        out
        if src == out.src
        else inherit(out.op.make(src, dict(out.attrs), out.spec, line=False), out)
    )


def _summing(bodies: list[Body]) -> list[Body]:
    """Bodies whose partial results are summed in the loop's result, the first one beginning it."""
    first = replace(bodies[0], out=inherit(lse_sum(bodies[0].out), bodies[0].out))
    carry = _piece(first.out, first.out.ne)
    rest = [
        replace(body, out=inherit(lse_sum(body.out, carry), body.out), carry=carry)
        for body in bodies[1:]
    ]
    return [first, *rest]


def cut(region: Region, cuts: Cuts) -> Made | None:
    """The loop that computes `region.out` in pieces: for each axis pieces of so many elements.

    No cuts: a loop of one piece. None where a slice rule forbids these pieces.
    """
    merged = bool(cuts) and isinstance(cuts[-1][0], str)
    wanted = region.out
    dims = []
    for axis, step in cuts:
        total = region.extent(axis)
        dims.append(Dim(total, min(step, total), total % step or min(step, total)))
    if any(dim.first != dim.step for dim in dims[:-1]):
        return None
    if merged:
        region = replace(region, out=_mergeable(wanted))
    sources: dict[Node, int] = {}
    pieces = [_body(region, cuts, [dim.first for dim in dims], sources)]
    if dims and dims[-1].count > 1 and (merged or dims[-1].first != dims[-1].step):
        later = replace(region, out=_without_sinks(region.out)) if merged else region
        pieces.append(_body(later, cuts, [dim.step for dim in dims], sources))
    bodies = []
    for piece in pieces:
        if piece is None or not all(
            dims[c.dim].count == 1 or _aligned(c, dims[c.dim])
            for take in piece.takes.values()
            for c in take.chains
        ):
            return None
        bodies.append(Body(piece.out, tuple(piece.takes.values()), piece.shifts))
    made = region.out.spec
    if merged:
        bodies = _summing(bodies)
        made = lse_sum(region.out).spec
    rest = bodies[1] if len(bodies) > 1 else None
    loop = Loop(tuple(dims), tuple(axis for axis, _ in cuts), bodies[0], rest)
    node = inherit(make_loop(tuple(sources), loop, made), wanted)
    if merged:
        node = inherit(lse_finish(node, lse=wanted.attrs["lse"]), wanted)
    return Made(node, region.counted.union(*(p.counted for p in pieces if p is not None)))
