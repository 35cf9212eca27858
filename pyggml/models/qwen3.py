"""Qwen 3, dense and with experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pyggml.gguf import GGUFFile
from pyggml.models.base import Sizes, register
from pyggml.models.batch import Batch
from pyggml.models.cache import Cache
from pyggml.models.gqa import GroupedQueries, gqa
from pyggml.models.keys import Keys, group, key
from pyggml.models.layers import bias_tensors, mlp_tensors, swiglu_mlp
from pyggml.models.moe import Experts, has_merged, moe
from pyggml.models.weights import Layer
from pyggml.node import Node


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3(GroupedQueries):
    """Grouped queries with normalized heads, rotated in halves, and a SwiGLU feed-forward."""

    name = "qwen3"

    # -- tensors ------------------------------------------------------------------------------

    def layer_tensors(self, il: int) -> Sizes:
        norms: Sizes = {"attn_norm": (self.n_embd,), "ffn_norm": (self.n_embd,)}
        attention = self.heads.tensors(self.n_embd) | self.heads.norms()
        return norms | attention | self.feed_forward_tensors()

    def feed_forward_tensors(self) -> Sizes:
        return mlp_tensors(self.n_embd, self.n_ff)

    def optional_tensors(self, il: int) -> Sizes:
        return bias_tensors(self.heads.tensors(self.n_embd))

    # -- graphs -------------------------------------------------------------------------------

    def attention(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        return gqa(
            layer, x, cache, batch, self.heads, self.rope, mode="neox", norm_eps=self.rms_eps
        )

    def feed_forward(self, x: Node, layer: Layer, batch: Batch) -> Node:
        return layer.label(swiglu_mlp(layer, x, fused=batch.options.fused), "ffn_out")


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Moe(Qwen3):
    """Qwen 3 with experts in every layer, chosen by a softmax; their weights add up to 1.

    As in llama.cpp, the keys expert_gating_func and expert_weights_norm change nothing.

    n_ff    of no layer, but files have the key
    merged  whether experts' up and gate are one tensor, ffn_gate_up_exps
    """

    name = "qwen3moe"

    n_ff: int = key("feed_forward_length", 0, least=0)
    experts: Experts = group(Experts)
    merged: bool = False

    @classmethod
    def derived(cls, keys: Keys, file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
        return {
            "experts": replace(values["experts"], gating_func=1, weights_norm=True),
            "merged": has_merged(file),
        }

    def check(self, keys: Keys) -> None:
        Qwen3.check(self, keys)
        self.experts.check(keys, self.n_layer)

    def feed_forward_tensors(self) -> Sizes:
        return self.experts.tensors(self.n_embd, merged=self.merged)

    def feed_forward(self, x: Node, layer: Layer, batch: Batch) -> Node:
        return moe(layer, x, self.experts, fused=batch.options.fused)
