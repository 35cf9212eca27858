"""Attention of one layer of DeepSeek V4 in float64: rows of all tokens, outputs of some.

The formulas are those of transformers (deepseek_v4). Token t is at position t. n is the number of
tokens, T of those at the end whose attention is computed, and r the layer's ratio: how many tokens
a compressed row stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from pyggml.gguf import GGUFFile
from pyggml.parity.oracle.base import Array
from pyggml.parity.oracle.reduce import rms_norm
from pyggml.parity.oracle.rope import rope_ext
from tests.reference.deepseek import normed_by, project
from tests.reference.deepseek_layer import weights_of
from tests.reference.sparse_layer import keys_of


class Rows(NamedTuple):
    """What the attention reads.

    ratio       r; 0 in a layer without a compressor
    kv          [n, d]  of each token: key and value
    old         [floor(n / r), d]  compressed rows; None in a layer without a compressor
    index_keys  [floor(n / r), d_index]  of compressed rows; None in a layer without an indexer
    """

    ratio: int
    kv: Array
    old: Array | None
    index_keys: Array | None

    def first(self, n: int) -> Rows:
        """The rows of the first `n` tokens."""
        end = n // (self.ratio or 1)
        old, index = (None if rows is None else rows[:end] for rows in (self.old, self.index_keys))
        return Rows(self.ratio, self.kv[:n], old, index)


class CompressedLayer:
    """A layer; w are its weights, by names without blk.N. (`weights_of`).

    k       keys without the architecture's prefix
    ratio   0, 4 (overlapping windows, an indexer) or 128
    window  how many tokens a token sees uncompressed, itself included
    x       of all methods: the layer's normalized input [.., n_embd]
    """

    def __init__(self, w: Mapping[str, Any], k: Mapping[str, Any], ratio: int) -> None:
        self.w, self.k, self.ratio = w, k, ratio
        self.window = k["attention.sliding_window"]
        self.eps, self.d = k["attention.layer_norm_rms_epsilon"], k["attention.key_length"]

    @classmethod
    def of(cls, file: GGUFFile, il: int) -> CompressedLayer:
        """Layer `il` of a file, whose weights have any type that the gguf package decodes."""
        k = keys_of(file)
        return cls(weights_of(file, il), k, int(k["attention.compress_ratios"][il]))

    def rows(self, x: Array) -> Rows:
        """The rows of tokens 0 .. n - 1."""
        kv = normed_by(self.w, "attn_kv_a_norm", project(self.w, "attn_kv", x), self.eps)
        kv = self._rotated(kv[:, None], np.arange(len(x)))[:, 0]
        old = self._compressed("attn_compressor", x) if self.ratio else None
        index = self._compressed("indexer_compressor", x) if self.ratio == 4 else None
        return Rows(self.ratio, kv, old, index)

    def _compressed(self, name: str, x: Array) -> Array:
        """sum_j g_j v_j with g = softmax_j z_j, normalized, and rotated at the window's start."""
        r = self.ratio
        n = len(x) // r
        v = project(self.w, f"{name}_kv", x[: n * r]).reshape(n, r, -1)
        z = project(self.w, f"{name}_gate", x[: n * r]).reshape(n, r, -1)
        z = z + np.asarray(self.w[f"{name}_ape.weight"], np.float64)
        if r == 4:
            v, z = (_overlapping(a, fill) for a, fill in ((v, 0.0), (z, -np.inf)))
        gates = np.exp(z - z.max(axis=1, keepdims=True))
        row = (gates * v).sum(axis=1) / gates.sum(axis=1)
        row = normed_by(self.w, f"{name}_norm", row, self.eps)
        return self._rotated(row[:, None], r * np.arange(n))[:, 0]

    def scores(self, x: Array, rows: Rows) -> Array:
        """The indexer's scores of the last T tokens [T, n / 4]; -inf for rows that do not exist
        yet."""
        assert rows.index_keys is not None, "the layer has no indexer"
        n_head, d = self.k["attention.indexer.head_count"], self.k["attention.indexer.key_length"]
        q = project(self.w, "indexer.attn_q_b", self._query_latents(x)).reshape(len(x), n_head, d)
        q = self._rotated(q, self._positions(x, rows))
        head = project(self.w, "indexer.proj", x) / math.sqrt(n_head * d)
        scores = [weight @ np.maximum(one @ rows.index_keys.T, 0) for one, weight in zip(q, head)]
        return np.where(self.visible(x, rows), np.stack(scores), -np.inf)

    def visible(self, x: Array, rows: Rows) -> Array:
        """The compressed rows that exist for the last T tokens [T, n / r]: b < (p + 1) // r."""
        if rows.old is None:
            return np.zeros((len(x), 0), bool)
        ends = (self._positions(x, rows) + 1) // self.ratio
        return np.asarray(np.arange(len(rows.old)) < ends[:, None])

    def attention(self, x: Array, rows: Rows, seen: Array) -> Array:
        """The output [T, n_embd] of the last T tokens, which attend to the window and to the
        compressed rows `seen` [T, n / r]."""
        n_head, pos = self.k["attention.head_count"], self._positions(x, rows)
        q = project(self.w, "attn_q_b", self._query_latents(x)).reshape(len(x), n_head, self.d)
        q = self._rotated(rms_norm(q[None], eps=self.eps)[0], pos)
        sinks = np.asarray(self.w["attn_sinks.weight"], np.float64)[:, None]
        out = np.empty_like(q)
        for t, p in enumerate(pos):
            keys = rows.kv[max(0, p + 1 - self.window) : p + 1]
            if rows.old is not None:
                keys = np.concatenate([keys, rows.old[seen[t]]])
            scores = np.concatenate([q[t] @ keys.T / math.sqrt(self.d), sinks], axis=1)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[t] = weights[:, :-1] @ keys / weights.sum(axis=1, keepdims=True)
        return self._output(self._rotated(out, pos, back=True))

    def _output(self, y: Array) -> Array:
        """attn_output_b of the products of groups of heads; y [T, H, d]."""
        n_group = self.k["attention.output_group_count"]
        w = np.asarray(self.w["attn_output_a.weight"], np.float64)
        w = w.reshape(n_group, -1, w.shape[-1])  # [group, out, in]
        y = y.reshape(len(y), n_group, -1)
        y = (w @ y.transpose(1, 2, 0)).transpose(2, 0, 1)
        return project(self.w, "attn_output_b", y.reshape(len(y), -1))

    def _positions(self, x: Array, rows: Rows) -> Array:
        return np.arange(len(rows.kv) - len(x), len(rows.kv))

    def _query_latents(self, x: Array) -> Array:
        return normed_by(self.w, "attn_q_a_norm", project(self.w, "attn_q_a", x), self.eps)

    def _rotated(self, x: Array, pos: Array, *, back: bool = False) -> Array:
        """x [T, heads, d] with its last n_rot elements rotated. YaRN is for layers that have a
        compressor, and its factor of cosines and sines is 1."""
        k, n_rot = self.k, self.k["rope.dimension_count"]
        rope: dict[str, Any] = {"freq_base": k["rope.freq_base"]}
        if self.ratio:
            rope = {"freq_base": k["attention.compress_rope_freq_base"]}
            if k.get("rope.scaling.type") == "yarn":
                factor = k["rope.scaling.factor"]
                rope |= {
                    "freq_scale": 1 / factor, "ext_factor": 1.0,
                    "attn_factor": 1 / (1 + 0.1 * math.log(factor)),
                    "n_ctx_orig": k["rope.scaling.original_context_length"],
                    "beta_fast": k.get("rope.scaling.yarn_beta_fast", 32.0),
                    "beta_slow": k.get("rope.scaling.yarn_beta_slow", 1.0),
                }  # fmt: skip
        offset = x.shape[-1] - n_rot
        turned = rope_ext(x[None], pos, n_dims=n_rot, offset=offset, back=back, **rope)
        return np.asarray(turned[0])


def _overlapping(a: Array, fill: float) -> Array:
    """[n, r, 2 d] -> [n, 2 r, d]: the first halves of the window before, the second of this one."""
    before, own = np.split(a, 2, axis=2)
    before = np.concatenate([np.full_like(before[:1], fill), before[:-1]])
    return np.concatenate([before, own], axis=1)
