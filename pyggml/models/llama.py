"""Llama: Llama 2 and 3, Mistral, SmolLM2 and others with this layer."""

from __future__ import annotations

from dataclasses import dataclass

from pyggml.models.base import Architecture, Sizes, register
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache, kv_cache
from pyggml.models.keys import Keys, group, key, same
from pyggml.models.layers import Rope, gqa, mlp_tensors, swiglu_mlp
from pyggml.models.weights import Layer
from pyggml.node import Node


def _head_size(keys: Keys) -> int:
    return keys.integer("embedding_length") // keys.integer("attention.head_count")


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Llama(Architecture):
    """Grouped queries, rotated in neighbouring pairs, and a SwiGLU feed-forward."""

    name = "llama"

    n_head: int = key("attention.head_count")
    n_head_kv: int = key("attention.head_count_kv", same("attention.head_count"))
    d_k: int = key("attention.key_length", _head_size)
    d_v: int = key("attention.value_length", _head_size)
    n_ff: int = key("feed_forward_length")
    n_rot: int = key("rope.dimension_count", _head_size)
    rope: Rope = group(Rope)

    def check(self, keys: Keys) -> None:
        if self.n_head % self.n_head_kv:
            keys.fail("attention.head_count_kv", f"{self.n_head_kv}, must divide {self.n_head}")
        if self.n_rot % 2 or self.n_rot > self.d_k:
            keys.fail("rope.dimension_count", f"{self.n_rot}, must be even and at most {self.d_k}")

    def layer_tensors(self, il: int) -> Sizes:
        return {
            "attn_norm": (self.n_embd,),
            "attn_q": (self.n_embd, self.n_head * self.d_k),
            "attn_k": (self.n_embd, self.n_head_kv * self.d_k),
            "attn_v": (self.n_embd, self.n_head_kv * self.d_v),
            "attn_output": (self.n_head * self.d_v, self.n_embd),
            "ffn_norm": (self.n_embd,),
        } | mlp_tensors(self.n_embd, self.n_ff)

    def optional_tensors(self, il: int) -> Sizes:
        tensors = self.layer_tensors(il)
        return {f"{name}.bias": ne[1:] for name, ne in tensors.items() if len(ne) == 2}

    def optional_model_tensors(self) -> Sizes:
        return {"rope_freqs": (self.n_rot // 2,)}

    def cache(self, il: int, n_ctx: int, n_batch: int, options: Options) -> Cache:
        return kv_cache(
            il, n_ctx, d_k=self.d_k, d_v=self.d_v, n_head_kv=self.n_head_kv,
            types=(options.cache_k, options.cache_v),
        )  # fmt: skip

    def attention(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        return gqa(
            layer, x, cache, batch, n_head=self.n_head, n_head_kv=self.n_head_kv, d_k=self.d_k,
            d_v=self.d_v, rope=self.rope, n_rot=self.n_rot, mode="normal",
            freq_factors=layer.weights.get("rope_freqs"),
        )  # fmt: skip

    def feed_forward(self, x: Node, layer: Layer, batch: Batch) -> Node:
        return layer.label(swiglu_mlp(layer, x, fused=batch.options.fused), "ffn_out")
