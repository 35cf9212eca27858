"""DeepSeek-2: V2, V2-Lite, V3, R1, Kimi K2, Moonlight, GLM-4.7-Flash and Mistral Large 3."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

from pyggml.errors import GGUFError
from pyggml.gguf import GGUFFile
from pyggml.models.base import Architecture, Sizes, register
from pyggml.models.batch import Batch, Options
from pyggml.models.cache import Cache, kv_cache, latent_cache
from pyggml.models.keys import Keys, key
from pyggml.models.latent import Latent, has_choice_bias, head_sizes, yarn_log_mul
from pyggml.models.layers import tempered
from pyggml.models.mla import mla
from pyggml.models.moe import Experts, has_merged
from pyggml.models.weights import Layer
from pyggml.node import Node
from pyggml.where import warn

KvB: TypeAlias = Literal["split", "joined"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSeek2(Latent):
    """Latent attention over all rows of the cache.

    kv_b    "split": attn_k_b and attn_v_b; "joined": attn_kv_b. Files may have both
    """

    name = "deepseek2"
    mla_forms = (0, 1, 3)

    temperature_scale: float = key("attention.temperature_scale", 0.0, zero=True, rare=True)
    temperature_length: int | None = key("attention.temperature_length", None)  # n_ctx_orig
    kv_b: KvB = "split"

    @classmethod
    def derived(cls, keys: Keys, file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
        sizes = head_sizes(keys, values, absorbed=keys.has("attention.key_length_mla"))
        tensors = set(file.tensors)
        split = {"blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"} <= tensors
        if not split and "blk.0.attn_kv_b.weight" not in tensors:
            raise GGUFError("the file has neither blk.0.attn_kv_b nor blk.0.attn_k_b and attn_v_b")
        experts = replace(_experts(keys, values), choice_bias=has_choice_bias(file, values))
        return sizes | {
            "experts": experts,
            "yarn_log_mul": yarn_log_mul(keys, values["yarn_log_mul"]),
            "kv_b": "split" if split else "joined",
            "merged": has_merged(file),
        }

    def fields(self) -> dict[str, Any]:
        split = self.kv_b == "split"
        keys = {
            "head_count_kv": 1 if split else self.n_head,
            "key_length": self.kv_lora_rank + self.n_rot if split else self.d_k,
            "value_length": self.kv_lora_rank if split else self.d_v,
        }
        if split:
            keys |= {"key_length_mla": self.d_k, "value_length_mla": self.d_v}
        own = {f"{self.name}.attention.{key}": value for key, value in keys.items()}
        return Architecture.fields(self) | own

    @property
    def rope_attn_factor(self) -> float:
        """rope_ext's attn_factor a, as in llama.cpp.

        yarn with a yarn_log_multiplier: a = A / (1 + 0.1 L). Otherwise a = A. Here A is the key
        attn_factor and L = ln(factor).
        """
        if self.rope.scaling == "yarn" and self.yarn_log_mul:
            return self.rope.attn_factor / (1 + 0.1 * self.log_factor)
        return self.rope.attn_factor

    @property
    def kq_scale(self) -> float:
        """Scale of q.k, as in llama.cpp: ms^2 / sqrt(d_k).

        ms = a (1 + 0.1 L) (1 + yarn_log_multiplier L), where a is `rope_attn_factor` and
        L = ln(factor), or 0 for scaling type none.
        """
        length = self.log_factor
        ms = self.rope_attn_factor * (1 + 0.1 * length) * (1 + self.yarn_log_mul * length)
        return ms * ms / math.sqrt(self.d_k)

    def optional_tensors(self, il: int) -> Sizes:
        split = Latent.kv_b_tensors(self)
        return self._joined() | split | Latent.optional_tensors(self, il)

    def kv_b_tensors(self) -> Sizes:
        return self._joined() if self.kv_b == "joined" else Latent.kv_b_tensors(self)

    def _joined(self) -> Sizes:
        return {"attn_kv_b": (self.kv_lora_rank, self.n_head * (self.d_nope + self.d_v))}

    # -- graphs -------------------------------------------------------------------------------

    def cache(self, il: int, n_ctx: int, n_batch: int, options: Options) -> Cache:
        if options.mla:
            return latent_cache(il, n_ctx, self.kv_lora_rank + self.n_rot, options.cache_k)
        return kv_cache(
            il, n_ctx, d_k=self.d_k, d_v=self.d_v, n_head_kv=self.n_head,
            types=(options.cache_k, options.cache_v),
        )  # fmt: skip

    def attention(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        scaling = partial(self.tempered, pos=batch.pos) if self.temperature_scale else None
        return mla(
            layer, x, cache, batch, self.mla_numbers, self.rotation(batch), form=self.form(batch),
            temperature=scaling,
        )  # fmt: skip

    def tempered(self, q: Node, pos: Node) -> Node:
        """q with Mistral Large 3's temperature."""
        length = self.temperature_length or self.rope.n_ctx_orig
        return tempered(q, pos, strength=self.temperature_scale, length=length)


def _experts(keys: Keys, values: dict[str, Any]) -> Experts:
    """The experts with llama.cpp's gating function if the key is missing or 0.

    Softmax, as the first V2 files have no key; but sigmoid for GLM-4.7-Flash, whose first files
    have no key either and are recognized by their sizes.
    """
    experts: Experts = values["experts"]
    if experts.gating_func == 3:
        keys.fail("expert_gating_func", "3, must be 1 (softmax) or 2 (sigmoid)")
    if experts.gating_func:
        return experts
    flash = values["n_block"] in (47, 48) and values["n_vocab"] == 154_880
    experts = replace(experts, gating_func=2 if flash else 1)
    if values["n_layer_dense"] < values["n_block"] - values["n_nextn"]:
        warn(
            f"key '{keys.architecture}.expert_gating_func' is missing: choosing experts by "
            f"{experts.gating}, llama.cpp's default for such files, which may be wrong for this "
            "model"
        )
    return experts
