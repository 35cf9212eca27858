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
    dsv4_hc_maps,
    dsv4_hc_pre,
    mul,
    mul_mat,
    permute,
    reshape,
    rms_norm,
    scale,
    sigmoid,
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
    and comb from the other H^2 (`dsv4_hc_maps`).
    """
    n = streams.ne[1]
    base, factor = layer[f"hc_{part}_base"], layer[f"hc_{part}_scale"]
    mixes = _mixes(layer[f"hc_{part}_fn"], streams, rms_eps)
    maps = dsv4_hc_maps(mixes, factor, base, eps=eps, n_iter=n_iter)
    rows = (view(maps, ne=(n, 1, streams.ne[2]), start=(0, i)) for i in range(2))
    pre, post = (permute(row, axes=(0, 2, 1, 3)) for row in rows)
    comb = view(maps, ne=(n, n, streams.ne[2]), start=(0, 2))
    return Maps(dsv4_hc_pre(streams, pre), post, comb)


def collapse(w: Weights, streams: Node, *, rms_eps: float, eps: float) -> Node:
    """The streams as one, f32 [n_embd, T], for the head of the model: sum_h pre_h X_h."""
    mixes = _mixes(w["output_hc_fn"], streams, rms_eps)
    pre = sigmoid(add(mul(mixes, w["output_hc_scale"]), w["output_hc_base"]))
    return dsv4_hc_pre(streams, scale(pre, s=1.0, b=eps))


def _mixes(fn: Node, streams: Node, rms_eps: float) -> Node:
    n_embd, n, n_tokens = streams.ne[:3]
    flat = reshape(streams, ne=(n_embd * n, n_tokens))
    return mul_mat(fn, rms_norm(flat, eps=rms_eps), prec="f32")
