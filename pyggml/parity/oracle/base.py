"""What the families share: the array type, and the two rules of broadcasting ggml has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


def reversed_ne(ne: Sequence[int]) -> tuple[int, int, int, int]:
    """ggml's `ne` (shorter than 4 is filled with 1) as a 4-D NumPy shape."""
    n0, n1, n2, n3 = (*ne, 1, 1, 1)[:4]
    return n3, n2, n1, n0


def tiled(b: Array, shape: Sequence[int]) -> Array:
    """`b` repeated to `shape`: element i of the result is element i modulo b's size."""
    for axis, size in enumerate(shape):
        b = np.take(b, np.arange(size) % b.shape[axis], axis=axis)
    return b


def alibi_slope(h: int, n_head: int, max_bias: float) -> float:
    """Slope of the mask for head `h` of `n_head`; 1 without ALiBi (max_bias 0)."""
    if max_bias <= 0.0:
        return 1.0
    n2 = 1
    while 2 * n2 <= n_head:
        n2 *= 2
    if h < n2:
        return float(2.0 ** (-max_bias * (h + 1) / n2))
    return float(2.0 ** (-max_bias / 2.0 * (2 * (h - n2) + 1) / n2))


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x); exact far below 0 too, where 1 + tanh(x / 2) cancels."""
    small = np.exp(-np.abs(x))
    return np.where(x >= 0.0, 1.0, small) / (1.0 + small)


def activate(name: str, x: Array) -> Array:
    """silu, relu, or gelu in ggml's tanh form."""
    if name == "silu":
        return np.asarray(x * sigmoid(x))
    if name == "relu":
        return np.where(x > 0.0, x, np.where(np.isnan(x), x, 0.0))
    if name == "gelu":
        inner = np.sqrt(2.0 / np.pi) * x * (1.0 + 0.044715 * x * x)
        return np.asarray(x * sigmoid(2.0 * inner))  # = x / 2 (1 + tanh(inner)), exact in the tail
    raise KeyError(name)


def gate(name: str, x: Array, g: Array, limit: float | None) -> Array:
    """act(x) * g; with a limit, x at most that and g within +- that."""
    if limit is not None:
        x, g = np.minimum(x, limit), np.minimum(np.maximum(g, -limit), limit)
    return np.asarray(activate(name, x) * g)


def rows_at(a: Array, ids: Array) -> Array:
    """Rows a[i, :] for each id; a negative id is a row of zeros, one past the end an IndexError."""
    out = np.zeros((*ids.shape, *a.shape[1:]), a.dtype)
    for at, i in np.ndenumerate(ids):
        if i >= 0:
            out[at] = a[i]
    return out
