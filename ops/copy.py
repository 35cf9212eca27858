"""Copies, conversions, gathers and scatters."""

from __future__ import annotations

from typing import Any

from pyggml.dtypes import DType, DTypeLike
from pyggml.dtypes import dtype as dtype_of
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Node
from pyggml.operation import op
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
from pyggml.ops.views import reshape, resized
from pyggml.quants import ENCODABLE
from pyggml.spec import Ne, Spec
from pyggml.traits import Axis, Cost, Cut, Ids, Slice

__all__ = ["cast", "concat", "cont", "cpy", "get_rows", "repeat", "set_rows"]


@op(slices=elementwise_slices, linear=("a",))
def cont(a: Node) -> Spec:
    """A contiguous copy of a: same type, same sizes."""
    return a.spec


def flat(a: Node, *ne: int) -> Node:
    """The elements of `a` with other sizes; a copy if its strides need one."""
    return reshape(a if a.contiguous else cont(a), ne=ne)


def _want_conversion(a: Node, to: DType) -> None:
    """DTypeError unless a's type converts to `to`.

    Equal types, floats and block types to each other, and i32 and i64 to and from f32.
    """
    if a.dtype == to or {a.dtype.name, to.name} <= {"i32", "i64", "f32"}:
        return
    want_readable("a", a)
    if to.kind == "int" or (to.name != "f32" and to.name not in ENCODABLE):
        raise DTypeError(
            f"a has type {a.dtype}, which does not convert to {to}; "
            f"expected f32 or one of {', '.join(sorted(ENCODABLE))}"
        )


@op
def cast(a: Node, *, dtype: DTypeLike) -> Spec | tuple[Spec, dict[str, Any]]:
    """A contiguous copy of a in another type.

    f32, f16, bf16 and block types convert to each other; i32 and i64 to and from f32.
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
        raise ShapeError(f"{what} must be a state or a view of one; no other tensor can be written")


@op(writes="b")
def cpy(a: Node, b: Node) -> Spec:
    """Write a into b, a state or a view of one. The result is b's new handle.

    Elements are read in a's order and written in b's, and converted to b's type. The two must have
    the same number of elements.
    """
    _want_state("b", b)
    _want_conversion(a, b.dtype)
    if a.spec.elements != b.spec.elements:
        raise ShapeError(
            f"a and b must have equally many elements: a has {a.spec.elements}, "
            f"b has {b.spec.elements}"
        )
    if a.ne[0] != b.ne[0] and max(a.dtype.block, b.dtype.block) > 1:
        raise ShapeError(
            f"rows of block types are copied whole: a.ne[0]={a.ne[0]} and b.ne[0]={b.ne[0]} "
            "must be equal"
        )
    return b.spec


@cpy.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    if not isinstance(axis, int) or node["a"].ne != node.ne:
        return None
    if axis == 0 and max(node.dtype.block, node["a"].dtype.block) > 1:
        return None
    return Slice((Cut(axis), Cut(axis)))


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
        raise ShapeError(f"dim={dim} must be 0, 1, 2 or 3")
    if a.dtype != b.dtype:
        raise DTypeError(f"a has type {a.dtype} and b has type {b.dtype}; cast one of them")
    want_ne("b", b, resized(a.ne, dim, b.ne[dim]), f"a's sizes except {AXES[dim]}")
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
    """a tiled to `ne`. Each size must be a multiple of a's.   No block types."""
    want_type("a", a, ("f32", "f16", "bf16", "i32", "i64"))
    spec = Spec.of(a.dtype, ne)
    for axis, (n, m) in enumerate(zip(a.ne, spec.ne)):
        if m % n:
            raise ShapeError(f"a's {AXES[axis]}={n} does not divide {m}")
    return spec, {"ne": spec.ne}


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
    Errors: IdError on the host for an id >= n_rows. A GPU treats such an id as negative; with
    PYGGML_CUDA_DEBUG=1 it raises the IdError too, except inside loops.
    """
    want_index("ids", ids)
    if a.dtype.name != "i32":
        want_readable("a", a)
    if ids.ne[1:] != (a.ne[2], a.ne[3], 1):
        raise ShapeError(
            f"ids must be [n_ids, {a.ne[2]}, {a.ne[3]}] to match a, not {list(ids.ne)}"
        )
    result = a.dtype if a.dtype.name == "i32" else dtype_of("f32")
    rank = max(ids.spec.rank + 1, 2 if ids.ne[0] > 1 else 1)
    return Spec.of(result, (a.ne[0], *ids.ne[:3]), rank)


@get_rows.cost
def _(node: Node) -> Cost:
    """Bytes of the rows that are read, each counted once."""
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
    """Write rows by id: a[:, ids[i, p % c1, q % c2], p, q] = b[:, i, p, q].

    a    a state or a view of one, any type that can be encoded  [n, n_rows, ne2, ne3]
    b    f32 or f16, or whole numbers of a's type   [n, n_ids, ne2, ne3]
    ids  i32 or i64   [n_ids, c1, c2]    c1 divides ne2, c2 divides ne3; negative: not written
    The result is a's new handle. Types are converted as by `cast`. Where two ids are equal, either
    of the two rows may end up in a.
    """
    _want_state("a", a)
    want_type("b", b, FLOATS if a.dtype.kind != "int" else (*FLOATS, a.dtype.name))
    _want_conversion(b, a.dtype)
    want_index("ids", ids, ("i32", "i64"))
    want_ne("b", b, (a.ne[0], b.ne[1], a.ne[2], a.ne[3]), "rows as long as a's")
    if ids.ne[0] != b.ne[1] or a.ne[2] % ids.ne[1] or a.ne[3] % ids.ne[2] or ids.ne[3] != 1:
        raise ShapeError(
            f"ids {list(ids.ne)} must be [{b.ne[1]}, c1, c2] with c1 dividing {a.ne[2]} "
            f"and c2 dividing {a.ne[3]}"
        )
    return a.spec


@set_rows.cost
def _(node: Node) -> Cost:
    """Bytes of the rows that are written, not of the whole state."""
    a, b, ids = node["a"], node["b"], node["ids"]
    rows = b.spec.elements // b.ne[0] * a.dtype.row_bytes(a.ne[0])
    return Cost(0.0, float(b.spec.nbytes + ids.spec.nbytes + rows))


@set_rows.slices
def _(node: Node, axis: Axis, n: int) -> Slice | None:
    """Elements and matrices are written independently."""
    if axis == 0:
        return Slice((Cut(0), Cut(0), None)) if node.dtype.block == 1 else None
    if axis not in (2, 3):
        return None
    assert isinstance(axis, int)
    ids = node["ids"]
    cut = modulo_cut(ids.ne[axis - 1], axis - 1, node.ne[axis])
    return Slice((Cut(axis), Cut(axis), cut))
