"""GLM-4.5, GLM-4.5-Air and GLM-4.6."""

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
class Glm4Moe(GroupedQueries):
    """Grouped queries, part of each head rotated in halves; experts after the first dense layers.

    Experts are chosen by sigmoids plus a bias, and every token uses the shared experts, too.

    qk_norm   whether heads of q and k are normalized: in GLM-4.5 and 4.6, not in Air
    qkv_bias  whether q, k and v have biases: in all published models
    merged    whether experts' up and gate are one tensor, ffn_gate_up_exps
    """

    name = "glm4moe"
    norms = ("attn_norm", "post_attention_norm")

    n_layer_dense: int = key("leading_dense_block_count", 0, least=0)
    experts: Experts = group(Experts)
    qk_norm: bool = False
    qkv_bias: bool = False
    merged: bool = False

    @classmethod
    def derived(cls, keys: Keys, file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
        # M-RoPE (GLM-4.5V) gives text the same positions in all sections, as without sections.
        keys.has("rope.dimension_sections")
        experts = replace(
            values["experts"], gating_func=values["experts"].gating_func or 2, choice_bias=True
        )
        return {
            "experts": experts,
            "qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
            "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
            "merged": has_merged(file),
        }

    def check(self, keys: Keys) -> None:
        GroupedQueries.check(self, keys)
        self.experts.check(keys, self.n_layer, self.n_layer_dense)

    # -- tensors ------------------------------------------------------------------------------

    def layer_tensors(self, il: int) -> Sizes:
        sizes: Sizes = {name: (self.n_embd,) for name in self.norms}
        matrices = self.heads.tensors(self.n_embd)
        sizes |= matrices
        if self.qkv_bias:
            sizes |= bias_tensors({name: matrices[name] for name in ("attn_q", "attn_k", "attn_v")})
        if self.qk_norm:
            sizes |= self.heads.norms()
        if il < self.n_layer_dense:
            return sizes | mlp_tensors(self.n_embd, self.n_ff)
        return sizes | self.experts.tensors(self.n_embd, merged=self.merged)

    def optional_tensors(self, il: int) -> Sizes:
        return bias_tensors(self.heads.tensors(self.n_embd))

    # -- graphs -------------------------------------------------------------------------------

    def attention(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        eps = self.rms_eps if self.qk_norm else None
        return gqa(layer, x, cache, batch, self.heads, self.rope, mode="neox", norm_eps=eps)

    def feed_forward(self, x: Node, layer: Layer, batch: Batch) -> Node:
        if layer.il < self.n_layer_dense:
            return layer.label(swiglu_mlp(layer, x, fused=batch.options.fused), "ffn_out")
        return moe(layer, x, self.experts, fused=batch.options.fused)
