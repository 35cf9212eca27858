"""Checks and slice rules that several families share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, TypeAlias

from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Node
from pyggml.spec import Ne
from pyggml.traits import Axis, Cut, Slice

#: The precision of a product or attention: "f32" allows nothing less than f32.
Precision: TypeAlias = Literal["default", "f32"]

FLOATS = ("f32", "f16")
DECODABLE_FLOATS = ("f32", "f16", "bf16")
AXES = ("ne0", "ne1", "ne2", "ne3")


def want_type(what: str, node: Node, allowed: Iterable[str]) -> None:
    """DTypeError unless `node` has one of the allowed types."""
    allowed = tuple(allowed)
    if node.dtype.name not in allowed:
        raise DTypeError(
            f"{what} has type {node.dtype}; expected {', '.join(allowed)}. Use cast to convert it"
        )


def want_readable(what: str, node: Node) -> None:
    """DTypeError unless `node` has a float or block type."""
    if node.dtype.kind == "int" or node.dtype.name == "f64":
        raise DTypeError(f"{what} has type {node.dtype}; expected a float or block type")


def want_index(what: str, node: Node, allowed: Iterable[str] = ("i32",)) -> None:
    """DTypeError unless `node` has one of the types of ids."""
    want_type(what, node, allowed)


def want_ne(what: str, node: Node, ne: Ne, why: str) -> None:
    """ShapeError unless `node` has exactly these sizes."""
    if node.ne != ne:
        raise ShapeError(f"{what} must be {list(ne)} ({why}), not {list(node.ne)}")


def want_finite(**values: float) -> None:
    """ShapeError if a value is infinite or NaN."""
    for key, value in values.items():
        if not math.isfinite(value):
            raise ShapeError(f"{key}={value} must be finite")


def want_rows(what: str, node: Node) -> None:
    """ShapeError unless the elements of a row are contiguous."""
    if node.ne[0] > 1 and node.nb[0] != node.dtype.nbytes:
        raise ShapeError(f"{what} must have contiguous rows (is it transposed?); use cont or cast")


def repeats_into(b: Ne, a: Ne) -> bool:
    """Whether b repeats into a: every size of a is a multiple of b's."""
    return all(m % n == 0 for m, n in zip(a, b))


def want_repeats(what: str, b: Node, a: Node) -> None:
    """ShapeError unless b repeats into a."""
    if b.spec.ne == a.spec.ne:
        return
    for axis, (n, m) in enumerate(zip(b.ne, a.ne)):
        if m % n:
            raise ShapeError(
                f"{what} does not repeat into a: {what}'s {AXES[axis]}={n} does not divide a's {m}"
            )


def choose(what: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, or a ShapeError if it is not one of `allowed`."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ShapeError(f"{what}={value!r} must be one of {', '.join(allowed)}")
    return value


def modulo_cut(size: int, axis: int, full: int) -> Cut | None:
    """The cut of a source whose `size` along `axis` repeats to `full`; None for all of it."""
    if size == 1:
        return None
    return Cut(axis) if size == full else Cut(axis, mod=size)


def elementwise_slices(node: Node, axis: Axis, n: int) -> Slice | None:
    """The slice rule of elementwise ops: every dimension; repeated sources are cut by modulo."""
    if not isinstance(axis, int):
        return None
    full = node.ne[axis]
    return Slice(tuple(None if s is None else modulo_cut(s.ne[axis], axis, full) for s in node.src))


def outer_slices(node: Node, axis: Axis, n: int) -> Slice | None:
    """The slice rule of row ops: every dimension except 0."""
    return elementwise_slices(node, axis, n) if axis != 0 else None
