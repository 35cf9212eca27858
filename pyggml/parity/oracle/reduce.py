"""Ops over rows, in float64: sums, softmax, order, norm."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle.base import Array, alibi_slope


def sum_rows(a: Array) -> Array:
    return np.asarray(np.sum(a, axis=3, keepdims=True))


def rms_norm(a: Array, *, eps: float) -> Array:
    return np.asarray(a / np.sqrt(np.mean(a * a, axis=3, keepdims=True) + eps))


def _soft_max_row(s: Array, sink: float | None) -> Array:
    """exp(s) / (sum exp(s) + exp(sink)); all zeros where nothing is alive."""
    top = max(float(np.max(s, initial=-np.inf)), -np.inf if sink is None else sink)
    if top == -np.inf:
        return np.zeros_like(s)
    with np.errstate(invalid="ignore"):
        e = np.exp(s - top)
    return np.asarray(e / (np.sum(e) + (0.0 if sink is None else np.exp(sink - top))))


def soft_max_ext(
    a: Array,
    mask: Array | None = None,
    sinks: Array | None = None,
    *,
    scale: float = 1.0,
    max_bias: float = 0.0,
    head0: int = 0,
    n_head: int | None = None,
) -> Array:
    """Each row: softmax(scale * a + slope_h * mask); mask indices modulo its ne2 and ne3."""
    out = np.empty_like(a)
    heads = a.shape[1] if n_head is None else n_head
    for i3, h, i in np.ndindex(a.shape[:3]):
        s = scale * a[i3, h, i]
        if mask is not None:
            slope = alibi_slope(head0 + h, heads, max_bias)
            with np.errstate(invalid="ignore"):
                s = s + slope * mask[i3 % mask.shape[0], h % mask.shape[1], i]
        out[i3, h, i] = _soft_max_row(s, None if sinks is None else float(sinks[0, 0, 0, h]))
    return out


def soft_max(a: Array) -> Array:
    return soft_max_ext(a)


def argsort(a: Array, *, order: str = "asc") -> Array:
    """Indices that sort each row; equal values keep the order of their indices. NaN, of whatever
    sign, is larger than every number."""
    value, is_nan = {"asc": (a, np.isnan(a)), "desc": (-a, ~np.isnan(a))}[order]
    return np.lexsort((value, is_nan), axis=3).astype(np.int64)


def top_k(a: Array, *, k: int) -> Array:
    return argsort(a, order="desc")[..., :k]


def argmax(a: Array) -> Array:
    """Index of the largest of each row (the first of equals): [ne1, ne2, ne3]."""
    return np.asarray(np.argmax(a, axis=3))[None]
