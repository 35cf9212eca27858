"""The pieces of a loop step: the addresses and attributes that each run of a body sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pyggml.backends.step import Address, Addresses, LoopStep
from pyggml.loop import Body, Chain
from pyggml.node import Node


def pieces_of(
    step: LoopStep, at: Addresses
) -> Iterator[tuple[Body, tuple[int, ...], dict[Node, Address]]]:
    """The pieces of a loop step in order: the body, its start along each dimension, and the
    addresses of the body's result, carry and leaves."""
    loop, node = step.loop, step.node
    for body, starts in loop.pieces():
        filled = enumerate(loop.fill)
        chains = [Chain(dim, axis, ()) for dim, axis in filled if isinstance(axis, int)]
        out = _piece(at[node], node, chains, starts)
        places = {body.out: out}
        if body.carry is not None:
            places[body.carry] = out
        for take in body.takes:
            source = node.src[take.source]
            assert source is not None
            places[take.piece] = _piece(at[source], source, take.chains, starts)
        yield body, starts, places


def _piece(at: Address, node: Node, chains: Sequence[Chain], starts: Sequence[int]) -> Address:
    """The address of the piece at the offsets that `chains` compute from `starts`."""
    offset = at.offset
    for chain in chains:
        first = chain.at(starts[chain.dim])
        offset += (first // node.dtype.block if chain.axis == 0 else first) * at.nb[chain.axis]
    return Address(at.buffer, offset, at.nb)


def view_address(node: Node, places: Addresses) -> Address:
    """The address of a view of a piece, from the address of its source."""
    source = node.src[0]
    assert source is not None and node.op.view is not None
    at = places[source]
    view = node.op.view(node, at.nb)
    assert view is not None
    offset, nb = view
    return Address(at.buffer, at.offset + offset, nb)


def piece_attributes(body: Body, node: Node, starts: Sequence[int]) -> dict[str, Any]:
    """The attributes of a body's node in the piece at `starts`."""
    attrs = dict(node.attrs)
    for shift in body.shifts:
        if shift.node is node:
            attrs[shift.attr] += shift.per * shift.chain.at(starts[shift.chain.dim])
    return attrs
