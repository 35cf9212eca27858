"""Hyper-connections, in float64."""

from __future__ import annotations

import numpy as np

from pyggml.parity.oracle.base import Array, sigmoid

CASES = """
dsv4_hc_comb(f32[{24|8|3|35},7]{|@inner}, f32[{3|5}], f32[$1], eps=1e-06, n_iter={1|2|20})
dsv4_hc_comb(f32[24,7]{@apart|@step|@weight|@far}, f32[3]{|@apart}, f32[24]{|@apart|@weight}, eps=0.01, n_iter=3)
dsv4_hc_comb(f32[{24|15},{1|70}]{|~wild|~nan5}, f32[3], f32[$1], eps=0.0, n_iter=4)
dsv4_hc_comb(f32[{24|15},6]~mask, f32[3]~above, f32[$1]{|~mask}, eps=0.01, n_iter={1|5})
dsv4_hc_comb(f32[{24|1088},5]~ties, f32[3], f32[$1], eps=1e-06, n_iter=20)
dsv4_hc_maps(f32[{24|8|3|35},7]{|@inner|@apart}, f32[{3|5}], f32[$1], eps={1e-06|0.01}, n_iter={1|20})
dsv4_hc_maps(f32[{24|15},{1|70}]{|~wild|~mask}, f32[3]~above{|@apart}, f32[$1]{|@apart|@weight}, eps=0.01, n_iter=4)
dsv4_hc_maps(f32[1088,3]@far, f32[3], f32[1088], eps=1e-06, n_iter=2)
dsv4_hc_pre(f32[{13|64},{4|1|3},5]{|@inner|@p0213}, f32[$2,5]{|@wide|@apart|@weight})
dsv4_hc_pre(f32[13,4,5]@far, f32[4,5]@far)
dsv4_hc_post(f32[{13|64},5]{|@wide}, f32[$1,{4|1|3|9},5]{|@inner|@p0213}, f32[$3,5]{|@apart}, {-|f32[$3,$3,5]{|@p1023}})
dsv4_hc_post(f32[64,{1|5}], f32[64,4,$1], f32[4,$1], {-|f32[4,4,$1]~nan})
dsv4_hc_post(f32[64,5]@weight, f32[64,4,5]@weight, f32[4,5]@weight, f32[4,4,5]@weight)
dsv4_hc_post(f32[64,5]@apart, f32[64,4,5]@apart, f32[4,5]@apart, f32[4,4,5]@apart)
dsv4_hc_post(f32[64,5]@far, f32[64,4,5]@far, f32[4,5]@far, f32[4,4,5]@far)
"""  # noqa: E501

LARGE = """
dsv4_hc_comb(f32[24,20000], f32[3], f32[24], eps=1e-06, n_iter=3)
dsv4_hc_maps(f32[24,20000], f32[3], f32[24], eps=1e-06, n_iter=3)
dsv4_hc_comb(f32[40400,3], f32[3], f32[40400], eps=1e-06, n_iter=2)
dsv4_hc_pre(f32[4096,4,70], f32[4,70])
dsv4_hc_post(f32[4096,70], f32[4096,4,70]@inner, f32[4,70], f32[4,4,70])
dsv4_hc_post(f32[40000,3], f32[40000,4,3], f32[4,3])
"""


def dsv4_hc_comb(mixes: Array, scale: Array, base: Array, *, eps: float, n_iter: int) -> Array:
    """mixes[(2 + hc) hc, T] -> [hc (targets), hc (sources), T]."""
    tokens, length = mixes.shape[2:]
    hc = next(n for n in range(1, length) if (2 + n) * n == length)
    out = np.empty((1, tokens, hc, hc))
    for t in range(tokens):
        values = scale[0, 0, 0, 2] * mixes[0, 0, t, 2 * hc :] + base[0, 0, 0, 2 * hc :]
        c = values.reshape(hc, hc).T  # [target, source]
        top = np.max(c, axis=0)
        e = np.exp(c - np.where(top == -np.inf, 0.0, top))
        total = np.sum(e, axis=0)
        c = e / np.where(total == 0.0, 1.0, total) + eps
        c = c / (np.sum(c, axis=1, keepdims=True) + eps)
        for _ in range(n_iter - 1):
            c = c / (np.sum(c, axis=0, keepdims=True) + eps)
            c = c / (np.sum(c, axis=1, keepdims=True) + eps)
        out[0, t] = c.T
    return out


def dsv4_hc_maps(mixes: Array, scale: Array, base: Array, *, eps: float, n_iter: int) -> Array:
    """[hc, 2 + hc, T]: pre, post, and the columns of dsv4_hc_comb."""
    comb = dsv4_hc_comb(mixes, scale, base, eps=eps, n_iter=n_iter)
    hc = comb.shape[3]
    values = [
        sigmoid(scale[0, 0, 0, i] * mixes[..., i * hc :][..., :hc] + base[..., i * hc :][..., :hc])
        for i in range(2)
    ]
    pre, post = values[0] + eps, 2.0 * values[1]
    return np.concatenate([pre[0, 0, :, None], post[0, 0, :, None], comb[0]], axis=1)[None]


def dsv4_hc_pre(x: Array, weights: Array) -> Array:
    """x[n, hc, T], weights[hc, T] -> [n, T]."""
    return np.asarray(np.sum(x * weights[0, 0, None, :, :, None], axis=2))[None]


def dsv4_hc_post(x: Array, residual: Array, post: Array, comb: Array | None = None) -> Array:
    """post[d, t] x[:, t] + sum over s of comb[d, s, t] residual[:, s, t]."""
    out = np.empty(residual.shape)
    for t, d in np.ndindex(residual.shape[1:3]):
        out[0, t, d] = post[0, 0, t, d] * x[0, 0, t]
        if comb is None:
            out[0, t, d] += residual[0, t, d]
        else:
            for s in range(residual.shape[2]):
                out[0, t, d] += comb[0, t, s, d] * residual[0, t, s]
    return out
