"""Llama: Llama 2 and 3, Mistral, SmolLM2 and others with this layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyggml.gguf import GGUFFile
from pyggml.models.base import Sizes, register
from pyggml.models.batch import Batch
from pyggml.models.cache import Cache
from pyggml.models.gqa import GroupedQueries, gqa
from pyggml.models.keys import Keys
from pyggml.models.layers import bias_tensors, mlp_tensors, swiglu_mlp
from pyggml.models.weights import Layer
from pyggml.node import Node


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Llama(GroupedQueries):
    """Grouped queries, rotated in neighbouring pairs, and a SwiGLU feed-forward.

    rope_factors  whether rope_freqs.weight divides the frequencies, as in Llama 3.1 and later
    """

    name = "llama"

    rope_factors: bool = False

    @classmethod
    def derived(cls, keys: Keys, file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
        return {"rope_factors": "rope_freqs.weight" in file.tensors}

    def layer_tensors(self, il: int) -> Sizes:
        norms: Sizes = {"attn_norm": (self.n_embd,), "ffn_norm": (self.n_embd,)}
        return norms | self.heads.tensors(self.n_embd) | mlp_tensors(self.n_embd, self.n_ff)

    def optional_tensors(self, il: int) -> Sizes:
        return bias_tensors(self.layer_tensors(il))

    def model_tensors(self) -> Sizes:
        factors: Sizes = {"rope_freqs": (self.heads.n_rot // 2,)} if self.rope_factors else {}
        return GroupedQueries.model_tensors(self) | factors

    def attention(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        factors = layer.weights["rope_freqs"] if self.rope_factors else None
        return gqa(
            layer, x, cache, batch, self.heads, self.rope, mode="normal", freq_factors=factors
        )

    def feed_forward(self, x: Node, layer: Layer, batch: Batch) -> Node:
        return layer.label(swiglu_mlp(layer, x, fused=batch.options.fused), "ffn_out")
