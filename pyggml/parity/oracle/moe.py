"""Fused ops of mixture-of-experts layers, in float64."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle.base import Array, activate
from pyggml.parity.oracle.linear import mul_mat, mul_mat_id


def moe_up_gate(
    up: Array, gate: Array, b: Array, ids: Array, *, act: str = "silu", prec: str = "default"
) -> Array:
    return activate(act, mul_mat_id(gate, b, ids)) * mul_mat_id(up, b, ids)


def fused_up_gate(
    up: Array, gate: Array, b: Array, *, act: str = "silu", prec: str = "default"
) -> Array:
    return activate(act, mul_mat(gate, b)) * mul_mat(up, b)


def grouped_topk(a: Array, *, n_group: int, n_group_used: int, n_top: int, k: int) -> Array:
    """The k best experts of each token, from the n_group_used groups with the largest sums of their
    n_top best. NaN is larger than every number."""

    def falling(x: float) -> tuple[bool, float]:
        return not np.isnan(x), -x

    n_tokens, n_expert = a.shape[2:]
    size = n_expert // n_group
    out = np.empty((1, 1, n_tokens, k), np.int64)
    for t in range(n_tokens):
        groups = a[0, 0, t].reshape(n_group, size)
        with np.errstate(invalid="ignore"):
            scores = [sum(sorted(group, key=falling)[:n_top]) for group in groups]
        best = sorted(range(n_group), key=lambda g: falling(scores[g]))[:n_group_used]
        experts = [g * size + j for g in sorted(best) for j in range(size)]
        out[0, 0, t] = sorted(experts, key=lambda e: falling(a[0, 0, t, e]))[:k]
    return out


def multi_add(a: Array) -> Array:
    """a[n, u, T] -> [n, T], summed over u."""
    return np.asarray(np.sum(a, axis=2))[None]


def mul_multi_add(a: Array, b: Array) -> Array:
    """a[n, u, T], b[1, u, T] -> [n, T]: the sum over u of a * b."""
    return np.asarray(np.sum(a * b, axis=2))[None]
