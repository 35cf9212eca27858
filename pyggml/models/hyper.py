"""Hyper-connections: a residual of several streams, which each layer mixes (DeepSeek V4).

Where other models compute x + y(x), a part of a layer with hyper-connections does, for the streams
X_h of a token:

    x = sum_h pre_h X_h,   X_d <- post_d y(x) + sum_s comb[d, s] X_s

pre, post and comb depend on the token. The sums of comb over s are 1, and so are those over d, up
to a small epsilon: Sinkhorn's alternating divisions see to that.
T is the number of tokens, H of streams.
"""

from __future__ import annotations

from typing import NamedTuple

from pyggml.models.weights import Layer, Weights
from pyggml.node import Node
from pyggml.ops import (
    add,
    cont,
    div,
    mul,
    mul_mat,
    mul_multi_add,
    repeat,
    reshape,
    rms_norm,
    scale,
    sigmoid,
    soft_max,
    sum_rows,
    transpose,
    view,
)


class Maps(NamedTuple):
    """How the streams and a part of a layer are connected.

    x     f32 [n_embd, T]   what the part gets
    post  f32 [H, T]
    comb  f32 [H, H, T]     [to, from]
    """

    x: Node
    post: Node
    comb: Node


def hyper_tensors(part: str, n_embd: int, n_stream: int) -> dict[str, tuple[int, ...]]:
    """The tensors of `connect`, for "attn" or "ffn"."""
    n = (2 + n_stream) * n_stream
    return {
        f"hc_{part}_fn": (n_stream * n_embd, n),
        f"hc_{part}_base": (n,),
        f"hc_{part}_scale": (3,),
    }


def connect(
    layer: Layer, part: str, streams: Node, *, rms_eps: float, eps: float, n_iter: int
) -> Maps:
    """The maps of a part of a layer for streams, f32 [n_embd, H, T].

    m = fn rms_norm(X), where X are all streams of a token as one vector;
    pre_h = sigmoid(scale_0 m_h + base_h) + eps,   post_h = 2 sigmoid(scale_1 m_(H+h) + base_(H+h)),
    and comb from the other H^2 (`dsv4_hc_comb`).
    """
    n = streams.ne[1]
    base, factor = layer[f"hc_{part}_base"], layer[f"hc_{part}_scale"]
    mixes = _mixes(layer[f"hc_{part}_fn"], streams, rms_eps)
    pre = _weights(mixes, factor, base, 0, n)
    x = dsv4_hc_pre(streams, scale(pre, s=1.0, b=eps))
    post = scale(_weights(mixes, factor, base, 1, n), s=2.0)
    comb = dsv4_hc_comb(mixes, factor, base, eps=eps, n_iter=n_iter)
    return Maps(x, post, comb)


def collapse(w: Weights, streams: Node, *, rms_eps: float, eps: float) -> Node:
    """The streams as one, f32 [n_embd, T], for the head of the model: sum_h pre_h X_h."""
    mixes = _mixes(w["output_hc_fn"], streams, rms_eps)
    pre = _weights(mixes, w["output_hc_scale"], w["output_hc_base"], 0, streams.ne[1])
    return dsv4_hc_pre(streams, scale(pre, s=1.0, b=eps))


def _mixes(fn: Node, streams: Node, rms_eps: float) -> Node:
    n_embd, n, n_tokens = streams.ne[:3]
    flat = reshape(streams, ne=(n_embd * n, n_tokens))
    return mul_mat(fn, rms_norm(flat, eps=rms_eps), prec="f32")


def _weights(mixes: Node, factor: Node, base: Node, number: int, n: int) -> Node:
    """sigmoid(factor m + base) of the `number`-th n of the mixes, f32 [n, T]."""
    m = view(mixes, ne=(n, mixes.ne[1]), start=(number * n,))
    m = mul(m, view(factor, ne=(1,), start=(number,)))
    return sigmoid(add(m, view(base, ne=(n,), start=(number * n,))))


# -- composed forms -----------------------------------------------------------------------------


def dsv4_hc_comb(mixes: Node, scale: Node, base: Node, *, eps: float, n_iter: int) -> Node:
    """f32 [H, H, T], [to, from]: Sinkhorn of scale_2 m + base, where m are mixes[2 H ..].

    C = softmax over d of each s, plus eps;   C[d, :] /= sum_s C[d, s] + eps;
    n_iter - 1 times more: C[:, s] /= sum_d C[d, s] + eps, and then the first division again.
    """
    size, n_tokens = mixes.ne[:2]
    n = round((1 + size) ** 0.5) - 1  # size = n^2 + 2 n
    m = view(mixes, ne=(n * n, n_tokens), start=(2 * n,))
    m = mul(m, view(scale, ne=(1,), start=(2,)))
    m = add(m, view(base, ne=(n * n,), start=(2 * n,)))
    comb = _plus(soft_max(reshape(m, ne=(n, n, n_tokens))), eps)
    for i in range(n_iter):
        if i:
            comb = _normal(comb, eps)
        comb = cont(transpose(_normal(cont(transpose(comb)), eps)))
    return comb


def _normal(a: Node, eps: float) -> Node:
    """Rows divided by their sum."""
    return div(a, _plus(sum_rows(a), eps))


def _plus(a: Node, b: float) -> Node:
    return scale(a, s=1.0, b=b)


def dsv4_hc_pre(x: Node, weights: Node) -> Node:
    """sum_h weights[h, t] x[:, h, t], f32 [n, T]."""
    n, n_tokens = weights.ne[:2]
    return mul_multi_add(x, reshape(weights, ne=(1, n, n_tokens)))


def dsv4_hc_post(x: Node, residual: Node, post: Node, comb: Node) -> Node:
    """post[d, t] x[:, t] + sum_s comb[d, s, t] residual[:, s, t], f32 [n, H, T]."""
    n, n_stream, n_tokens = residual.ne[:3]
    mixed = mul_mat(cont(transpose(residual)), cont(transpose(comb)), prec="f32")
    wide = repeat(reshape(x, ne=(n, 1, n_tokens)), ne=(n, n_stream, n_tokens))
    return add(mul(wide, reshape(post, ne=(1, n_stream, n_tokens))), mixed)
