"""Element by element, in float64; `b` repeats into `a`."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle import base
from pyggml.parity.oracle.base import Array, activate, rows_at, tiled


def add(a: Array, b: Array) -> Array:
    return np.add(a, tiled(b, a.shape))


def sub(a: Array, b: Array) -> Array:
    return np.subtract(a, tiled(b, a.shape))


def mul(a: Array, b: Array) -> Array:
    return np.multiply(a, tiled(b, a.shape))


def div(a: Array, b: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.divide(a, tiled(b, a.shape))


def add_id(a: Array, b: Array, ids: Array) -> Array:
    """a[n, u, T] + b[n, ids[u, T]]."""
    return a + rows_at(b[0, 0], ids[0, 0])


def scale(a: Array, *, s: float, b: float = 0.0) -> Array:
    return a * s + b


def exp(a: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.exp(a)


def log(a: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(a)


def relu(a: Array) -> Array:
    return activate("relu", a)


def gelu(a: Array) -> Array:
    return activate("gelu", a)


def silu(a: Array) -> Array:
    return activate("silu", a)


def sigmoid(a: Array) -> Array:
    return base.sigmoid(a)


def tanh(a: Array) -> Array:
    return np.tanh(a)


def sqr(a: Array) -> Array:
    return a * a


def sqrt(a: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.sqrt(a)


def clamp(a: Array, *, min: float, max: float) -> Array:
    return np.minimum(np.maximum(a, min), max)


def fill(a: Array, *, value: float) -> Array:
    return np.full(a.shape, value)


def glu(a: Array, b: Array | None = None, *, act: str = "silu", swapped: bool = False) -> Array:
    """act(first) * second: a and b, or the halves of a's rows; `swapped` exchanges the two."""
    if b is None:
        half = a.shape[3] // 2
        a, b = a[..., :half], a[..., half:]
    if swapped:
        a, b = b, a
    return activate(act, a) * b
