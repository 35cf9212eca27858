"""Collectives: what several devices compute together from the parts that each of them has.

A collective is a node on each device that gets the result. All of them read the same parts, in the
order of the devices; `rank` is the number of the device, and makes them different nodes. A part on
another device is an ordinary source, so a planner copies it by a `transfer`, and a meaning in
simpler ops over these copies runs on every backend. A backend with a library for collectives has a
kernel, which reads the parts where they are.

Sums are in the order of the parts, on every device. So all devices get the same bits, and so do one
process with many devices and many processes.
"""

from __future__ import annotations

from functools import reduce
from typing import Literal, TypeAlias

from pyggml.dtypes import F32
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Node
from pyggml.operation import op
from pyggml.ops.copy import concat, cont
from pyggml.ops.elementwise import add
from pyggml.ops.merge import lse_finish, lse_sum
from pyggml.ops.rules import AXES, FLOATS, want_ne, want_type
from pyggml.ops.views import resized, view
from pyggml.spec import Spec
from pyggml.traits import Axis, Cost, Cut, Slice

__all__ = ["all_gather", "all_reduce", "broadcast", "reduce_scatter"]

#: How the parts of a sum are merged: added, or as attentions over different keys.
Merge: TypeAlias = Literal["sum", "lse"]


def _want_rank(rank: int, n: int | None = None) -> None:
    if rank < 0 or (n is not None and rank >= n):
        limit = "at least 0" if n is None else f"0 to {n - 1}, one of the {n} parts"
        raise ShapeError(f"rank={rank} must be {limit}")


def _want_same(part: Node, others: tuple[Node, ...], why: str) -> None:
    """Errors unless all parts have the type and the sizes of the first one."""
    for i, other in enumerate(others):
        if other.dtype != part.dtype:
            raise DTypeError(f"part has type {part.dtype} and others[{i}] has type {other.dtype}")
        want_ne(f"others[{i}]", other, part.ne, why)


def _sent(node: Node, share: float) -> float:
    """Bytes that each device sends, if it sends `share` of the tensor to each other device."""
    return (len(node.src) - 1) * share


def _outer(node: Node, axis: Axis, n: int) -> Slice | None:
    """Every dimension of the parts; only whole rows of an attention."""
    if not isinstance(axis, int) or (axis == 0 and node.attrs["op"] == "lse"):
        return None
    return Slice((Cut(axis),) * len(node.src))


@op(slices=_outer)
def all_reduce(part: Node, *others: Node, op: Merge = "sum", rank: int = 0) -> Spec:
    """The sum of all parts:  y = ((part + others[0]) + others[1]) + ...

    op "sum"  parts, y  f32 or f16  [ne0, ne1, ne2, ne3]
    op "lse"  parts     f32  [d_v + 1, n_head, n_q, n3]   flash_attn_ext with lse=True, over
                                                          different keys
              y         f32  [d_v, n_head, n_q, n3]       the attention over all keys
    rank      the device that gets this y
    """
    _want_rank(rank)
    _want_same(part, others, "all parts have one size")
    if op == "sum":
        want_type("part", part, FLOATS)
        return part.spec
    want_type("part", part, ("f32",))
    if part.ne[0] < 2:
        raise ShapeError(f"part.ne[0]={part.ne[0]} must be at least 2: d_v values and an lse")
    return Spec.of(F32, (part.ne[0] - 1, *part.ne[1:]), part.spec.rank)


@all_reduce.means
def _(part: Node, *others: Node, op: Merge = "sum", rank: int = 0) -> Node:
    if op == "lse":
        return lse_finish(reduce(lambda c, a: lse_sum(a, c), others, lse_sum(part)))
    return reduce(add, others, part)


@all_reduce.cost
def _(node: Node) -> Cost:
    """Each device sends its part in N pieces and then the sum of one piece (a ring)."""
    n, part = len(node.src), node["part"].spec
    read = float(n * part.nbytes + node.spec.nbytes)
    return Cost((n - 1.0) * part.elements, read, sent=_sent(node, 2.0 * part.nbytes / n))


@op
def all_gather(part: Node, *others: Node, dim: int, rank: int = 0) -> Spec:
    """All parts end to end along `dim`.

    parts  any type  [.., n_i, ..]   other sizes equal
    y                [.., sum n_i, ..]
    rank   the device that gets this y
    """
    _want_rank(rank)
    if not 0 <= dim < 4:
        raise ShapeError(f"dim={dim} must be 0, 1, 2 or 3")
    for i, other in enumerate(others):
        if other.dtype != part.dtype:
            raise DTypeError(f"part has type {part.dtype} and others[{i}] has type {other.dtype}")
        same = resized(part.ne, dim, other.ne[dim])
        want_ne(f"others[{i}]", other, same, f"part's sizes except {AXES[dim]}")
    total = part.ne[dim] + sum(other.ne[dim] for other in others)
    return Spec.of(part.dtype, resized(part.ne, dim, total), max(part.spec.rank, dim + 1))


@all_gather.means
def _(part: Node, *others: Node, dim: int, rank: int = 0) -> Node:
    return reduce(lambda a, b: concat(a, b, dim=dim), others, part) if others else cont(part)


@all_gather.cost
def _(node: Node) -> Cost:
    """Each device sends its part to every other one."""
    mean = node.spec.nbytes / len(node.src)
    return Cost(0.0, 2.0 * node.spec.nbytes, sent=_sent(node, mean))


@all_gather.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if axis == node.attrs["dim"] or not isinstance(axis, int):
        return None
    return None if axis == 0 and node.dtype.block > 1 else Slice((Cut(axis),) * len(node.src))


@op
def reduce_scatter(
    part: Node, *others: Node, dim: int, sizes: tuple[int, ...], rank: int = 0
) -> Spec:
    """A piece of the sum of all parts:  y = (part + others[0] + ...)[start : start + sizes[rank]]

    parts  f32 or f16  [ne0, ne1, ne2, ne3]
    y      the same with sizes[rank] elements along dim, from start = sum sizes[:rank] on
    sizes  of the pieces of all devices along dim; their sum is the size of a part
    """
    want_type("part", part, FLOATS)
    _want_same(part, others, "all parts have one size")
    _want_rank(rank, len(sizes))
    if not 0 <= dim < 4:
        raise ShapeError(f"dim={dim} must be 0, 1, 2 or 3")
    if min(sizes) < 1 or sum(sizes) != part.ne[dim]:
        raise ShapeError(
            f"sizes={sizes} must be at least 1 each and together {AXES[dim]}={part.ne[dim]}"
        )
    return Spec.of(part.dtype, resized(part.ne, dim, sizes[rank]), part.spec.rank)


def _piece(a: Node, dim: int, sizes: tuple[int, ...], rank: int) -> Node:
    """The elements of `a` that a device gets."""
    start = resized((0, 0, 0, 0), dim, sum(sizes[:rank]))
    return view(a, ne=resized(a.ne, dim, sizes[rank])[: a.spec.rank], start=start)


@reduce_scatter.means
def _(part: Node, *others: Node, dim: int, sizes: tuple[int, ...], rank: int = 0) -> Node:
    pieces = [_piece(a, dim, sizes, rank) for a in (part, *others)]
    return reduce(add, pieces[1:], pieces[0]) if others else cont(pieces[0])


@reduce_scatter.cost
def _(node: Node) -> Cost:
    """Each device sends to every other one the piece that it sums."""
    n = len(node.src)
    flops, read = (n - 1.0) * node.spec.elements, (n + 1.0) * node.spec.nbytes
    return Cost(flops, read, sent=_sent(node, node["part"].spec.nbytes / n))


@reduce_scatter.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if axis == node.attrs["dim"] or not isinstance(axis, int):
        return None
    return Slice((Cut(axis),) * len(node.src))


@op
def broadcast(a: Node, *, rank: int = 0) -> Spec:
    """y = a, which one device has.   rank  the device that gets this y;  a, y  any type and size"""
    _want_rank(rank)
    return a.spec


@broadcast.means
def _(a: Node, *, rank: int = 0) -> Node:
    return a


@broadcast.cost
def _(node: Node) -> Cost:
    return Cost(0.0, 2.0 * node.spec.nbytes, sent=float(node.spec.nbytes))


@broadcast.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if not isinstance(axis, int) or (axis == 0 and node.dtype.block > 1):
        return None
    return Slice((Cut(axis),))
