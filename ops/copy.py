"""Copies, gathers and scatters: what moves values without computing with them."""

from __future__ import annotations

from typing import Any

from pyggml.dtypes import DType, DTypeLike
from pyggml.dtypes import dtype as dtype_of
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Axis, Cost, Cut, Ids, Ne, Node, Slice, Spec, op
from pyggml.ops.leaf import state_op
from pyggml.ops.rules import (
    AXES,
    FLOATS,
    elementwise_slices,
    modulo_cut,
    want_index,
    want_ne,
    want_readable,
    want_type,
)
from pyggml.ops.views import resized
from pyggml.quants import ENCODABLE

__all__ = ["cast", "concat", "cont", "cpy", "get_rows", "repeat", "set_rows"]


@op(slices=elementwise_slices)
def cont(a: Node) -> Spec:
    """A contiguous copy of a: same type, same sizes."""
    return a.spec


def _want_conversion(a: Node, to: DType) -> None:
    """Which types turn into which: equal ones, floats and blocks among each other, i32 and f32."""
    if a.dtype == to or {a.dtype.name, to.name} <= {"i32", "i64", "f32"}:
        return
    want_readable("a", a)
    if to.kind == "int" or (to.name != "f32" and to.name not in ENCODABLE):
        raise DTypeError(
            f"a of type {a.dtype} cannot become {to}; "
            f"f32 and {', '.join(sorted(ENCODABLE))} can be written"
        )


@op
def cast(a: Node, *, dtype: DTypeLike) -> Spec | tuple[Spec, dict[str, Any]]:
    """A contiguous copy of a in another type.

    f32, f16, bf16 and block types among each other; i32 and i64 to and from f32.
    """
    to = dtype_of(dtype)
    _want_conversion(a, to)
    return Spec.of(to, a.ne, a.spec.rank), {"dtype": to.name}


@cast.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if axis == 0 and max(node.dtype.block, node["a"].dtype.block) > 1:
        return None
    return elementwise_slices(node, axis, n)


def _want_state(what: str, node: Node) -> None:
    if node.root.op is not state_op:
        raise ShapeError(f"{what} must be a state or a view of one: nothing else can be written")


@op(writes="b")
def cpy(a: Node, b: Node) -> Spec:
    """Write a into b, a state or a view of one; the result is b's new handle.

    Elements are taken in a's order and written in b's; counts are equal, types are converted.
    """
    _want_state("b", b)
    _want_conversion(a, b.dtype)
    if a.spec.elements != b.spec.elements:
        raise ShapeError(f"a has {a.spec.elements} elements, b {b.spec.elements}")
    if a.ne[0] != b.ne[0] and max(a.dtype.block, b.dtype.block) > 1:
        raise ShapeError("rows of blocks are copied whole: ne0 of a and b must be equal")
    return b.spec


@cpy.cost
def _(node: Node) -> Cost:
    return Cost(0.0, float(node["a"].spec.nbytes + node.spec.nbytes))


def _concat_parts(node: Node) -> tuple[Ne, ...]:
    dim = node.attrs["dim"]
    return (0, 0, 0, 0), resized((0, 0, 0, 0), dim, node["a"].ne[dim])


@op(parts=_concat_parts)
def concat(a: Node, b: Node, *, dim: int) -> Spec:
    """a and b end to end along `dim`.

    a  any type  [.., n, ..]
    b  a's type  [.., m, ..]   other sizes equal
    y            [.., n + m, ..]
    """
    if not 0 <= dim < 4:
        raise ShapeError(f"dim={dim} is not 0, 1, 2 or 3")
    if a.dtype != b.dtype:
        raise DTypeError(f"a is {a.dtype} and b is {b.dtype}; cast one of them")
    want_ne("b", b, resized(a.ne, dim, b.ne[dim]), f"a's sizes but for {AXES[dim]}")
    return Spec.of(
        a.dtype, resized(a.ne, dim, a.ne[dim] + b.ne[dim]), max(a.spec.rank, b.spec.rank, dim + 1)
    )


@concat.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if axis == node.attrs["dim"] or (axis == 0 and node.dtype.block > 1):
        return None
    return Slice((Cut(axis), Cut(axis))) if isinstance(axis, int) else None


@op
def repeat(a: Node, *, ne: tuple[int, ...]) -> Spec | tuple[Spec, dict[str, Any]]:
    """a tiled to the size `ne`, each of which is a multiple of a's.   Plain types only."""
    want_type("a", a, ("f32", "f16", "bf16", "i32", "i64"))
    made = Spec.of(a.dtype, ne)
    for axis, (n, m) in enumerate(zip(a.ne, made.ne)):
        if m % n:
            raise ShapeError(f"{AXES[axis]}={n} does not divide {m}")
    return made, {"ne": made.ne}


@repeat.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if not isinstance(axis, int):
        return None
    cut = modulo_cut(node["a"].ne[axis], axis, node.ne[axis])
    if cut is not None and cut.mod and n % cut.mod:
        return None
    return Slice((cut,), {"ne": resized(node.ne, axis, n)})


@op(ids=Ids("ids", of="a", axis=1))
def get_rows(a: Node, ids: Node) -> Spec:
    """Rows by id: y[:, i, p, q] = a[:, ids[i, p, q], p, q].   A negative id gives a zero row.

    a    any type  [n, n_rows, ne2, ne3]
    ids  i32       [n_ids, ne2, ne3]
    y    f32       [n, n_ids, ne2, ne3]   (i32 for an i32 source)
    An id past the end is an IdError on the host; a GPU takes it for a negative one, and says so
    under PYGGML_CUDA_DEBUG=1 only (not inside loops).
    """
    want_index("ids", ids)
    if a.dtype.name != "i32":
        want_readable("a", a)
    if ids.ne[1:] != (a.ne[2], a.ne[3], 1):
        raise ShapeError(f"ids must be [n_ids, {a.ne[2]}, {a.ne[3]}] beside a, not {list(ids.ne)}")
    result = a.dtype if a.dtype.name == "i32" else dtype_of("f32")
    rank = max(ids.spec.rank + 1, 2 if ids.ne[0] > 1 else 1)
    return Spec.of(result, (a.ne[0], *ids.ne[:3]), rank)


@get_rows.cost
def _(node: Node) -> Cost:
    """The rows that are read, once each at most."""
    a, ids = node["a"], node["ids"]
    rows = node.spec.elements // node.ne[0] * a.dtype.row_bytes(a.ne[0])
    return Cost(0.0, float(min(rows, a.spec.nbytes) + ids.spec.nbytes + node.spec.nbytes))


@get_rows.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if axis == 0:
        return Slice((Cut(0), None)) if node["a"].dtype.block == 1 else None
    if axis == 1:
        return Slice((None, Cut(0)))
    return Slice((Cut(axis), Cut(axis - 1))) if isinstance(axis, int) else None


@op(writes="a", ids=Ids("ids", of="a", axis=1))
def set_rows(a: Node, b: Node, ids: Node) -> Spec:
    """Write rows by id: a[:, ids[i, p % c1, q % c2], p, q] = b[:, i, p, q]; a's new handle.

    a    a state or a view of one, any type that can be encoded  [n, n_rows, ne2, ne3]
    b    f32 or f16, or whole numbers of a's type   [n, n_ids, ne2, ne3]
    ids  i32 or i64   [n_ids, c1, c2]    c1 divides ne2, c2 divides ne3; negative: not written
    Two equal ids leave either row. Conversion as `cast`.
    """
    _want_state("a", a)
    want_type("b", b, FLOATS if a.dtype.kind != "int" else (*FLOATS, a.dtype.name))
    _want_conversion(b, a.dtype)
    want_index("ids", ids, ("i32", "i64"))
    want_ne("b", b, (a.ne[0], b.ne[1], a.ne[2], a.ne[3]), "rows of a's size")
    if ids.ne[0] != b.ne[1] or a.ne[2] % ids.ne[1] or a.ne[3] % ids.ne[2] or ids.ne[3] != 1:
        raise ShapeError(
            f"ids {list(ids.ne)} must be [{b.ne[1]}, c1, c2] with c1 dividing {a.ne[2]} "
            f"and c2 dividing {a.ne[3]}"
        )
    return a.spec


@set_rows.cost
def _(node: Node) -> Cost:
    """The rows that are written, however large the state is."""
    a, b, ids = node["a"], node["b"], node["ids"]
    rows = b.spec.elements // b.ne[0] * a.dtype.row_bytes(a.ne[0])
    return Cost(0.0, float(b.spec.nbytes + ids.spec.nbytes + rows))
