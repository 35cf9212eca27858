"""The indexer of sparse attention, in float64: head by head, hidden rows last."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle.base import Array

CASES = """
lightning_indexer(f32[40,{1|11},{1|3}]{|@inner|@p0213}, {PLAIN}[40,23], f32[$1,$2])
lightning_indexer(f32[64,5,3], {PLAIN}[64,70]@wide, f32[5,3]@inner)
lightning_indexer(f32[64,5,3], {LEGACY}[64,{23|70}], f32[5,3], f16[$2,3]~causal)
lightning_indexer(f32[32,7,4,6]@p0213, {f32|f16|q8_0}[32,70,1,6]@wide, f32[7,4,1,6]@inner, f16[70,{4|6},1,{1|2|6}]~mask@wide)
lightning_indexer(f32[64,8,3,4], {f32|f16|bf16|q8_0}[64,37,1,4]~holed, f32[8,3,1,4], f16[37,3]~hide5)
lightning_indexer(f32[64,8,3], {f32|f16|q8_0}[64,{37|300}]~past18, f32[8,3], {-|f16[$2,3]~mask}, i32[1]#18{|@apart})
lightning_indexer(f32[32,3,2], f32[32,9], f32[3,2]@apart, -, i32[1]#{0|1|9|20})
lightning_indexer(f32[32,3,3], {f32|f16}[32,{30|31}]~nan5, f32[3,3], f16[$2,3]~mask)
lightning_indexer(f32[128,64,1], {f32|f16|q8_0}[128,{700|1025}], f32[64], {-|f16[$2,1]~mask}, {-|i32[1]#650})
lightning_indexer(f32[128,{32|128},{1|3},2]{|@p0213}, {f16|bf16|q8_0}[128,{70|513},1,2]@wide, f32[$1,$2,1,2], f16[$5,$2]~causal)
lightning_indexer(f32[128,64,5], {f16|bf16|q8_0}[128,{1|400}], f32[64,5]@inner)
lightning_indexer(f32[1,2,2], f32[1,1], f32[2,2], f16[1,2]~mask)
lightning_indexer(f32[64,{6|1},70], f16[64,300], f32[$1,70], f16[300,70]~causal)
lightning_indexer(f32[64,5,3], {f32|f16|q8_0}[64,23]@weight, f32[5,3]@weight, f16[23,3]~mask)
lightning_indexer(f32[64,5,3]@far, {f32|f16|q8_0}[64,17]@far, f32[5,3]@far, f16[17,3]~mask@far)
"""  # noqa: E501

LARGE = """
lightning_indexer(f32[128,64,1], {f32|f16|q8_0}[128,9000], f32[64,1], -, i32[1]#8000)
lightning_indexer(f32[128,16,100]@p0213, q8_0[128,700], f32[16,100], f16[700,100]~mask)
lightning_indexer(f32[64,8,70,2], f16[64,2000,1,2]@wide, f32[8,70,1,2], f16[2000,70]~mask)
"""


def lightning_indexer(
    q: Array,
    k: Array,
    weights: Array,
    mask: Array | None = None,
    kv_len: Array | None = None,
) -> Array:
    """q[d, H, T, n3], k[d, n_kv, 1, n3], weights[H, T, 1, n3] -> [n_kv, T, 1, n3]."""
    n3, n_tokens, heads, _ = q.shape
    n_kv = k.shape[2]
    out = np.zeros((n3, 1, n_tokens, n_kv))
    for i3, t, h in np.ndindex(n3, n_tokens, heads):
        products = k[i3, 0] @ q[i3, t, h]
        out[i3, 0, t] += weights[i3, 0, t, h] * np.where(products < 0, 0.0, products)
    for i3, t in np.ndindex(n3, n_tokens):
        row = out[i3, 0, t]
        if mask is not None:
            bias = mask[i3 % mask.shape[0], 0, t]
            row[:] = np.where(bias == -np.inf, -np.inf, row + bias)
        if kv_len is not None:
            row[max(0, kv_len.item()) :] = -np.inf
    return out
