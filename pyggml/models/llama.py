"""Llama: Llama 2 and 3, Mistral, SmolLM2 and others with this layer."""

from __future__ import annotations

from dataclasses import dataclass

from pyggml.models.base import Architecture, Sizes, register
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache
from pyggml.models.gqa import Heads, gqa
from pyggml.models.keys import Keys, group, key
from pyggml.models.layers import Rope, bias_tensors, mlp_tensors, swiglu_mlp
from pyggml.models.weights import Layer
from pyggml.node import Node


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Llama(Architecture):
    """Grouped queries, rotated in neighbouring pairs, and a SwiGLU feed-forward."""

    name = "llama"

    n_ff: int = key("feed_forward_length")
    heads: Heads = group(Heads)
    rope: Rope = group(Rope)

    def check(self, keys: Keys) -> None:
        self.heads.check(keys)

    def layer_tensors(self, il: int) -> Sizes:
        norms: Sizes = {"attn_norm": (self.n_embd,), "ffn_norm": (self.n_embd,)}
        return norms | self.heads.tensors(self.n_embd) | mlp_tensors(self.n_embd, self.n_ff)

    def optional_tensors(self, il: int) -> Sizes:
        return bias_tensors(self.layer_tensors(il))

    def optional_model_tensors(self) -> Sizes:
        return {"rope_freqs": (self.heads.n_rot // 2,)}

    def cache(self, il: int, n_ctx: int, n_batch: int, options: Options) -> Cache:
        return self.heads.cache(il, n_ctx, options)

    def attention(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        factors = layer.weights.get("rope_freqs")
        return gqa(
            layer, x, cache, batch, self.heads, self.rope, mode="normal", freq_factors=factors
        )

    def feed_forward(self, x: Node, layer: Layer, batch: Batch) -> Node:
        return layer.label(swiglu_mlp(layer, x, fused=batch.options.fused), "ffn_out")
