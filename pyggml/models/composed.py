"""Ops of sparse attention, composed from others."""

from __future__ import annotations

from pyggml.node import Node
from pyggml.ops import (
    add,
    cast,
    cont,
    mul_mat,
    permute,
    relu,
    reshape,
)


def lightning_indexer(q: Node, k: Node, weights: Node, mask: Node) -> Node:
    """y[j, t] = sum_n w[n, t] max(0, q[:, n, t] . k[:, j]) + mask[j, t]."""
    d, n_head, n = q.ne[:3]
    n_kv = k.ne[1]
    products = relu(mul_mat(k, reshape(q, ne=(d, n_head * n)), prec="f32"))
    products = cont(permute(reshape(products, ne=(n_kv, n_head, n)), axes=(1, 0, 2)))
    y = mul_mat(products, reshape(weights, ne=(n_head, 1, n)), prec="f32")
    return add(reshape(y, ne=(n_kv, n)), cast(mask, dtype="f32"))
