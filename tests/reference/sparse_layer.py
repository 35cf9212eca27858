"""Attention of one layer of DeepSeek V3.2 or GLM-5 in float64: rows of all tokens, outputs of some.

The formulas are those of transformers (deepseek_v32, glm_moe_dsa) with the file's epsilon for every
RMS norm, except the LayerNorm of index keys, which has 1e-6. Token t is at position t.

n is the number of tokens, T of those at the end whose attention is computed. H is the number of
heads, and k are the file's keys without the architecture's prefix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pyggml.gguf import GGUFFile
from pyggml.parity.oracle.base import Array
from pyggml.parity.oracle.rope import rope_ext
from tests.reference.deepseek import normed_by, project
from tests.reference.deepseek_layer import weights_of


def keys_of(file: GGUFFile) -> dict[str, Any]:
    """The keys of the file's architecture, without its prefix."""
    prefix = f"{file.fields['general.architecture']}."
    return {
        key.removeprefix(prefix): value
        for key, value in file.fields.items()
        if key.startswith(prefix)
    }


class Rows(NamedTuple):
    """What the attention reads of each token.

    latent      [n, kv_lora_rank]
    rope        [n, n_rot]
    index_keys  [n, d]  the indexer's keys; None in a layer without an indexer
    """

    latent: Array
    rope: Array
    index_keys: Array | None

    def first(self, n: int) -> Rows:
        """The rows of the first `n` tokens."""
        index = None if self.index_keys is None else self.index_keys[:n]
        return Rows(self.latent[:n], self.rope[:n], index)


class Choice(NamedTuple):
    """The rows that tokens attend to.

    scores  [T, n_rows]  -inf for rows that a token does not see
    chosen  [T, n_rows]  the top_k best, the lower row first of equals
    border  [T]  the lowest score that was chosen; -inf where all visible rows are
    gap     [T]  the difference to the highest score that was not, relative to the token's largest;
            infinite where all visible rows are chosen
    """

    scores: Array
    chosen: Array
    border: Array
    gap: Array

    def swaps(self, seen: Array) -> tuple[float, float]:
        """How another choice of visible rows [T, n_rows] differs: (rows per token that are not
        chosen here, distance of such a row or of the one in its place from the border, relative to
        the token's largest score; the largest)."""
        token, row = np.nonzero(seen != self.chosen)
        distances = np.abs(self.scores[token, row] - self.border[token])
        distances /= _largest(self.scores)[token]
        per_token = np.count_nonzero(seen & ~self.chosen) / len(seen)
        return per_token, float(distances.max(initial=0.0))


def best_f64(scores: Array, top_k: int) -> Choice:
    """The choice by scores [T, n_rows], -inf for rows that a token does not see."""
    order = np.argsort(-scores, axis=1, kind="stable")
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order[:, :top_k], True, axis=1)
    visible = np.isfinite(scores)
    border, gap = np.full(len(scores), -np.inf), np.full(len(scores), np.inf)
    some = visible.sum(axis=1) > top_k
    if some.any():
        around = order[some, top_k - 1 : top_k + 1]
        border[some], following = np.take_along_axis(scores[some], around, axis=1).T
        gap[some] = (border[some] - following) / _largest(scores[some])
    return Choice(scores, chosen & visible, border, gap)


def _largest(scores: Array) -> Array:
    """The largest absolute score of each token."""
    return np.asarray(np.where(np.isfinite(scores), np.abs(scores), 0).max(axis=1))


class SparseLayer:
    """A layer; w are its weights, by names without blk.N. (`weights_of`).

    neox  which elements of the indexer's heads rotate together: halves (V3.2) or neighbours (GLM-5)
    x     of all methods: the layer's normalized input [.., n_embd]
    """

    def __init__(self, w: Mapping[str, Any], k: Mapping[str, Any], *, neox: bool) -> None:
        self.w, self.k, self.neox = w, k, neox
        self.eps = k["attention.layer_norm_rms_epsilon"]
        self.rank, self.n_rot = k["attention.kv_lora_rank"], k["rope.dimension_count"]

    @classmethod
    def of(cls, file: GGUFFile, il: int) -> SparseLayer:
        """Layer `il` of a file, whose weights have any type that the gguf package decodes."""
        neox = file.fields["general.architecture"] == "deepseek32"
        return cls(weights_of(file, il), keys_of(file), neox=neox)

    def rows(self, x: Array) -> Rows:
        """The rows of tokens 0 .. n - 1."""
        kv_a, pos = project(self.w, "attn_kv_a_mqa", x), np.arange(len(x))
        latent = normed_by(self.w, "attn_kv_a_norm", kv_a[:, : self.rank], self.eps)
        rope = self._rotated(kv_a[:, None, self.rank :], pos)[:, 0]
        if "indexer.attn_k.weight" not in self.w:
            return Rows(latent, rope, None)
        keys = project(self.w, "indexer.attn_k", x)
        keys = keys - keys.mean(axis=1, keepdims=True)
        keys /= np.sqrt((keys**2).mean(axis=1, keepdims=True) + 1e-6)
        keys = keys * self.w["indexer.k_norm.weight"] + self.w["indexer.k_norm.bias"]
        return Rows(latent, rope, self._rotated(keys[:, None], pos, neox=self.neox)[:, 0])

    def scores(self, x: Array, rows: Rows) -> Array:
        """sum_n w_n max(0, q_n . k_j) of the last T tokens [T, n]; -inf for rows after a token."""
        assert rows.index_keys is not None, "the layer has no indexer"
        n_head, d = self.k["attention.indexer.head_count"], self.k["attention.indexer.key_length"]
        pos = self._positions(x, rows)
        q = project(self.w, "indexer.attn_q_b", self._query_latents(x)).reshape(len(x), n_head, d)
        q = self._rotated(q, pos, neox=self.neox)
        head = project(self.w, "indexer.proj", x) / math.sqrt(n_head * d)
        scores = [weight @ np.maximum(one @ rows.index_keys.T, 0) for one, weight in zip(q, head)]
        return np.where(self.visible(x, rows), np.stack(scores), -np.inf)

    def visible(self, x: Array, rows: Rows) -> Array:
        """The rows that the last T tokens see without an indexer [T, n]."""
        return np.asarray(np.arange(len(rows.latent)) <= self._positions(x, rows)[:, None])

    def attention(self, x: Array, rows: Rows, seen: Array) -> Array:
        """The output [T, n_embd] of the last T tokens, which attend to the rows `seen` [T, n]."""
        n_head, pos = self.k["attention.head_count"], self._positions(x, rows)
        d_nope = self.k["attention.key_length_mla"] - self.n_rot
        q = project(self.w, "attn_q_b", self._query_latents(x)).reshape(len(x), n_head, -1)
        q_rope = self._rotated(q[..., d_nope:], pos)
        length, mul = _log_factor(self.k), self.k.get("rope.scaling.yarn_log_multiplier", 0.0)
        scale = (1 + mul * length) ** 2 / math.sqrt(d_nope + self.n_rot)
        # (W_k c) . q = c . (W_k^T q), and sum_j p_j (W_v c_j) = W_v sum_j p_j c_j
        q_nope = _by_head(q[..., :d_nope], self.w["attn_k_b.weight"])
        sums = np.empty_like(q_nope)
        for t, row in enumerate(seen):
            latent, rope = rows.latent[row], rows.rope[row]
            scores = scale * (q_nope[t] @ latent.T + q_rope[t] @ rope.T)
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            sums[t] = p @ latent / p.sum(axis=1, keepdims=True)
        out = _by_head(sums, self.w["attn_v_b.weight"])
        return project(self.w, "attn_output", out.reshape(len(x), -1))

    def _positions(self, x: Array, rows: Rows) -> Array:
        return np.arange(len(rows.latent) - len(x), len(rows.latent))

    def _query_latents(self, x: Array) -> Array:
        return normed_by(self.w, "attn_q_a_norm", project(self.w, "attn_q_a", x), self.eps)

    def _rotated(self, x: Array, pos: Array, *, neox: bool = False) -> Array:
        """x [T, heads, d] with its first n_rot elements rotated."""
        k, length = self.k, _log_factor(self.k)
        mul = k.get("rope.scaling.yarn_log_multiplier", 0.0)
        turned = rope_ext(
            x[None], pos, n_dims=self.n_rot, mode="neox" if neox else "normal",
            n_ctx_orig=k.get("rope.scaling.original_context_length", k["context_length"]),
            freq_base=k["rope.freq_base"], freq_scale=math.exp(-length),
            ext_factor=float(k.get("rope.scaling.type") == "yarn"),
            attn_factor=1 / (1 + mul * length),
        )  # fmt: skip
        return np.asarray(turned[0])


def _by_head(x: Array, matrices: Any) -> Array:
    """x [T, H, b] times matrices [H, a, b]: [T, H, a]."""
    return (np.asarray(matrices, np.float64) @ x.transpose(1, 2, 0)).transpose(2, 0, 1)


def _log_factor(k: Mapping[str, Any]) -> float:
    return math.log(k["rope.scaling.factor"]) if k.get("rope.scaling.type") == "yarn" else 0.0
