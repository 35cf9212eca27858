"""Checks and slice rules that several families share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, TypeAlias

from pyggml.errors import DTypeError, ShapeError
from pyggml.node import Axis, Cut, Ne, Node, Slice

#: How exactly a product or attention computes: "f32" allows nothing less than f32.
Precision: TypeAlias = Literal["default", "f32"]

FLOATS = ("f32", "f16")
DECODABLE_FLOATS = ("f32", "f16", "bf16")
AXES = ("ne0", "ne1", "ne2", "ne3")


def want_type(what: str, node: Node, allowed: Iterable[str]) -> None:
    """DTypeError unless `node` has one of the allowed types."""
    allowed = tuple(allowed)
    if node.dtype.name not in allowed:
        raise DTypeError(
            f"{what} has type {node.dtype}; it takes {', '.join(allowed)}. cast(...) changes a type"
        )


def want_readable(what: str, node: Node) -> None:
    """DTypeError unless the values of `node` can be read as floats (integers cannot)."""
    if node.dtype.kind == "int" or node.dtype.name == "f64":
        raise DTypeError(f"{what} has type {node.dtype}; it takes float and block types")


def want_index(what: str, node: Node, allowed: Iterable[str] = ("i32",)) -> None:
    """DTypeError unless `node` holds ids."""
    want_type(what, node, allowed)


def want_ne(what: str, node: Node, ne: Ne, why: str) -> None:
    """ShapeError unless `node` has exactly these sizes."""
    if node.ne != ne:
        raise ShapeError(f"{what} must be {list(ne)} ({why}), not {list(node.ne)}")


def want_finite(**values: float) -> None:
    """ShapeError where a number is infinite."""
    for key, value in values.items():
        if not math.isfinite(value):
            raise ShapeError(f"{key}={value} is not finite")


def want_rows(what: str, node: Node) -> None:
    """ShapeError unless elements of a row lie side by side."""
    if node.ne[0] > 1 and node.nb[0] != node.dtype.nbytes:
        raise ShapeError(f"the rows of {what} are not contiguous (transposed); use cont or cast")


def repeats_into(b: Ne, a: Ne) -> bool:
    """Whether b tiles a: every size of `a` is a multiple of b's."""
    return all(m % n == 0 for m, n in zip(a, b))


def want_repeats(what: str, b: Node, a: Node) -> None:
    """ShapeError unless b repeats into a."""
    for axis, (n, m) in enumerate(zip(b.ne, a.ne)):
        if m % n:
            raise ShapeError(
                f"{what} does not repeat into a: its {AXES[axis]}={n} does not divide {m}"
            )


def choose(what: str, value: str, allowed: Iterable[str]) -> str:
    """ShapeError unless `value` is one of the allowed words."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ShapeError(f"{what}={value!r} is unknown; it is one of {', '.join(allowed)}")
    return value


def modulo_cut(size: int, axis: int, full: int) -> Cut | None:
    """The cut of a source that repeats along `axis` to `full`."""
    if size == 1:
        return None
    return Cut(axis) if size == full else Cut(axis, mod=size)


def elementwise_slices(node: Node, axis: Axis, n: int) -> Slice | None:
    """Every dimension can be cut; sources that repeat are cut by modulo."""
    if not isinstance(axis, int):
        return None
    full = node.ne[axis]
    return Slice(tuple(None if s is None else modulo_cut(s.ne[axis], axis, full) for s in node.src))


def outer_slices(node: Node, axis: Axis, n: int) -> Slice | None:
    """Rows are independent: every dimension but 0 can be cut."""
    return elementwise_slices(node, axis, n) if axis != 0 else None
