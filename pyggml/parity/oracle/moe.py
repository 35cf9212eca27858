"""Fused ops of mixture-of-experts layers, in float64."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle.base import Array
from pyggml.parity.oracle.base import gate as _gate
from pyggml.parity.oracle.linear import mul_mat, mul_mat_id

CASES = """
moe_up_gate({f32|f16|q8_0|q4_K}[256,10,5]{|@inner}, $1[256,10,5], {f32|f16}[256,{1|3},7], i32[3,7]<5-, act={'silu'|'gelu'|'relu'})
fused_up_gate({f32|bf16|q8_0|q4_K}[256,11]{|@wide}, $1[256,11], {f32|f16}[256,5,2]{|@p0213}, act={'silu'|'gelu'|'relu'})
moe_up_gate({f16|q8_0|q4_K}[256,10,5], {f16|q8_0}[256,10,5], f32[256,3,{7|30}], i32[3,$3]<5-, act='gelu', prec='f32')
fused_up_gate({bf16|q8_0|q4_K}[256,11], $1[256,11], f32[256,{1|5|20}], act='gelu', prec='f32')
moe_up_gate({f32|f16|q8_0|q4_K|mxfp4}[256,10,5]{|@weight}, $1[256,10,5]$2, f32[256,{1|3},{7|30}], i32[3,$4]<5-, limit=5.0)
moe_up_gate({q8_0|f32}[256,10,5], {q8_0|f16}[256,10,5], f32[256,1,7], i32[3,7]<5-, act={'gelu'|'relu'}, limit=5.0)
fused_up_gate({f32|bf16|q8_0|q4_K}[256,11]{|@weight}, $1[256,11]$2, f32[256,{1|5|20}], limit=5.0)
fused_up_gate({q4_K|f16}[256,11], {q8_0|f16}[256,11], f32[256,5], act={'gelu'|'relu'}, limit=5.0, prec='f32')
grouped_topk(f32[{160,7|16,3|16}]{|@wide}, n_group={1|2|8}, n_group_used=1, n_top={1|2}, k=2)
grouped_topk(f32[64,{5|1}], n_group=8, n_group_used=4, n_top={1|2|8}, k=8)
grouped_topk(f32[40,30]~wild, n_group=8, n_group_used=3, n_top={1|2|5}, k=6)
multi_add(f32[{13,6,5|1,1,1|700,3,2}]{|@inner|@p0213})
mul_multi_add(f32[13,6,5]{|@inner|@p0213}, f32[1,6,5]{|@step|@apart})
moe_up_gate({f32|f16|q8_0|q4_K}[256,10,5]@weight{|@inner}, $1[256,10,5]{|@weight|@weight@wide}, f32[256,3,7], i32[3,7]<5-)
moe_up_gate(q8_0[256,10,5]@weight, q8_0[256,10,5]=0+0, f32[256,1,7], i32[3,7]<5-)
fused_up_gate({f32|bf16|q8_0|q4_K}[256,11]@weight{|@wide}, {f32|q4_K}[256,11]@weight{|@step}, f32[256,5])
moe_up_gate({bf16|q8_0|q4_K}[256,10,5]@weight, $1[256,10,5]@weight, f32[256,1,{7|30}], i32[3,$2]<5-, prec='f32')
fused_up_gate({f32|q8_0|q4_K}[256,11]@weight, $1[256,11]@weight, f32[256,{1|5|20}], prec='f32')
mul_multi_add(f32[13,6,5], f32[1,6,5]@weight)
moe_up_gate({f32|q8_0}[256,10,5]@far, $1[256,10,5]@far, f32[256,1,7]@far, i32[3,7]<5-)
fused_up_gate(q8_0[256,11]@far, q8_0[256,11]@far, f32[256,5]@far)
multi_add(f32[13,6,5]@far)
mul_multi_add(f32[13,6,5]@far, f32[1,6,5]@far)
"""  # noqa: E501

LARGE = """
moe_up_gate(q4_K[512,300,8], q4_K[512,300,8], f32[512,1,300], i32[6,300]<8, act='gelu')
moe_up_gate(f32[512,300,8], f32[512,300,8], f32[512,1,300], i32[6,300]<8-)
fused_up_gate(q8_0[512,300], q8_0[512,300], f32[512,200])
fused_up_gate(f32[512,300], f16[512,300], f16[512,200])
fused_up_gate(q8_0[512,300], q8_0[512,300], f32[512,200], limit=9.0)
moe_up_gate(q8_0[512,300,8], q8_0[512,300,8], f32[512,1,300], i32[6,300]<8-, limit=9.0)
grouped_topk(f32[256,3000], n_group=8, n_group_used=4, n_top=2, k=8)
multi_add(f32[2000,8,50])
mul_multi_add(f32[2000,8,50], f32[1,8,50])
"""


def moe_up_gate(
    up: Array,
    gate: Array,
    b: Array,
    ids: Array,
    *,
    act: str = "silu",
    prec: str = "default",
    limit: float | None = None,
) -> Array:
    return _gate(act, mul_mat_id(gate, b, ids), mul_mat_id(up, b, ids), limit)


def fused_up_gate(
    up: Array,
    gate: Array,
    b: Array,
    *,
    act: str = "silu",
    prec: str = "default",
    limit: float | None = None,
) -> Array:
    return _gate(act, mul_mat(gate, b), mul_mat(up, b), limit)


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
