"""Matrix products, in float64."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle.base import Array


def mul_mat(a: Array, b: Array, *, prec: str = "default", dtype: object = "f32") -> Array:
    """out[i, j, p, q] = sum_k a[k, i, p // r2, q // r3] * b[k, j, p, q]; r = b's size over a's."""
    r3, r2 = b.shape[0] // a.shape[0], b.shape[1] // a.shape[1]
    out = np.empty((*b.shape[:3], a.shape[2]))
    for q, p in np.ndindex(b.shape[:2]):
        out[q, p] = b[q, p] @ a[q // r3, p // r2].T
    return out


def mul_mat_id(experts: Array, b: Array, ids: Array, *, prec: str = "default") -> Array:
    """out[:, e, t] = experts[:, :, ids[e, t]] . b[:, e mod n_b, t]; a negative id gives zeros."""
    n_tokens, n_used = ids.shape[2:]
    out = np.zeros((1, n_tokens, n_used, experts.shape[2]))
    for t, e in np.ndindex(n_tokens, n_used):
        expert = ids[0, 0, t, e]
        if expert >= 0:
            out[0, t, e] = experts[0, expert] @ b[0, t, e % b.shape[2]]
    return out
