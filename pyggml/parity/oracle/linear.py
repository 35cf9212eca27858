"""Matrix products, in float64."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle.base import Array

CASES = """
mul_mat({PLAIN|BLOCKS}[256,{16|1|7}], f32[256,{5|1}])
mul_mat({PLAIN}[77,6], {PLAIN}[77,3], dtype={'f32'|'f16'})
mul_mat({PLAIN}[64,7,2,3]{|@inner|@p0213|@p1032|@p3210}, f32[64,5,4,3]{|@inner|@p0213})
mul_mat(f32[33,5]{|@p1032}, {PLAIN}[33,4,3]{|@p1032|@p2013|@step})
mul_mat({f32|q8_0|q4_K}[256,3,2,2]{|@wide|@p0213}, f32[256,1,{2|6|12},{2|4}])
mul_mat({BLOCKS}[256,3,2,2], f32[256,2,4,4])
mul_mat(f32[1,1], f32[1,1])
mul_mat({f32|f16}[64,7]@apart, f32[64,{1|5|20}]@apart)
mul_mat_id({f32|q8_0}[64,9,4], f32[64,2,3]@apart, i32[2,3]<4-@apart)
mul_mat({f32|q8_0}[64,1,1], f32[64,3,5], prec='f32')
mul_mat(f16[40,300,1]{|@p1032}, f32[40,9,{1|16}])
mul_mat_id({f32|f16|bf16|q8_0|q4_K}[256,12,8], {f32|f16}[256,{1|2|6},5]{|@inner}, i32[6,5]<8-{|@wide})
mul_mat_id({f32|q4_0}[64,9,4]{|@inner}, f32[64,3,1], i32[3,1]<4)
mul_mat_id(f32[64,9,4], f32[64,1,70], i32[2,70]<4-)
mul_mat_id({f32|bf16|q8_0|q4_K}[256,12,8], {f32|f16}[256,1,{5|40}], i32[2,$3]<8-, prec='f32')
mul_mat({PLAIN|BLOCKS}[256,{16|7}]@weight{|@inner}, f32[256,{5|1}])
mul_mat({f32|f16|q8_0|q4_K}[256,6,2,3]@weight{@wide|@step|@p0213|@p0321}, {f32|f16}[256,3,4,3])
mul_mat({PLAIN}[77,6,2]@weight{|@p1032|@p2013}, {PLAIN}[77,3,2]{|@weight})
mul_mat(q8_0[64,16]@weight{|@wide}, f32[64,9], {dtype='f16'|prec='f32'})
mul_mat_id({f32|f16|bf16|q8_0|q4_K|iq4_xs}[256,12,4]@weight{|@inner|@p0213}, f32[256,{1|2},5], i32[2,5]<4-)
mul_mat_id({f16|q8_0|iq4_xs}[256,12,4]@weight, f32[256,{1|2},40], i32[2,40]<4-, prec='f32')
mul_mat({PLAIN|q8_0|q4_K}[256,7]@far, f32[256,{1]|5]|5]@far})
mul_mat({f32|q8_0}[256,7,3]@far, f32[256,2,3]@far)
mul_mat_id({f32|q8_0}[256,12,4]@far, f32[256,1,5]@far, i32[2,5]<4-)
"""  # noqa: E501

LARGE = """
mul_mat(q4_K[1024,600], f32[1024,100])
mul_mat(f16[1024,600]@p1032, f32[1024,100]@p1032, dtype='f16')
mul_mat(f32[1024,600], f32[1024,100])
mul_mat(bf16[128,300,2], f16[128,40,16]@p0213)
mul_mat(f32[512,600], f32[512,1])
mul_mat(f32[64,600,2]@p0213, f32[64,300,4]@inner)
mul_mat_id(q8_0[512,300,8], f32[512,1,300], i32[6,300]<8-)
mul_mat_id(f32[512,300,8]@p0213, f16[512,6,100]@inner, i32[6,100]<8)
"""


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
