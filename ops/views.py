"""Views: tensors that show the memory of another one with other sizes, strides and offset."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pyggml.arguments import located
from pyggml.dtypes import DType
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Node
from pyggml.operation import Op, op
from pyggml.ops.leaf import state_op
from pyggml.ops.rules import AXES
from pyggml.spec import Ne, Spec, integers
from pyggml.traits import Axis, Cut, Slice

__all__ = ["permute", "reshape", "state_of", "transpose", "view"]

Sizes = tuple[int, ...] | list[int]


def _full(sizes: tuple[int, ...], default: int) -> Ne:
    full = sizes + (default,) * (4 - len(sizes))
    return (full[0], full[1], full[2], full[3])


def _units(dtype: DType, ne: Ne) -> Ne:
    """`ne` with dimension 0 in blocks, the unit of nb[0]."""
    return (ne[0] // dtype.block, ne[1], ne[2], ne[3])


def _reshape_view(node: Node, nb: Ne) -> tuple[int, Ne] | None:
    """Strides for the new sizes over those of the source, or None if that needs a copy."""
    source = node["a"]
    old = [(n, b) for n, b in zip(_units(node.dtype, source.ne), nb) if n > 1]
    strides: list[int] = []
    size, stride = old.pop(0) if old else (1, node.dtype.nbytes)
    for n in _units(node.dtype, node.ne):
        if n == 1:
            strides.append(stride)
            continue
        if size == 1 and old:
            size, stride = old.pop(0)
        # Merge the next old dimension if it continues this one without a gap.
        while size % n and old and old[0][1] == size * stride:
            size *= old.pop(0)[0]
        if size % n:
            return None
        strides.append(stride)
        size, stride = size // n, stride * n
    return 0, _full(tuple(strides), 0)


@op(view=_reshape_view)
def reshape(a: Node, *, ne: tuple[int, ...]) -> Spec:
    """The same elements in the same order with other sizes; no copy.

    Errors: ShapeError if the count differs, or if a's strides need a copy (use cont first).
    """
    spec = Spec.of(a.dtype, ne)
    if spec.elements != a.spec.elements:
        raise ShapeError(
            f"a has {a.spec.elements} elements, but {list(ne)} is {spec.elements} elements"
        )
    return spec


@reshape.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if not isinstance(axis, int):
        return None
    source = node["a"]
    inner, outer = math.prod(node.ne[:axis]), math.prod(node.ne[: axis + 1])
    sizes = resized(node.ne, axis, n)
    for s in range(4):
        inner_s = math.prod(source.ne[:s])
        # Dimensions 0..axis of the result and 0..s of the source must hold the same elements.
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
    """a with its dimensions in another order, as in ggml: a's dimension i becomes axes[i]; no copy.

    y.ne[axes[i]] = a.ne[i].   Block types must keep dimension 0 in place.
    """
    full = tuple(axes) + tuple(range(len(axes), 4))
    if sorted(full) != [0, 1, 2, 3]:
        raise ShapeError(f"axes={axes} must be a permutation of 0..{max(len(axes) - 1, 0)}")
    if a.dtype.block > 1 and full[0] != 0:
        raise ShapeError(f"dimension 0 of {a.dtype} rows must stay in place; cast a to f16 first")
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
    """a with dimensions 0 and 1 swapped; no copy. `permute(a, axes=(1, 0, 2, 3))`."""
    return permute(a, axes=(1, 0, 2, 3))


def _slice_view(node: Node, nb: Ne) -> tuple[int, Ne]:
    start, step = node.attrs["start"], node.attrs["step"]
    offset = sum(s * b for s, b in zip((start[0] // node.dtype.block, *start[1:]), nb))
    return offset, _full(tuple(b * s for b, s in zip(nb, step)), 0)


def _view(a: Node, *, ne: Ne, start: Ne, step: Ne, rank: int) -> Spec:
    for axis, (size, n, first, by) in enumerate(zip(a.ne, ne, start, step)):
        if by < 1 or first < 0 or first + (n - 1) * by >= size:
            raise ShapeError(
                f"a slice of {n} from start {first} in steps of {by} does not fit in "
                f"{AXES[axis]}={size}"
            )
    if a.dtype.block > 1 and (start[0] % a.dtype.block or step[0] != 1):
        raise ShapeError(
            f"a slice of {a.dtype} must start at a multiple of {a.dtype.block}, with step 1"
        )
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
    nb, offset       instead of start and step: ggml's byte strides nb1.. and byte offset, if they
                     describe a slice of `a` or of a reshape of `a`
    """
    if not isinstance(a, Node):
        raise DTypeError(f"view: a must be a node, not {type(a).__name__}")
    spec = Spec.of(a.dtype, integers("view: ne=", ne))
    if nb is not None or offset:
        if start is not None or step is not None:
            raise ShapeError("view: give start= and step=, or nb= and offset=, not both")
        (offset,) = integers("view: offset=", (offset,))
        a, start = _from_bytes(a, spec, _numbers("nb", nb, 3), offset)
    return view_op(
        a,
        ne=spec.ne,
        start=_full(_numbers("start", start, 4), 0),
        step=_full(_numbers("step", step, 4), 1),
        rank=spec.rank,
    )


def _numbers(what: str, values: Sizes | None, limit: int) -> tuple[int, ...]:
    numbers = integers(f"view: {what}=", () if values is None else values)
    if len(numbers) > limit:
        raise ShapeError(f"view: {what}= takes at most {limit} numbers, got {len(numbers)}")
    return numbers


def _from_bytes(a: Node, spec: Spec, nb: tuple[int, ...], offset: int) -> tuple[Node, Ne]:
    """ggml's strides and offset as a start in `a`, or in a reshape of a contiguous `a`."""
    strides = list(a.nb if not nb else (a.dtype.nbytes, *nb))
    while len(strides) < 4:
        strides.append(strides[-1] * spec.ne[len(strides) - 1])
    start = _start(a, offset)
    leaves = any(first + n > size for first, n, size in zip(start, spec.ne, a.ne))
    same = all(n == 1 or s == b for n, s, b in zip(spec.ne, strides, a.nb))
    if not same or (leaves and a.contiguous):
        shown = [strides[0], *strides[1 : spec.rank]]
        ratios = [outer // inner for inner, outer in pairwise(shown) if inner]
        sizes = [ratios[0] * a.dtype.block, *ratios[1:]] if ratios else []
        outermost, remainder = divmod(a.spec.elements, math.prod(sizes) or 1)
        exact = all(o == i * r for (i, o), r in zip(pairwise(shown), ratios))
        if remainder or not exact or not a.contiguous or len(ratios) != len(shown) - 1:
            raise ShapeError(
                f"view: nb={strides[1:]} is not a slice of {a!r} with nb={list(a.nb)}; "
                "use reshape, permute and start="
            )
        a = reshape(a, ne=(*sizes, outermost))
        start = _start(a, offset)
    return a, start


def _start(a: Node, offset: int) -> Ne:
    """The index of the element of `a` at a byte offset."""
    if offset < 0:
        raise ShapeError(f"view: offset={offset} must not be negative")
    start = [0, 0, 0, 0]
    for axis in sorted(range(4), key=lambda i: -a.nb[i]):
        if a.ne[axis] > 1:
            start[axis], offset = divmod(offset, a.nb[axis])
    if offset:
        raise ShapeError(f"view: offset= is {offset} bytes past the start of an element or block")
    return _full((start[0] * a.dtype.block, *start[1:]), 0)


def bases(node: Node) -> Iterator[Node]:
    """The bases of the sources of `node`."""
    return (source.base for source in node.src if source is not None)


def _state_view(node: Node, nb: Ne) -> tuple[int, Ne]:
    return -node["a"].offset, node["a"].root.nb


@op(view=_state_view)
def state_of(a: Node) -> Spec:
    """The whole state after the write that returned `a`, a handle of a part of it.

    After `h = cpy(x, view(cache, ...))`, `state_of(h)` is the cache with x in it.
    """
    root = a.root
    if root.op is not state_op:
        raise ShapeError(f"a must be in the memory of a state; it is in that of {root!r}")
    return root.spec
