"""DeepSeek V3.2 and GLM-5 in float64, from a GGUF file's keys and tensors alone.

Every token's attention is that of `SparseLayer`, and its experts those of `route_f64`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyggml.gguf import GGUFFile
from pyggml.parity.oracle.base import Array
from tests.reference.deepseek import normed_by, project
from tests.reference.deepseek_layer import decoded, feed_forward_f64, route_f64
from tests.reference.sparse_layer import SparseLayer, best_f64, keys_of


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
    k = keys_of(file)
    n_layer = k["block_count"] - k.get("nextn_predict_layers", 0)
    full = k.get("attention.indexer.types", np.ones(n_layer, bool))
    whole = {
        tensor: decoded(file.array(tensor), file.tensors[tensor].dtype.ggml_id)
        for tensor in ("token_embd.weight", "output_norm.weight", "output.weight")
    }
    h = np.asarray(whole["token_embd.weight"], np.float64)[list(tokens)]
    gap, expert_gap = np.full(len(h), np.inf), np.full(len(h), np.inf)
    layers: list[Array] = []
    eps = k["attention.layer_norm_rms_epsilon"]
    for il in range(n_layer):
        layer = SparseLayer.of(file, il)
        w = layer.w
        x = normed_by(w, "attn_norm", h, eps)
        rows = layer.rows(x)
        if full[il]:
            choice = best_f64(layer.scores(x, rows), k["attention.indexer.top_k"])
            seen, gap = choice.chosen, np.minimum(gap, choice.gap)
        layers.append(seen)
        h = h + layer.attention(x, rows, seen)
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
