"""Ops that move values, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyggml.parity.oracle.base import Array, reversed_ne, rows_at, tiled


def reshape(a: Array, *, ne: Sequence[int]) -> Array:
    return a.reshape(reversed_ne(ne))


def view(a: Array, *, ne: Sequence[int], start: Sequence[int], step: Sequence[int]) -> Array:
    """Per dimension `ne` elements from `start`, `step` apart."""
    for dim, (n, first, by) in enumerate(zip(ne, start, step, strict=True)):
        a = np.take(a, first + by * np.arange(n), axis=3 - dim)
    return a


def permute(a: Array, *, axes: Sequence[int]) -> Array:
    """Source dimension i becomes result dimension axes[i]."""
    source_of = [list(axes).index(dim) for dim in range(4)]
    return a.transpose([3 - source_of[dim] for dim in (3, 2, 1, 0)])


def transpose(a: Array) -> Array:
    return a.swapaxes(2, 3)


def cont(a: Array, *, ne: Sequence[int] | None = None) -> Array:
    return a if ne is None else a.reshape(reversed_ne(ne))


def _bf16(a: Array) -> Array:
    """Nearest value of 8 significant bits, ties to even, subnormals as in f32's range."""
    with np.errstate(over="ignore", invalid="ignore"):
        _, exponent = np.frexp(a)
        unit = np.ldexp(1.0, np.maximum(exponent, -125) - 8)
        rounded = np.where(np.isfinite(a), np.rint(a / unit) * unit, a)
        return np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, a), rounded)


def cast(a: Array, *, dtype: object) -> Array:
    """`a` rounded to f32, f16, bf16 or truncated to an integer type.

    Block types are left as they are: what they lose is a bound (tolerance.STORAGE), not a value.
    """
    name = str(dtype)
    if name in ("i32", "i64"):
        return a.astype(np.int64)
    values = a.astype(np.float64)
    with np.errstate(over="ignore"):
        if name == "f16":
            # First to f32, because engines compute the value in f32 before they store it.
            return values.astype(np.float32).astype(np.float16).astype(np.float64)
        if name == "f32":
            return values.astype(np.float32).astype(np.float64)
    return _bf16(values) if name == "bf16" else values


def cpy(a: Array, b: Array) -> Array:
    """a's elements in its order, in b's shape; b's type is unknown here and rounds nothing."""
    return a.reshape(b.shape)


def concat(a: Array, b: Array, *, dim: int) -> Array:
    return np.concatenate([a, b], axis=3 - dim)


def repeat(a: Array, *, ne: Sequence[int]) -> Array:
    return tiled(a, reversed_ne(ne))


def get_rows(a: Array, ids: Array) -> Array:
    """a[n, R, ne2, ne3], ids[r, ne2, ne3] -> [n, r, ne2, ne3]."""
    n3, n2, _, n = a.shape
    out = np.zeros((n3, n2, ids.shape[3], n), a.dtype)
    for i3, i2 in np.ndindex(n3, n2):
        out[i3, i2] = rows_at(a[i3, i2], ids[0, i3, i2])
    return out


def set_rows(a: Array, b: Array, ids: Array) -> Array:
    """a[n, R, ne2, ne3] with b[:, r, i2, i3] at row ids[r, i2 % c1, i3 % c2], if not negative."""
    out = a.copy()
    for i3, i2, r in np.ndindex(b.shape[:3]):
        row = ids[0, i3 % ids.shape[1], i2 % ids.shape[2], r]
        if row >= 0:
            out[i3, i2, row] = b[i3, i2, r]
    return out
