"""DeepSeek V4 (Flash, Pro): attention over compressed rows, hyper-connections, hashed experts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pyggml.gguf import GGUFFile
from pyggml.models.base import Architecture, Sizes, register
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache
from pyggml.models.compressed import HEAVY, PLAIN, SPARSE, Compressed, attention
from pyggml.models.compressor import CompressedCache
from pyggml.models.hyper import collapse, connect, hyper_tensors
from pyggml.models.keys import Keys, group, key
from pyggml.models.layers import Rope, norm
from pyggml.models.moe import Experts, moe
from pyggml.models.weights import Layer, Weights
from pyggml.node import Node
from pyggml.ops import dsv4_hc_post, get_rows, repeat, reshape

_RATIOS = "attention.compress_ratios"
_CLAMP, _CLAMP_SHARED = "swiglu_clamp_exp", "swiglu_clamp_shexp"
#: Limits up to this one clamp nothing, as in llama.cpp.
_NO_CLAMP = 1e-6


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSeek4(Architecture):
    """Layers between which `n_stream` streams run (hyper.py), all with experts.

    ratios   of each layer's attention (compressed.py): 0, 4 or 128
    n_hash   the first layers, in which a table says which experts a token has
    clamp, clamp_shared   of each layer: the limit of the activations of experts and of shared
             experts; at most 1e-6: none
    """

    name = "deepseek4"

    attn: Compressed = group(Compressed)
    rope: Rope = group(Rope)
    ratios: tuple[int, ...]
    experts: Experts = group(Experts)
    n_ff: int = key("feed_forward_length", 0, least=0, rare=True)  # unused: all layers have experts
    n_hash: int = key("hash_layer_count", least=0)
    clamp: tuple[float, ...]
    clamp_shared: tuple[float, ...]
    n_stream: int = key("hyper_connection.count")
    n_sinkhorn: int = key("hyper_connection.sinkhorn_iterations", most=1000)
    hc_eps: float = key("hyper_connection.epsilon", zero=True)

    @classmethod
    def derived(cls, keys: Keys, file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
        first_mtp = values["n_block"] - values["n_nextn"]
        if f"blk.{first_mtp}.nextn.eh_proj.weight" not in file.tensors:
            values["n_nextn"] = 0  # the key says what the model has; MTP blocks have their own file
        n = values["n_block"] - values["n_nextn"]
        clamp = keys.each(_CLAMP, n, float)
        shared = keys.each(_CLAMP_SHARED, n, float) if keys.has(_CLAMP_SHARED) else clamp
        gating_func = keys.integer("expert_gating_func", most=4)
        if gating_func != 4:
            keys.fail("expert_gating_func", f"{gating_func}, must be 4 (the root of softplus)")
        return {
            "n_nextn": values["n_nextn"],
            "ratios": keys.each(_RATIOS, n, int),
            "clamp": clamp,
            "clamp_shared": shared,
            "experts": replace(values["experts"], choice_bias=True),
        }

    def check(self, keys: Keys) -> None:
        self.attn.check(keys)
        self.experts.check(keys, self.n_layer)
        if self.experts.n_group > 1:
            keys.fail("expert_group_count", f"{self.experts.n_group}, must be 1 or absent")
        for il, ratio in enumerate(self.ratios):
            if ratio not in (PLAIN, SPARSE, HEAVY):
                known = f"{PLAIN}, {SPARSE} or {HEAVY}"
                keys.fail(_RATIOS, f"{ratio} in layer {il}, must be {known}")
        for name, limits in ((_CLAMP, self.clamp), (_CLAMP_SHARED, self.clamp_shared)):
            if not all(math.isfinite(limit) and limit >= 0 for limit in limits):
                keys.fail(name, f"{list(limits)}, must be finite and not negative")
        if self.rope.attn_factor != 1:
            keys.fail("rope.scaling.attn_factor", f"{self.rope.attn_factor}, must be 1")
        n_out = self.n_stream * self.n_embd
        keys.equal("embedding_length_out", n_out, "hyper_connection.count x embedding_length")

    def fields(self) -> dict[str, Any]:
        own: dict[str, Any] = {
            _RATIOS: np.array(self.ratios, np.int32),
            _CLAMP: np.array(self.clamp, np.float32),
            _CLAMP_SHARED: np.array(self.clamp_shared, np.float32),
            "embedding_length_out": self.n_stream * self.n_embd,
        }
        own |= self.attn.fields()
        return Architecture.fields(self) | {f"{self.name}.{k}": value for k, value in own.items()}

    # -- tensors ------------------------------------------------------------------------------

    def layer_tensors(self, il: int) -> Sizes:
        sizes: Sizes = {"attn_norm": (self.n_embd,), "ffn_norm": (self.n_embd,)}
        for part in ("attn", "ffn"):
            sizes |= hyper_tensors(part, self.n_embd, self.n_stream)
        sizes |= self.attn.tensors(self.n_embd, self.ratios[il])
        sizes |= self.experts.tensors(self.n_embd)
        if il < self.n_hash:
            del sizes["exp_probs_b.bias"]
            sizes["ffn_gate_tid2eid"] = (self.experts.n_used, self.n_vocab)
        return sizes

    def optional_tensors(self, il: int) -> Sizes:
        return {"exp_probs_b_vl.bias": (self.experts.n_expert,)}  # for the tokens of images

    def model_tensors(self) -> Sizes:
        return Architecture.model_tensors(self) | {
            "output_hc_fn": (self.n_stream * self.n_embd, self.n_stream),
            "output_hc_base": (self.n_stream,),
            "output_hc_scale": (1,),
        }

    def stored_sizes(self, name: str, ne: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Files stack the rows of attn_output_a's groups."""
        return ((ne[0], ne[1] * ne[2]),) if name.endswith("attn_output_a.weight") else ()

    # -- graphs -------------------------------------------------------------------------------

    def dense_rows(self) -> int:
        """With fewer tokens, there are not more compressed rows than an indexer chooses."""
        return SPARSE * (self.attn.top_k + 1) - 1 if SPARSE in self.ratios else 0

    def cache(self, il: int, n_ctx: int, n_batch: int, options: Options) -> Cache:
        return self.attn.cache(il, self.ratios[il], n_ctx, n_batch, options)

    def begin(self, x: Node) -> Node:
        """All streams begin as the embeddings: f32 [n_embd, n_stream, T]."""
        n, n_tokens = x.ne[:2]
        return repeat(reshape(x, ne=(n, 1, n_tokens)), ne=(n, self.n_stream, n_tokens))

    def end(self, x: Node, w: Weights) -> Node:
        return collapse(w, x, rms_eps=self.rms_eps, eps=self.hc_eps)

    def layer(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        for part in ("attn", "ffn"):
            maps = connect(
                layer, part, x, rms_eps=self.rms_eps, eps=self.hc_eps, n_iter=self.n_sinkhorn
            )
            normed = norm(layer, f"{part}_norm", maps.x, self.rms_eps)
            normed = layer.label(normed, f"{part}_norm")
            if part == "attn":
                y = self.attention(normed, layer, cache, batch)
            else:
                y = self.feed_forward(normed, layer, batch)
            x = dsv4_hc_post(y, x, maps.post, maps.comb)
            x = layer.label(x, "ffn_inp" if part == "attn" else "l_out")
            if part == "attn" and self._only_outputs(layer, batch):
                x = self._outputs(x, batch)
        return x

    def attention(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        assert isinstance(cache, CompressedCache)
        rope = self.attn.rope(self.rope, self.ratios[layer.il])
        return attention(layer, x, cache, batch, self.attn, rope, self.rms_eps)

    def feed_forward(self, x: Node, layer: Layer, batch: Batch) -> Node:
        limit, shared = self.clamp[layer.il], self.clamp_shared[layer.il]
        return moe(
            layer, x, self.experts, fused=batch.options.fused,
            ids=self._hashed(layer, batch) if layer.il < self.n_hash else None,
            limit=limit if limit > _NO_CLAMP else None,
            limit_shared=shared if shared > _NO_CLAMP else None,
        )  # fmt: skip

    def _hashed(self, layer: Layer, batch: Batch) -> Node:
        """The experts of the tokens, i32 [n_used, T]."""
        tokens = batch.tokens
        if self._only_outputs(layer, batch):
            assert batch.outputs is not None
            rows = reshape(tokens, ne=(1, batch.n_tokens))
            tokens = reshape(get_rows(rows, batch.outputs), ne=(batch.n_outputs,))
        return get_rows(layer["ffn_gate_tid2eid"], tokens)

    def _only_outputs(self, layer: Layer, batch: Batch) -> bool:
        """Whether the feed-forward is only for the batch's outputs: in the last layer."""
        return batch.outputs is not None and layer.il == self.n_layer - 1

    def _outputs(self, x: Node, batch: Batch) -> Node:
        assert batch.outputs is not None
        rows = reshape(x, ne=(x.ne[0] * x.ne[1], x.ne[2]))
        return reshape(get_rows(rows, batch.outputs), ne=(*x.ne[:2], batch.n_outputs))
