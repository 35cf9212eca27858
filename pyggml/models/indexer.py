"""The lightning indexer of DeepSeek sparse attention: which cache rows a token attends to.

T is the number of tokens, n_kv the number of cache rows, and H and D the indexer's heads and their
size [64 and 128 in V3.2]:

    q = attn_q_b q_a  [D, H, T];   k = LayerNorm(attn_k x)  [D, T], into a cache of its own;   both
    with their first n_rot elements rotated
    w = proj x / sqrt(H D)  [H, T]
    score[j, t] = sum_n w[n, t] max(0, q[:, n, t] . k_j)  for rows j that token t may see, else -inf
    ids[:, t] = the top_k rows with the largest scores

Both factors of w are in one: H^-1/2, and the scale of the products, D^-1/2. llama.cpp multiplies q
and k by a Hadamard matrix, which changes no score, and is left out here.
Source: DeepSeek-V3.2-Exp's report and its inference code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pyggml.models.keys import Keys, key
from pyggml.models.layers import layer_norm, linear
from pyggml.models.weights import Layer
from pyggml.node import Node
from pyggml.ops import lightning_indexer, mul_mat, reshape, scale, top_k

#: x [D, heads, T] -> x with its first elements rotated.
Rotate = Callable[[Node], Node]
#: Epsilon of the keys' LayerNorm, in no key. llama.cpp has 0 for glm-dsa.
EPS = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexer:
    """The indexer of a model, from its keys.

    d      elements of a head
    top_k  rows that a token attends to
    """

    n_head: int = key("attention.indexer.head_count")
    d: int = key("attention.indexer.key_length")
    top_k: int = key("attention.indexer.top_k")

    def check(self, keys: Keys, n_rot: int) -> None:
        """Raise a GGUFError for heads that are too small for the rotation."""
        if self.d < n_rot:
            keys.fail("attention.indexer.key_length", f"{self.d}, must be at least {n_rot}")

    def tensors(self, n_embd: int, q_lora_rank: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a layer."""
        return {
            "indexer.attn_q_b": (q_lora_rank, self.n_head * self.d),
            "indexer.attn_k": (n_embd, self.d),
            "indexer.k_norm": (self.d,),
            "indexer.k_norm.bias": (self.d,),
            "indexer.proj": (n_embd, self.n_head),
        }

    def key(self, layer: Layer, x: Node, rotate: Rotate) -> Node:
        """The keys of new tokens, [D, T]; x is the layer's normalized input."""
        k = layer_norm(layer, "indexer.k_norm", linear(layer, "indexer.attn_k", x), EPS)
        k = rotate(reshape(k, ne=(self.d, 1, x.ne[1])))
        return layer.label(reshape(k, ne=(self.d, x.ne[1])), "index_k")

    def choose(
        self, layer: Layer, x: Node, q_a: Node, rows: Node, mask: Node, rotate: Rotate
    ) -> Node:
        """ids, i32 [min(top_k, n_kv), T], in no order. A token that sees fewer rows than these
        gets some that it may not see.

        x     the layer's normalized input [n_embd, T]
        q_a   the input of attn_q_b [q_lora_rank, T]
        rows  the keys in the cache [D, n_kv]
        mask  f16 [n_kv, T]
        """
        q = linear(layer, "indexer.attn_q_b", q_a)
        q = layer.label(rotate(reshape(q, ne=(self.d, self.n_head, x.ne[1]))), "index_q")
        w = mul_mat(layer["indexer.proj"], x, prec="f32")
        w = layer.label(scale(w, s=1 / math.sqrt(self.n_head * self.d)), "indexer_weights")
        scores = layer.label(lightning_indexer(q, rows, w, mask), "indexer_score")
        ids = top_k(scores, k=min(self.top_k, rows.ne[1]))
        return layer.label(ids, "top_k")
