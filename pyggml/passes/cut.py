"""Cuts an attention into a loop over pieces, by the slice rules of its ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pyggml.interning import inherit
from pyggml.loop import Body, Chain, Dim, Loop, make_loop
from pyggml.node import Node
from pyggml.ops.merge import lse_finish, lse_sum
from pyggml.passes.bodies import Cutter, Piece, Uncuttable, piece_of
from pyggml.passes.regions import Region, mergeable
from pyggml.traits import Axis

#: For each dimension of a loop, outermost first: an axis of the result, or the name of a reduction,
#: and how many elements of it a piece has.
Cuts = tuple[tuple[Axis, int], ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """A loop in place of a region's result, and the tensors inside it that the budget counts."""

    node: Node
    counted: frozenset[Node]


def cut(region: Region, cuts: Cuts) -> Cut | None:
    """The loop that computes `region.out` in pieces, or None if a slice rule forbids them.

    No cuts make a loop of one piece.
    """
    old = region.out
    merged = bool(cuts) and isinstance(cuts[-1][0], str)
    dims = []
    for axis, step in cuts:
        total = region.extent(axis)
        dims.append(Dim(total, min(step, total), total % step or min(step, total)))
    if any(dim.first != dim.step for dim in dims[:-1]):
        return None
    if merged:
        region = replace(region, out=mergeable(old))
    sources: dict[Node, int] = {}
    pieces = [_piece(region, cuts, [dim.first for dim in dims], sources)]
    if dims and dims[-1].count > 1 and (merged or dims[-1].first != dims[-1].step):
        later = replace(region, out=_without_sinks(region.out)) if merged else region
        pieces.append(_piece(later, cuts, [dim.step for dim in dims], sources))
    legal = [piece for piece in pieces if piece is not None and _aligned(piece, dims)]
    if len(legal) < len(pieces):
        return None
    bodies = [Body(piece.out, tuple(piece.takes.values()), piece.shifts) for piece in legal]
    spec = region.out.spec
    if merged:
        bodies = _summing(bodies)
        spec = lse_sum(region.out).spec
    later_body = bodies[1] if len(bodies) > 1 else None
    loop = Loop(tuple(dims), tuple(axis for axis, _ in cuts), bodies[0], later_body)
    node = inherit(make_loop(tuple(sources), loop, spec), old)
    if merged:
        node = inherit(lse_finish(node, lse=old.attrs["lse"]), old)
    return Cut(node, region.counted.union(*(piece.counted for piece in legal)))


def _piece(
    region: Region, cuts: Cuts, extents: Sequence[int], sources: dict[Node, int]
) -> Piece | None:
    """The body for pieces of these extents, or None if a rule forbids them."""
    piece = Piece(region.out, {}, (), set(region.counted))
    inside = set(region.inside)
    if not cuts:
        return Cutter(piece, inside, 0, sources).uncut()
    for dim, ((axis, _), extent) in enumerate(zip(cuts, extents)):
        cutter = Cutter(piece, inside, dim, sources)
        try:
            smaller = cutter.run(axis, extent)
        except Uncuttable:
            return None
        if smaller is None:
            return None
        piece = smaller
        inside = {new for copies in cutter.new_of.values() for new in copies}
    return piece


def _aligned(piece: Piece, dims: Sequence[Dim]) -> bool:
    """Whether every piece reads whole groups of a source, or stays inside one group."""
    chains = [chain for take in piece.takes.values() for chain in take.chains]
    return all(dims[c.dim].count == 1 or _in_groups(c, dims[c.dim]) for c in chains)


def _in_groups(chain: Chain, dim: Dim) -> bool:
    """Whether pieces hold whole groups, or stay inside one, at each map of a chain."""
    step, first, base = dim.step, dim.first, 0  # pieces begin at base, base + first, + step, ..
    for link in chain.maps:
        step, first, base = (n * link.mul for n in (step, first, base))
        group = max(link.div, link.mod)
        whole = all(n % group == 0 for n in (base, first, step))
        if not whole and not (group % step == 0 and first == step and base % step == 0):
            return False
        if link.div > 1:
            step, first = (max(1, n // link.div) for n in (step, first))
            base //= link.div
        elif link.mod:
            step, first = (min(n, link.mod) for n in (step, first))
            base %= link.mod
        base += link.add
    return True


# -- blocks of keys, merged by log-sum-exp ----------------------------------------------------


def _without_sinks(out: Node) -> Node:
    """`out` for later blocks of keys: sinks are one more key, which the first block has."""
    src = (*out.src[:4], None, *out.src[5:])
    if src == out.src:
        return out
    return inherit(out.op.make(src, dict(out.attrs), out.spec, line=False), out)


def _summing(bodies: list[Body]) -> list[Body]:
    """Bodies that sum their partial results in the loop's result; the first one starts the sum."""
    first = replace(bodies[0], out=inherit(lse_sum(bodies[0].out), bodies[0].out))
    carry = piece_of(first.out, first.out.ne)
    later = [
        replace(body, out=inherit(lse_sum(body.out, carry), body.out), carry=carry)
        for body in bodies[1:]
    ]
    return [first, *later]
