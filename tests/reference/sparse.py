"""DeepSeek V3.2 and GLM-5 in float64, from a GGUF file's keys and tensors alone.

The formulas are those of transformers (deepseek_v32, glm_moe_dsa) with the file's epsilon for every
RMS norm, except the LayerNorm of index keys, which has 1e-6. Attention is in its standard form:
keys and values of all heads, and every row that is not chosen masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pyggml.gguf import GGUFFile
from pyggml.parity.oracle.base import Array
from pyggml.parity.oracle.rope import rope_ext
from tests.reference.deepseek import normed_by, project
from tests.reference.deepseek_layer import decoded, feed_forward_f64, route_f64, weights_of


class Sparse(NamedTuple):
    """The result for all tokens.

    logits  [n_tokens, n_vocab]
    gap     [n_tokens]  the narrowest of the token's choices of rows, over layers: the difference
            between the lowest score that was chosen and the highest that was not, relative to the
            largest score of the token; infinite where all rows are chosen
    expert_gap  [n_tokens]  the same for experts, as `route_f64` has it
    chosen  [n_layer, n_tokens, n_tokens]  whether a token attends to a row
    """

    logits: Array
    gap: Array
    expert_gap: Array
    chosen: Array


def sparse_f64(file: GGUFFile, tokens: Sequence[int]) -> Sparse:
    """The model of a file, whose weights are f32 or any type that the gguf package decodes."""
    name = file.fields["general.architecture"]
    assert isinstance(name, str)
    prefix = f"{name}."
    k: dict[str, Any] = {
        key.removeprefix(prefix): v for key, v in file.fields.items() if key.startswith(prefix)
    }
    n_layer = k["block_count"] - k.get("nextn_predict_layers", 0)
    full = k.get("attention.indexer.types", np.ones(n_layer, bool))
    whole = {
        tensor: decoded(file.array(tensor), file.tensors[tensor].dtype.ggml_id)
        for tensor in ("token_embd.weight", "output_norm.weight", "output.weight")
    }
    h = np.asarray(whole["token_embd.weight"], np.float64)[list(tokens)]
    gap, expert_gap = np.full(len(h), np.inf), np.full(len(h), np.inf)
    visible, layers = np.tri(len(h), dtype=bool), []
    seen = visible
    eps = k["attention.layer_norm_rms_epsilon"]
    for il in range(n_layer):
        w = weights_of(file, il)
        x = normed_by(w, "attn_norm", h, eps)
        q_a = normed_by(w, "attn_q_a_norm", project(w, "attn_q_a", x), eps)
        if full[il]:
            scores = np.where(visible, _scores(w, x, q_a, k, neox=name == "deepseek32"), -np.inf)
            seen, width = _best(scores, k["attention.indexer.top_k"])
            gap = np.minimum(gap, width)
        layers.append(seen)
        h = h + _attention(w, x, q_a, k, seen)
        x = normed_by(w, "ffn_norm", h, eps)
        if il < k.get("leading_dense_block_count", 0):
            h = h + feed_forward_f64(w, x)
            continue
        routing = route_f64(
            w, x, n_expert_used=k["expert_used_count"], gating="sigmoid",
            weights_norm=k["expert_weights_norm"], weights_scale=k["expert_weights_scale"],
            n_group=k.get("expert_group_count", 1),
            n_group_used=k.get("expert_group_used_count", 1),
        )  # fmt: skip
        expert_gap = np.minimum(expert_gap, routing.margin)
        h = h + feed_forward_f64(w, x, routing)
    logits = project(whole, "output", normed_by(whole, "output_norm", h, eps))
    return Sparse(logits, gap, expert_gap, np.stack(layers))


def _scores(w: Mapping[str, Any], x: Array, q_a: Array, k: Mapping[str, Any], neox: bool) -> Array:
    """sum_n w_n max(0, q_n . k_j)   [n_tokens, n_tokens]."""
    n_head, d = k["attention.indexer.head_count"], k["attention.indexer.key_length"]
    q = _rotated(project(w, "indexer.attn_q_b", q_a).reshape(len(x), n_head, d), k, neox=neox)
    keys = project(w, "indexer.attn_k", x)
    keys = keys - keys.mean(axis=1, keepdims=True)
    keys /= np.sqrt((keys**2).mean(axis=1, keepdims=True) + 1e-6)
    keys = keys * w["indexer.k_norm.weight"] + w["indexer.k_norm.bias"]
    keys = _rotated(keys[:, None], k, neox=neox)[:, 0]
    head = project(w, "indexer.proj", x) / math.sqrt(n_head * d)
    products = np.maximum(np.einsum("tnd,jd->tnj", q, keys), 0)
    return np.asarray(np.einsum("tn,tnj->tj", head, products))


def _best(scores: Array, k: int) -> tuple[Array, Array]:
    """(whether a row is one of the k best of a token, the lower row first of equals; the gap)."""
    order = np.argsort(-scores, axis=1, kind="stable")
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order[:, :k], True, axis=1)
    gap = np.full(len(scores), np.inf)
    if k < scores.shape[1]:
        late = scores[k:]  # tokens that see more than k rows
        last, following = np.take_along_axis(late, order[k:, k - 1 : k + 1], axis=1).T
        gap[k:] = (last - following) / np.where(np.isfinite(late), np.abs(late), 0).max(axis=1)
    return chosen & np.isfinite(scores), gap


def _attention(
    w: Mapping[str, Any], x: Array, q_a: Array, k: Mapping[str, Any], seen: Array
) -> Array:
    n, n_head, rank = len(x), k["attention.head_count"], k["attention.kv_lora_rank"]
    n_rot = k["rope.dimension_count"]
    d_nope = k["attention.key_length_mla"] - n_rot
    q = project(w, "attn_q_b", q_a).reshape(n, n_head, -1)
    kv_a = project(w, "attn_kv_a_mqa", x)
    eps = k["attention.layer_norm_rms_epsilon"]
    c = normed_by(w, "attn_kv_a_norm", kv_a[:, :rank], eps)
    q_rope = _rotated(q[..., d_nope:], k, neox=False)
    k_rope = _rotated(kv_a[:, None, rank:], k, neox=False)[:, 0]
    keys = np.einsum("hrd,jr->hjd", w["attn_k_b.weight"], c, dtype=np.float64)
    values = np.einsum("hvr,jr->hjv", w["attn_v_b.weight"], c, dtype=np.float64)
    length, mul = _log_factor(k), k.get("rope.scaling.yarn_log_multiplier", 0.0)
    scale = (1 + mul * length) ** 2 / math.sqrt(d_nope + n_rot)
    scores = np.einsum("thd,hjd->htj", q[..., :d_nope], keys)
    scores = scale * (scores + np.einsum("thd,jd->htj", q_rope, k_rope))
    scores = np.where(seen, scores, -np.inf)
    p = np.exp(scores - scores.max(axis=2, keepdims=True))
    p /= p.sum(axis=2, keepdims=True)
    return project(w, "attn_output", np.einsum("htj,hjv->thv", p, values).reshape(n, -1))


def _rotated(x: Array, k: Mapping[str, Any], *, neox: bool) -> Array:
    """x [n_tokens, heads, d] with its first n_rot elements rotated."""
    yarn, length = k.get("rope.scaling.type") == "yarn", _log_factor(k)
    mul = k.get("rope.scaling.yarn_log_multiplier", 0.0)
    n_rot = k["rope.dimension_count"]
    turned = rope_ext(
        x[None, ..., :n_rot], np.arange(len(x)), n_dims=n_rot, mode="neox" if neox else "normal",
        n_ctx_orig=k.get("rope.scaling.original_context_length", k["context_length"]),
        freq_base=k["rope.freq_base"], freq_scale=math.exp(-length), ext_factor=float(yarn),
        attn_factor=1 / (1 + mul * length),
    )[0]  # fmt: skip
    return np.concatenate([turned, x[..., n_rot:]], axis=-1)


def _log_factor(k: Mapping[str, Any]) -> float:
    return math.log(k["rope.scaling.factor"]) if k.get("rope.scaling.type") == "yarn" else 0.0
