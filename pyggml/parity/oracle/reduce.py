"""Ops over rows, in float64: sums, softmax, order, norm."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle.base import Array, alibi_slope

CASES = """
{sum_rows|argmax|argsort}(f32[37,5]@apart)
{norm|rms_norm}(f32[64,5]@apart, eps=1e-06)
sum_rows(f32[{37,5,2|1|1000,3|2,2,2,2}]{|@inner|@p1032})
{norm|rms_norm}(f32[{37,5,2|512,3|8|1,4|9,2,3,2}]{|@inner|@step|@p0213}, eps={1e-06|0.5})
norm(f32[{37,9|64,6|1025,3}]{~level|~large}, eps={1e-06|0.0})
soft_max(f32[{37,5,3|1,2|512}])
soft_max(f32[{5|4},40]~wild)
soft_max_ext(f32[{1|2},50]~large, scale=0.5)
soft_max_ext(f32[6,40]~wild, {-|f16[6,40]~mask}, f32[1], scale=0.7)
soft_max_ext(f32[37,5,3]{|@inner|@p0213|@p1032}, scale={1.0|0.1})
soft_max_ext(f32[19,3,{1|5|6|12},2], {f16|f32}[19,{3|4}]~mask, scale=0.7, max_bias={0.0|8.0})
soft_max_ext(f32[11,4,4,6]@inner, {f16|f32}[11,6,{1|2|4},{1|3}]~mask{|@wide}, max_bias={0.0|4.0})
soft_max_ext(f32[29,3,4], {-|f16[29,3]~mask|f32[29,3,4]~mask}, f32[4], scale=0.5)
soft_max_ext(f32[29,3,4]{|@apart}, {-|f16[29,3]~mask}, f32[4]@apart, scale=0.5)
soft_max_ext(f32[17,3,3], f16[17,3]~mask, f32[3], max_bias=8.0, head0=5, n_head=12)
soft_max_ext(f32[300,70,3,2], f16[300,70]~mask)
argsort(f32[{33,5,2|1|700,3}]{|~ties|@inner}, order={'asc'|'desc'})
argsort(f32[{33,9|5000,2}]~wild{|@step}, order={'asc'|'desc'})
top_k(f32[{64,7|9,2,2}]{|~ties|@wide|~wild}, k={1|6|9})
top_k(f32[{300,5|3000}]{|~ties|~wild}{|@step}, k={65|256|300})
top_k(f32[{20000,3|40000,2|70000}]{|~ties|~wild|~dead1}, k={65|2048|20000})
top_k(f32[20000,5]{~ties|~wild|@inner}, k=2048)
argmax(f32[{33,5,3,2|33,4|7}]{|~ties|@inner|@p1032|~wild})
argmax(f32[{3,50|20000,3}]~wild)
{norm|rms_norm}(f32[64,5]{@weight|~nan5}, eps=1e-06)
soft_max_ext(f32[29,3,4], f16[29,3]~mask{|@weight}, f32[4]@weight{|@step}, scale=0.5)
sum_rows(f32[37,5]@far)
{norm|rms_norm}(f32[37,5]@far, eps=1e-06)
soft_max_ext(f32[29,3,4]@far, f16[29,3,4]~mask@far, scale=0.5)
argsort(f32[33,5]@far)
"""

LARGE = """
sum_rows(f32[512,300]@p1032)
{norm|rms_norm}(f32[40000,5], eps=1e-05)
{norm|rms_norm}(f32[64,20000]@inner, eps=1e-05)
soft_max(f32[40000,5])
soft_max_ext(f32[300,70,8], f16[300,70,2]~mask, f32[8], scale=0.5, max_bias=8.0)
soft_max_ext(f32[5000,70], f32[5000,70]~mask@wide)
argsort(f32[40000,3], order='desc')
argsort(f32[64,3000]@p1032, order='asc')
top_k(f32[40000,3], k=30000)
top_k(f32[256,3000], k={8|100})
top_k(f32[163840{|,5}], k=2048)
argmax(f32[40000,3]@wide)
argmax(f32[64,20000]@p1032)
"""


def sum_rows(a: Array) -> Array:
    return np.asarray(np.sum(a, axis=3, keepdims=True))


def norm(a: Array, *, eps: float) -> Array:
    """A constant row gives 0, even if eps is 0."""
    from_mean = a - np.mean(a, axis=3, keepdims=True)
    from_mean[(a == a[..., :1]).all(axis=3)] = 0.0  # the mean in float64 is rounded too
    spread = np.sqrt(np.mean(from_mean * from_mean, axis=3, keepdims=True) + eps)
    return np.asarray(from_mean / np.where(spread == 0.0, 1.0, spread))


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
