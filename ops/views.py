"""Views: other looks at a tensor that own no memory, and where in their root they stand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pyggml.dtypes import DType
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Axis, Cut, Ne, Node, Op, Slice, Spec, integers, located, op
from pyggml.ops.leaf import state_op
from pyggml.ops.rules import (
    AXES,
)

__all__ = ["permute", "reshape", "state_of", "transpose", "view"]

Sizes = tuple[int, ...] | list[int]


def _full(sizes: tuple[int, ...], rest: int) -> Ne:
    full = sizes + (rest,) * (4 - len(sizes))
    return (full[0], full[1], full[2], full[3])


def _units(dtype: DType, ne: Ne) -> Ne:
    """Sizes with dimension 0 counted in blocks, as strides count it."""
    return (ne[0] // dtype.block, ne[1], ne[2], ne[3])


def _reshape_view(node: Node, nb: Ne) -> tuple[int, Ne] | None:
    """Strides of the new sizes over the old ones, or None where that would need a copy."""
    source = node["a"]
    old = [(n, b) for n, b in zip(_units(node.dtype, source.ne), nb) if n > 1]
    strides: list[int] = []
    size, stride = old.pop(0) if old else (1, node.dtype.nbytes)
    for want in _units(node.dtype, node.ne):
        if want == 1:
            strides.append(stride)
            continue
        if size == 1 and old:
            size, stride = old.pop(0)
        here = stride
        # Dimensions that lie end to end count as one.
        while size % want and old and old[0][1] == size * stride:
            size *= old.pop(0)[0]
        if size % want:
            return None
        size, stride = size // want, stride * want
        strides.append(here)
    return 0, _full(tuple(strides), 0)


@op(view=_reshape_view)
def reshape(a: Node, *, ne: tuple[int, ...]) -> Spec:
    """The same elements in the same order under other sizes; no copy.

    Errors: ShapeError where the count differs or where strides need a copy (use cont first).
    """
    made = Spec.of(a.dtype, ne)
    if made.elements != a.spec.elements:
        raise ShapeError(
            f"{a.spec.elements} elements cannot become {list(ne)} = {made.elements} elements"
        )
    return made


@reshape.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if not isinstance(axis, int):
        return None
    source = node["a"]
    inner, outer = math.prod(node.ne[:axis]), math.prod(node.ne[: axis + 1])
    sizes = resized(node.ne, axis, n)
    for s in range(4):
        inner_s = math.prod(source.ne[:s])
        # The group of dimensions must end at the same place in both.
        if inner_s * source.ne[s] != outer or (source.ne[s] == 1 and outer > inner):
            continue
        if inner % inner_s == 0:
            return Slice((Cut(s, mul=inner // inner_s),), {"ne": sizes})
        if inner_s % inner == 0 and n % (inner_s // inner) == 0:
            return Slice((Cut(s, div=inner_s // inner),), {"ne": sizes})
    return None


def resized(ne: Ne, axis: int, n: int) -> Ne:
    sizes = list(ne)
    sizes[axis] = n
    return _full(tuple(sizes), 1)


def _permute_view(node: Node, nb: Ne) -> tuple[int, Ne]:
    axes = node.attrs["axes"]
    strides = [0, 0, 0, 0]
    for source, result in enumerate(axes):
        strides[result] = nb[source]
    return 0, _full(tuple(strides), 0)


@op(view=_permute_view)
def permute(a: Node, *, axes: tuple[int, ...]) -> Spec | tuple[Spec, dict[str, Any]]:
    """Dimensions in another order; no copy. ggml's meaning: a's dimension i becomes axes[i].

    y.ne[axes[i]] = a.ne[i].   Block types keep dimension 0 in place.
    """
    full = tuple(axes) + tuple(range(len(axes), 4))
    if sorted(full) != [0, 1, 2, 3]:
        raise ShapeError(f"axes={axes} is no permutation of 0..{max(len(axes) - 1, 0)}")
    if a.dtype.block > 1 and full[0] != 0:
        raise ShapeError(f"rows of {a.dtype} blocks cannot be taken apart; cast to f16 first")
    sizes = [1, 1, 1, 1]
    for source, result in enumerate(full):
        sizes[result] = a.ne[source]
    rank = max(a.spec.rank, 1 + max((r for s, r in enumerate(full) if a.ne[s] > 1), default=0))
    return Spec.of(a.dtype, tuple(sizes), rank), {"axes": full}


@permute.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    return Slice((Cut(node.attrs["axes"].index(axis)),)) if isinstance(axis, int) else None


@located
def transpose(a: Node) -> Node:
    """Dimensions 0 and 1 exchanged; no copy. `permute(a, axes=(1, 0, 2, 3))`."""
    return permute(a, axes=(1, 0, 2, 3))


def _slice_view(node: Node, nb: Ne) -> tuple[int, Ne]:
    start, step = node.attrs["start"], node.attrs["step"]
    offset = sum(s * b for s, b in zip((start[0] // node.dtype.block, *start[1:]), nb))
    return offset, _full(tuple(b * s for b, s in zip(nb, step)), 0)


def _view(a: Node, *, ne: Ne, start: Ne, step: Ne, rank: int) -> Spec:
    for axis, (size, n, first, by) in enumerate(zip(a.ne, ne, start, step)):
        if by < 1 or first < 0 or first + (n - 1) * by >= size:
            raise ShapeError(
                f"the slice of {n} from {first} by {by} leaves dimension {AXES[axis]} of {size}"
            )
    if a.dtype.block > 1 and (start[0] % a.dtype.block or step[0] != 1):
        raise ShapeError(f"a slice of {a.dtype} starts at a whole block of {a.dtype.block}")
    return Spec.of(a.dtype, ne, rank)


view_op = Op(_view, name="view", view=_slice_view)


@view_op.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if not isinstance(axis, int) or node.attrs["step"][axis] != 1:
        return None
    first = node.attrs["start"][axis]
    changed = {"ne": resized(node.ne, axis, n), "start": resized(node.attrs["start"], axis, 0)}
    return Slice((Cut(axis, add=first),), changed)


@located
def view(
    a: Node,
    *,
    ne: Sizes,
    start: Sizes | None = None,
    step: Sizes | None = None,
    nb: Sizes | None = None,
    offset: int = 0,
) -> Node:
    """A slice of a; no copy.   y[i] = a[start + i * step] in every dimension.

    ne, start, step  in ggml's order; start defaults to 0 and step to 1
    nb, offset       instead of start and step: ggml's byte strides nb1.. and byte offset, where
                     they describe a slice of `a` or of a reshape of `a`
    """
    if not isinstance(a, Node):
        raise DTypeError(f"view: a must be a node, not {type(a).__name__}")
    made = Spec.of(a.dtype, integers("view: ne=", ne))
    if nb is not None or offset:
        if start is not None or step is not None:
            raise ShapeError("view: give start= and step=, or nb= and offset=, not both")
        (offset,) = integers("view: offset=", (offset,))
        a, start = _from_bytes(a, made, _given("nb", nb, 3), offset)
    return view_op(
        a,
        ne=made.ne,
        start=_full(_given("start", start, 4), 0),
        step=_full(_given("step", step, 4), 1),
        rank=made.rank,
    )


def _given(what: str, values: Sizes | None, most: int) -> tuple[int, ...]:
    numbers = integers(f"view: {what}=", () if values is None else values)
    if len(numbers) > most:
        raise ShapeError(f"view: {what}= has {len(numbers)} numbers, at most {most}")
    return numbers


def _from_bytes(a: Node, made: Spec, nb: tuple[int, ...], offset: int) -> tuple[Node, Ne]:
    """ggml's strides and offset as a slice: of `a` itself, else of a reshape of contiguous `a`."""
    strides = list(a.nb if not nb else (a.dtype.nbytes, *nb))
    while len(strides) < 4:
        strides.append(strides[-1] * made.ne[len(strides) - 1])
    start = _start(a, offset)
    leaves = any(first + n > size for first, n, size in zip(start, made.ne, a.ne))
    same = all(n == 1 or s == b for n, s, b in zip(made.ne, strides, a.nb))
    if not same or (leaves and a.contiguous):
        whole = [strides[0], *strides[1 : made.rank]]
        ratios = [outer // inner for inner, outer in pairwise(whole) if inner]
        sizes = [ratios[0] * a.dtype.block, *ratios[1:]] if ratios else []
        rest, odd = divmod(a.spec.elements, math.prod(sizes) or 1)
        exact = all(o == i * r for (i, o), r in zip(pairwise(whole), ratios))
        if odd or not exact or not a.contiguous or len(ratios) != len(whole) - 1:
            raise ShapeError(
                f"view: strides nb={strides[1:]} describe no slice of {a!r} with nb={list(a.nb)}; "
                "use reshape, permute and start="
            )
        a = reshape(a, ne=(*sizes, rest))
        start = _start(a, offset)
    return a, start


def _start(a: Node, offset: int) -> Ne:
    """The element of `a` that stands at a byte offset."""
    if offset < 0:
        raise ShapeError(f"view: offset={offset} is negative")
    start = [0, 0, 0, 0]
    for axis in sorted(range(4), key=lambda i: -a.nb[i]):
        if a.ne[axis] > 1:
            start[axis], offset = divmod(offset, a.nb[axis])
    if offset:
        raise ShapeError(f"view: the offset ends {offset} bytes inside an element or a block")
    return _full((start[0] * a.dtype.block, *start[1:]), 0)


def bases(node: Node) -> Iterator[Node]:
    """The bases of the sources of `node`."""
    return (source.base for source in node.src if source is not None)


def _state_view(node: Node, nb: Ne) -> tuple[int, Ne]:
    return -node["a"].offset, node["a"].root.nb


@op(view=_state_view)
def state_of(a: Node) -> Spec:
    """The whole state of which `a` is a part, after the write that made `a`.

    After `h = cpy(x, view(cache, ...))`, `state_of(h)` is the cache with x in it.
    """
    root = a.root
    if root.op is not state_op:
        raise ShapeError(f"a is part of {root!r}, which is not a state")
    return root.spec
