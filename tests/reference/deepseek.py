"""One DeepSeek attention layer in float64, the reference for graphs and cache types."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pyggml.parity.oracle.base import Array
from pyggml.parity.oracle.reduce import rms_norm
from pyggml.parity.oracle.rope import rope_ext


def project(weights: Mapping[str, Array], name: str, x: Array) -> Array:
    """x W^T, times the weight's factor if it has one."""
    return np.asarray(x @ np.asarray(weights[f"{name}.weight"], np.float64).T) * factor(
        weights, name
    )


def factor(weights: Mapping[str, Array], name: str) -> Array:
    return np.asarray(weights.get(f"{name}.scale", 1.0), np.float64)


def normed_by(weights: Mapping[str, Array], name: str, x: Array, eps: float) -> Array:
    """rms_norm(x) * weight."""
    return np.asarray(rms_norm(x[None, None], eps=eps)[0, 0] * weights[f"{name}.weight"])


def _expansion(weights: Mapping[str, Array], n_head: int, qk_nope: int) -> tuple[Array, Array]:
    """(K part [H, qk_nope, kv_lora], V part [H, v_dim, kv_lora]) from either layout."""
    if "attn_kv_b.weight" in weights:
        kv_b = np.asarray(weights["attn_kv_b.weight"], np.float64) * factor(weights, "attn_kv_b")
        kv_b = kv_b.reshape(n_head, -1, kv_b.shape[-1])
        return kv_b[:, :qk_nope], kv_b[:, qk_nope:]
    k_b, v_b = (
        np.asarray(weights[f"{name}.weight"], np.float64) * factor(weights, name)
        for name in ("attn_k_b", "attn_v_b")
    )
    return k_b.swapaxes(1, 2), v_b


def attention_f64(
    weights: Mapping[str, Array],
    x: Array,
    positions: Array,
    *,
    n_head: int,
    qk_nope: int,
    qk_rope: int,
    v_dim: int,
    kv_lora: int,
    eps: float = 1e-6,
    kq_scale: float | None = None,
    freq_base: float = 10000.0,
    freq_scale: float = 1.0,
    ext_factor: float = 0.0,
    attn_factor: float = 1.0,
    n_ctx_orig: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    temperature_scale: float = 0.0,
    temperature_length: int = 0,
) -> Array:
    """Causal multi-head latent attention over all tokens, in its standard (expanded) form.

        q = W_q x                 or W_qb norm(W_qa x)             per head [nope | rope]
        [c | k_rope] = W_kva x;   c = norm(c)                      one for all heads
        [k_nope | v] = W_kvb c                                     per head
        q times 1 + temperature_scale ln(1 + floor(position / temperature_length))
        out = W_o concat_h softmax(kq_scale q_h . k_h + causal) v_h
        each W is multiplied by its factor, the weight NAME.scale, if there is one

    weights    GGUF names within a layer, NumPy shape (rows are outputs): attn_q, or attn_q_a,
               attn_q_a_norm and attn_q_b; attn_kv_a_mqa, attn_kv_a_norm; attn_kv_b
               [H (qk_nope + v_dim), kv_lora], or attn_k_b [H, kv_lora, qk_nope] and attn_v_b
               [H, v_dim, kv_lora]; attn_output; each with ".weight"
    x          [n_tokens, n_embd], already normalized (attn_norm is not applied)
    positions  [n_tokens], ascending
    kq_scale   by default 1 / sqrt(qk_nope + qk_rope); YaRN models multiply it by mscale^2
    freq_base  and the following are rope_ext's, for neighbouring pairs (2i, 2i + 1)

    Returns [n_tokens, n_embd] in float64.
    """
    x = np.asarray(x, np.float64)
    n_tokens = x.shape[0]

    def rotated(a: Array) -> Array:  # [n_tokens, heads, qk_rope]
        result: Array = rope_ext(
            a[None],
            np.asarray(positions),
            n_dims=qk_rope,
            n_ctx_orig=n_ctx_orig,
            freq_base=freq_base,
            freq_scale=freq_scale,
            ext_factor=ext_factor,
            attn_factor=attn_factor,
            beta_fast=beta_fast,
            beta_slow=beta_slow,
        )[0]
        return result

    if "attn_q.weight" in weights:
        q = project(weights, "attn_q", x)
    else:
        latent = normed_by(weights, "attn_q_a_norm", project(weights, "attn_q_a", x), eps)
        q = project(weights, "attn_q_b", latent)
    q = q.reshape(n_tokens, n_head, qk_nope + qk_rope)
    kv_a = project(weights, "attn_kv_a_mqa", x)
    c = normed_by(weights, "attn_kv_a_norm", kv_a[:, :kv_lora], eps)
    q_rope = rotated(q[..., qk_nope:])
    k_rope = rotated(kv_a[:, None, kv_lora:])[:, 0]  # [n_tokens, qk_rope], shared by the heads
    k_part, v_part = _expansion(weights, n_head, qk_nope)

    scale = np.full(
        (n_tokens, 1), 1 / math.sqrt(qk_nope + qk_rope) if kq_scale is None else kq_scale
    )
    if temperature_scale:
        periods = np.asarray(positions) // temperature_length
        scale *= 1 + temperature_scale * np.log(1 + periods[:, None])
    future = np.triu(np.full((n_tokens, n_tokens), -np.inf), 1)
    out = np.empty((n_tokens, n_head, v_dim))
    for h in range(n_head):
        k_nope, v = c @ k_part[h].T, c @ v_part[h].T
        scores = scale * (q[:, h, :qk_nope] @ k_nope.T + q_rope[:, h] @ k_rope.T) + future
        weight = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, h] = weight / weight.sum(axis=1, keepdims=True) @ v
    return project(weights, "attn_output", out.reshape(n_tokens, -1))
