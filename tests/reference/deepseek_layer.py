"""A DeepSeek layer in float64, with experts or dense, and its weights from a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from pyggml.gguf import GGUFFile
from pyggml.models.deepseek2 import DeepSeek2
from pyggml.parity.oracle.base import Array, activate
from tests.reference.deepseek import attention_f64, factor, normed_by, project


@dataclass(frozen=True, slots=True)
class Routing:
    """The experts of each token, best first.

    ids      [n_tokens, n_expert_used]
    weights  [n_tokens, n_expert_used]
    margin   [n_tokens]  how close the choice was: the relative difference between the lowest score
             that was chosen and the highest that was not, for experts or groups, whichever is less
    """

    ids: Array
    weights: Array
    margin: Array


def route_f64(
    weights: Mapping[str, Array],
    x: Array,
    *,
    n_expert_used: int,
    gating: str = "softmax",
    weights_norm: bool = False,
    weights_scale: float = 1.0,
    n_group: int = 1,
    n_group_used: int = 1,
) -> Routing:
    """The experts of each token, and their weights.

        p = softmax(W x) (V2) or sigmoid(W x) (V3);   score = p + bias
        a group's score is the best of its experts' (V2) or the sum of its best two (V3)
        choose the n_expert_used best scores of the n_group_used best groups; their weights are p,
        divided by their sum if weights_norm, times weights_scale

    weights  ffn_gate_inp.weight [n_expert, n_embd]; perhaps exp_probs_b.bias [n_expert]
    x        [n_tokens, n_embd], already normalized
    """
    logits = project(weights, "ffn_gate_inp", np.asarray(x, np.float64))
    if gating == "softmax":
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
    else:
        p = 0.5 + 0.5 * np.tanh(0.5 * logits)
    score, margin = p + weights.get("exp_probs_b.bias", np.zeros(1)), np.full(len(p), np.inf)
    if n_group > 1:
        groups = score.reshape(len(p), n_group, -1)
        best = np.sort(groups, axis=2)[..., -1 if gating == "softmax" else -2 :].sum(axis=2)
        used, margin = _best(best, n_group_used)
        open_ = np.any(used[..., None] == np.arange(n_group), axis=1)
        score = np.where(open_[..., None], groups, -np.inf).reshape(p.shape)
    ids, nearest = _best(score, n_expert_used)
    shares = np.take_along_axis(p, ids, axis=1)
    if weights_norm:
        shares /= shares.sum(axis=1, keepdims=True)
    return Routing(ids, weights_scale * shares, np.minimum(margin, nearest))


def _best(score: Array, k: int) -> tuple[Array, Array]:
    """(indices of the k highest scores of each row, margin to the next one)"""
    order = np.argsort(-score, axis=1, kind="stable")
    if k == score.shape[1]:
        return order, np.full(len(score), np.inf)
    last, following = np.take_along_axis(score, order[:, k - 1 : k + 1], axis=1).T
    return order[:, :k], (last - following) / np.abs(last)


def feed_forward_f64(weights: Mapping[str, Any], x: Array, routing: Routing | None = None) -> Array:
    """down(silu(gate x) * (up x)); with a routing the weighted sum of experts, plus shared experts.

    weights  dense: ffn_up, ffn_gate [n_ff, n_embd] and ffn_down [n_embd, n_ff];
             experts: ffn_up_exps and so on, whose [e] is the matrix of expert e (read only if it is
             used), and perhaps ffn_up_shexp and so on; ffn_gate_up_exps [e] has the rows of gate
             followed by those of up. Names end in ".weight"; a factor for the tensor or for each
             expert ends in ".scale"
    x        [n_tokens, n_embd], already normalized
    """
    x = np.asarray(x, np.float64)
    if routing is None:
        return _swiglu(x, *(_matrix(weights, f"ffn_{part}") for part in _PARTS))
    out = np.zeros_like(x)
    for e in np.unique(routing.ids):
        token, slot = np.nonzero(routing.ids == e)
        result = _swiglu(x[token], *(_expert(weights, part, e) for part in _PARTS))
        out[token] += routing.weights[token, slot, None] * result
    if "ffn_up_shexp.weight" in weights:
        out += _swiglu(x, *(_matrix(weights, f"ffn_{part}_shexp") for part in _PARTS))
    return out


_PARTS = "up", "gate", "down"


def _matrix(weights: Mapping[str, Any], name: str) -> Array:
    return np.asarray(weights[f"{name}.weight"], np.float64) * factor(weights, name)


def _expert(weights: Mapping[str, Any], part: str, expert: int) -> Array:
    merged = "ffn_gate_up_exps" if part != "down" else ""
    name = merged if f"{merged}.weight" in weights else f"ffn_{part}_exps"
    matrix = np.asarray(weights[f"{name}.weight"][expert], np.float64)
    if f"{name}.scale" in weights:
        matrix = matrix * np.float64(weights[f"{name}.scale"][expert])
    if name == merged:
        matrix = np.split(matrix, 2)[part == "up"]
    return matrix


def _swiglu(x: Array, up: Array, gate: Array, down: Array) -> Array:
    up, gate, down = (np.asarray(w, np.float64) for w in (up, gate, down))
    return np.asarray((activate("silu", x @ gate.T) * (x @ up.T)) @ down.T)


def layer_f64(
    weights: Mapping[str, Any], x: Array, positions: Array, config: DeepSeek2
) -> tuple[Array, Routing | None]:
    """(y, routing if there are experts): h = x + attention(norm(x)), y = h + feed_forward(norm(h)).

    weights    those of `attention_f64`, `route_f64` and `feed_forward_f64`; attn_norm, ffn_norm
    x          [n_tokens, n_embd]
    positions  [n_tokens], ascending
    """
    c, e = config, config.experts
    x = np.asarray(x, np.float64)
    h = x + attention_f64(
        weights,
        normed_by(weights, "attn_norm", x, c.rms_eps),
        positions,
        n_head=c.n_head,
        qk_nope=c.d_nope,
        qk_rope=c.n_rot,
        v_dim=c.d_v,
        kv_lora=c.kv_lora_rank,
        eps=c.rms_eps,
        kq_scale=c.kq_scale,
        freq_base=c.rope.freq_base,
        freq_scale=c.rope.freq_scale,
        ext_factor=c.rope.ext_factor,
        attn_factor=c.rope_attn_factor,
        n_ctx_orig=c.rope.n_ctx_orig,
        beta_fast=c.rope.beta_fast,
        beta_slow=c.rope.beta_slow,
        temperature_scale=c.temperature_scale,
        temperature_length=c.temperature_length or c.rope.n_ctx_orig,
    )
    normed = normed_by(weights, "ffn_norm", h, c.rms_eps)
    if "ffn_gate_inp.weight" not in weights:
        return h + feed_forward_f64(weights, normed), None
    routing = route_f64(
        weights,
        normed,
        n_expert_used=e.n_used,
        gating=e.gating,
        weights_norm=e.weights_norm,
        weights_scale=e.weights_scale or 1.0,
        n_group=e.n_group,
        n_group_used=e.n_group_used or e.n_group,
    )
    return h + feed_forward_f64(weights, normed, routing), routing


class Experts:
    """The matrices of a tensor of experts, decoded one by one on access: all of them would need
    gigabytes.
    """

    def __init__(self, rows: Array, ggml_id: int) -> None:
        self.rows, self.ggml_id = rows, ggml_id

    def __getitem__(self, expert: int) -> Array:
        return decoded(self.rows[expert], self.ggml_id)


def weights_of(file: GGUFFile, il: int) -> dict[str, Any]:
    """The weights of layer `il` for the functions above, decoded by the gguf package."""
    weights: dict[str, Any] = {}
    prefix = f"blk.{il}."
    for name, info in file.tensors.items():
        if name.startswith(prefix):
            decode = Experts if "_exps." in name else decoded
            weights[name.removeprefix(prefix)] = decode(file.array(name), info.dtype.ggml_id)
    return weights


def decoded(rows: Array, ggml_id: int) -> Array:
    """A tensor's values."""
    if ggml_id == GGMLQuantizationType.I32:
        return rows
    raw = np.ascontiguousarray(rows).view(np.uint8)
    return np.asarray(dequantize(raw, GGMLQuantizationType(ggml_id)))
