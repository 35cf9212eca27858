"""Builds the body of a loop: one piece of an attention, by the slice rules of its ops."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from pyggml.errors import ShapeError
from pyggml.graph import rebuilt
from pyggml.interning import inherit
from pyggml.loop import Chain, Shift, Take
from pyggml.node import Node
from pyggml.operation import slice_of
from pyggml.ops.leaf import piece_op
from pyggml.spec import Spec
from pyggml.traits import Axis, Slice

T = TypeVar("T")
#: A function that calls others by `yield`; `unwound` runs it.
Recursive: TypeAlias = Generator[Any, Any, T]


class Uncuttable(Exception):
    """A later dimension meets a tensor that it cannot cut."""


@dataclass(slots=True)
class Piece:
    """A body under construction: its result, its leaves, its shifts and its counted tensors.

    Leaves that are parts of counted tensors are counted too: they take no bytes of the body, but
    the scratch of kernels that read them belongs to the budget.
    """

    out: Node
    takes: dict[Node, Take]
    shifts: tuple[Shift, ...]
    counted: set[Node]


def piece_of(source: Node, ne: tuple[int, ...]) -> Node:
    """A leaf for a part of `source`, with its strides."""
    node = piece_op.make(
        (), {"name": None}, Spec.of(source.dtype, ne, source.spec.rank), line=False
    )
    object.__setattr__(node, "nb", source.nb)
    return inherit(node, source)


class Cutter:
    """Cuts a body along one more dimension of the loop.

    The first dimension leaves nodes that it cannot cut, or that pieces need whole, outside: they
    are computed once, before the loop. Later dimensions keep them in the body.

    inside   the nodes that the body may compute
    dim      the number of the dimension
    sources  the loop's sources and their numbers; grows
    """

    def __init__(self, body: Piece, inside: set[Node], dim: int, sources: dict[Node, int]) -> None:
        self.body, self.inside, self.dim = body, inside, dim
        self.sources = sources
        self.memo: dict[tuple[Node, Chain | None, int], Node] = {}
        self.new_of: dict[Node, list[Node]] = {}
        self.takes: dict[Node, Take] = {}
        self.shifts: list[Shift] = []
        self.pieces: set[Node] = set()  # leaves for parts of counted tensors

    def run(self, axis: Axis, n: int) -> Piece | None:
        """The body for pieces of `n` along `axis` of its result, or None if that is illegal.

        Raises Uncuttable.
        """
        old = self.body.out
        rule = slice_of(old, axis, n)
        if rule is None:
            return None
        start = Chain(self.dim, axis if isinstance(axis, int) else -1, ())
        out = unwound(self._apply(old, rule, start, n))
        if out is None:
            return None
        for shift in self.body.shifts:
            self.shifts += [replace(shift, node=node) for node in self.new_of.get(shift.node, ())]
        return Piece(out, self.takes, tuple(self.shifts), self._counted())

    def uncut(self) -> Piece:
        """The body of a loop of one piece: every node as it is."""
        node = self.body.out
        out = unwound(self._copy(node, keep=True))
        return Piece(out, self.takes, (), self._counted())

    def _counted(self) -> set[Node]:
        """The new body's nodes for the counted nodes of the old one."""
        return self.pieces.union(*(self.new_of.get(old, ()) for old in self.body.counted))

    def _apply(self, node: Node, rule: Slice, chain: Chain, n: int) -> Recursive[Node | None]:
        """`node` for a piece: its sources cut and its attributes changed by the rule."""
        src: list[Node | None] = []
        for source, step in zip(node.src, rule.cuts):
            if source is None:
                src.append(None)
                continue
            if step is None:
                src.append((yield self._whole(source, keep=self.dim > 0)))
                continue
            extent = max(1, n * step.mul // step.div)
            extent = min(extent, step.mod) if step.mod else extent
            src.append((yield self._part(source, chain.then(step), extent)))
        try:
            new = inherit(node.op(*src, **{**node.attrs, **rule.attrs}), node)
        except ShapeError:
            return None
        self.new_of.setdefault(node, []).append(new)
        self.shifts += [Shift(new, key, per, chain) for key, per in rule.shift.items()]
        return new

    def _part(self, node: Node, chain: Chain, extent: int) -> Recursive[Node]:
        """The part of `node` where `chain` leads: computed in the body, or taken from outside."""
        key = (node, chain, extent)
        if key in self.memo:
            return self.memo[key]
        part = None
        if node in self.inside:
            rule = slice_of(node, chain.axis, extent)
            if rule is not None:
                part = yield self._apply(node, rule, chain, extent)
            if part is None and self.dim > 0:
                raise Uncuttable
        if part is None:
            part = self._take(node, chain, extent)
        self.memo[key] = part
        return part

    def _whole(self, node: Node, keep: bool) -> Recursive[Node]:
        """All of `node`: computed in the body if `keep`, or taken from outside."""
        key = (node, None, 0)
        if key not in self.memo:
            inside = keep and node in self.inside
            self.memo[key] = (yield self._copy(node, keep)) if inside else self._take(node, None, 0)
        return self.memo[key]

    def _copy(self, node: Node, keep: bool) -> Recursive[Node]:
        src: list[Node | None] = []
        for source in node.src:
            whole = None if source is None else (yield self._whole(source, keep))
            src.append(whole)
        copy = rebuilt(node, tuple(src))
        self.new_of.setdefault(node, []).append(inherit(copy, node))
        return copy

    def _take(self, node: Node, chain: Chain | None, extent: int) -> Node:
        """A leaf of the body: a part of a source of the loop, or all of it."""
        old = self.body.takes.get(node)
        source = old.source if old else self.sources.setdefault(node, len(self.sources))
        chains = old.chains if old else ()
        sizes = list(node.ne)
        if chain is not None:
            sizes[chain.axis] = extent
            chains = (*chains, chain)
        leaf = piece_of(node, tuple(sizes))
        self.takes[leaf] = Take(leaf, source, chains)
        if node in self.body.counted:
            self.pieces.add(leaf)
        return leaf


def unwound(call: Recursive[T]) -> T:
    """The result of a recursive call, in which `yield f(x)` is a call too.

    An attention can be thousands of nodes deep, more than Python's stack allows.
    """
    calls: list[Recursive[Any]] = [call]
    value: Any = None
    while calls:
        try:
            calls.append(calls[-1].send(value))
            value = None
        except StopIteration as end:
            calls.pop()
            value = end.value
    result: T = value
    return result
