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
from pyggml.models.keys import Keys, group, key
from pyggml.models.layers import Rope, mlp_tensors, swiglu_mlp, tempered
from pyggml.models.mla import Mla, mla
from pyggml.models.moe import Experts, has_merged, moe
from pyggml.models.weights import Layer
from pyggml.node import Node
from pyggml.where import warn

KvB: TypeAlias = Literal["split", "joined"]


@register
@dataclass(frozen=True, slots=True, kw_only=True)
class DeepSeek2(Architecture):
    """Latent attention (mla.py), and experts after the first dense layers.

    d_nope  attention.key_length_mla, or key_length, minus n_rot
    d_v     attention.value_length_mla, or value_length
    kv_b    "split": attn_k_b and attn_v_b; "joined": attn_kv_b. Files may have both
    merged  whether experts' up and gate are one tensor, ffn_gate_up_exps
    """

    name = "deepseek2"

    n_layer_dense: int = key("leading_dense_block_count", 0, least=0)
    n_head: int = key("attention.head_count")
    q_lora_rank: int | None = key("attention.q_lora_rank", None)
    kv_lora_rank: int = key("attention.kv_lora_rank")
    n_rot: int = key("rope.dimension_count")
    d_nope: int
    d_v: int
    n_ff: int = key("feed_forward_length", 0, least=0)  # of dense layers
    experts: Experts = group(Experts)
    rope: Rope = group(Rope)
    yarn_log_mul: float = key("rope.scaling.yarn_log_multiplier", 0.0, zero=True, rare=True)
    temperature_scale: float = key("attention.temperature_scale", 0.0, zero=True, rare=True)
    temperature_length: int | None = key("attention.temperature_length", None)  # n_ctx_orig
    kv_b: KvB = "split"
    merged: bool = False

    @classmethod
    def derived(cls, keys: Keys, file: GGUFFile, values: dict[str, Any]) -> dict[str, Any]:
        n_head, kv_lora_rank, n_rot = (values[k] for k in ("n_head", "kv_lora_rank", "n_rot"))
        if n_rot % 2:
            keys.fail("rope.dimension_count", f"{n_rot}, must be even")
        # The plain keys of a file for absorbed attention describe one shared head of kv_lora +
        # rope; the true head sizes are in the _mla keys.
        suffix = "_mla" if keys.has("attention.key_length_mla") else ""
        if suffix:
            keys.equal("attention.key_length", kv_lora_rank + n_rot, "kv_lora_rank + rope")
            keys.equal("attention.value_length", kv_lora_rank, "kv_lora_rank")
            keys.equal("attention.head_count_kv", 1, "key_length_mla")
        else:
            keys.equal("attention.head_count_kv", n_head, "head_count without key_length_mla")
        key_length = keys.integer(f"attention.key_length{suffix}", least=n_rot + 1)
        tensors = set(file.tensors)
        split = {"blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"} <= tensors
        if not split and "blk.0.attn_kv_b.weight" not in tensors:
            raise GGUFError("the file has neither blk.0.attn_kv_b nor blk.0.attn_k_b and attn_v_b")
        moe_layers = range(values["n_layer_dense"], values["n_block"] - values["n_nextn"])
        biases = [f"blk.{il}.exp_probs_b.bias" in tensors for il in moe_layers]
        return {
            "d_nope": key_length - n_rot,
            "d_v": keys.integer(f"attention.value_length{suffix}"),
            "experts": replace(_experts(keys, values), choice_bias=any(biases) and all(biases)),
            "yarn_log_mul": _yarn_log_mul(keys, values["yarn_log_mul"]),
            "kv_b": "split" if split else "joined",
            "merged": has_merged(file),
        }

    def check(self, keys: Keys) -> None:
        self.experts.check(keys, self.n_layer, self.n_layer_dense)
        if self.n_layer_dense and not self.n_ff:
            keys.integer("feed_forward_length")  # raises
        if self.rope.scaling == "yarn" and self.rope.freq_scale != 1 and not self.yarn_log_mul:
            warn(
                f"key '{keys.architecture}.rope.scaling.yarn_log_multiplier' is missing: using "
                "llama.cpp's attention scale for such files, which may be wrong for this model"
            )

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
    def d_k(self) -> int:
        """Head size of keys in the standard form: d_nope + n_rot."""
        return self.d_nope + self.n_rot

    @property
    def rope_attn_factor(self) -> float:
        """rope_ext's attn_factor a, as in llama.cpp.

        yarn with a yarn_log_multiplier: a = A / (1 + 0.1 L). Otherwise a = A. Here A is the key
        attn_factor and L = ln(factor).
        """
        if self.rope.scaling == "yarn" and self.yarn_log_mul:
            return self.rope.attn_factor / (1 + 0.1 * self._log_factor)
        return self.rope.attn_factor

    @property
    def kq_scale(self) -> float:
        """Scale of q.k, as in llama.cpp: ms^2 / sqrt(d_k).

        ms = a (1 + 0.1 L) (1 + yarn_log_multiplier L), where a is `rope_attn_factor` and
        L = ln(factor), or 0 for scaling type none.
        """
        length = self._log_factor
        ms = self.rope_attn_factor * (1 + 0.1 * length) * (1 + self.yarn_log_mul * length)
        return ms * ms / math.sqrt(self.d_k)

    @property
    def _log_factor(self) -> float:
        return -math.log(self.rope.freq_scale)

    # -- tensors ------------------------------------------------------------------------------

    def layer_tensors(self, il: int) -> Sizes:
        n_embd = self.n_embd
        sizes: Sizes = {"attn_norm": (n_embd,)}
        if self.q_lora_rank is None:
            sizes["attn_q"] = (n_embd, self.n_head * self.d_k)
        else:
            sizes["attn_q_a"] = (n_embd, self.q_lora_rank)
            sizes["attn_q_a_norm"] = (self.q_lora_rank,)
            sizes["attn_q_b"] = (self.q_lora_rank, self.n_head * self.d_k)
        sizes["attn_kv_a_mqa"] = (n_embd, self.kv_lora_rank + self.n_rot)
        sizes["attn_kv_a_norm"] = (self.kv_lora_rank,)
        sizes |= self._kv_b(self.kv_b)
        sizes["attn_output"] = (self.n_head * self.d_v, n_embd)
        sizes["ffn_norm"] = (n_embd,)
        if il < self.n_layer_dense:
            return sizes | mlp_tensors(n_embd, self.n_ff)
        return sizes | self.experts.tensors(n_embd, merged=self.merged)

    def optional_tensors(self, il: int) -> Sizes:
        sizes = self._kv_b("joined") | self._kv_b("split")
        bias: Sizes = {"exp_probs_b.bias": (self.experts.n_expert,)}
        return sizes if il < self.n_layer_dense else sizes | bias

    def _kv_b(self, kv_b: KvB) -> Sizes:
        if kv_b == "joined":
            return {"attn_kv_b": (self.kv_lora_rank, self.n_head * (self.d_nope + self.d_v))}
        return {
            "attn_k_b": (self.d_nope, self.kv_lora_rank, self.n_head),
            "attn_v_b": (self.kv_lora_rank, self.d_v, self.n_head),
        }

    def stored_sizes(self, name: str, ne: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """ik_llama.cpp stacks the heads' rows of attn_k_b and attn_v_b."""
        return ((ne[0], ne[1] * ne[2]),) if name.endswith(("k_b.weight", "v_b.weight")) else ()

    # -- graphs -------------------------------------------------------------------------------

    def cache(self, il: int, n_ctx: int, n_batch: int, options: Options) -> Cache:
        if options.mla:
            return latent_cache(il, n_ctx, self.kv_lora_rank + self.n_rot, options.cache_k)
        return kv_cache(
            il, n_ctx, d_k=self.d_k, d_v=self.d_v, n_head_kv=self.n_head,
            types=(options.cache_k, options.cache_v),
        )  # fmt: skip

    def form(self, batch: Batch) -> str:
        """The form of attention for a batch: prompts expand the latent cache (mla=3)."""
        options = batch.options
        if not options.mla:
            return "standard"
        expands = options.mla == 3 and options.flash and batch.n_tokens >= options.expand_from
        return "expanded" if expands else "latent"

    def attention(self, x: Node, layer: Layer, cache: Cache, batch: Batch) -> Node:
        numbers = Mla(
            n_head=self.n_head, q_lora_rank=self.q_lora_rank, kv_lora_rank=self.kv_lora_rank,
            d_nope=self.d_nope, n_rot=self.n_rot, d_v=self.d_v, eps=self.rms_eps,
            kq_scale=self.kq_scale,
        )  # fmt: skip

        def rotate(y: Node, offset: int) -> Node:
            return self.rope.rotate(y, batch.pos, n_rot=self.n_rot, mode="normal", offset=offset,
                                    attn_factor=self.rope_attn_factor)  # fmt: skip

        scaling = partial(self.tempered, pos=batch.pos) if self.temperature_scale else None
        form = self.form(batch)
        return mla(layer, x, cache, batch, numbers, rotate, form=form, temperature=scaling)

    def tempered(self, q: Node, pos: Node) -> Node:
        """q with Mistral Large 3's temperature."""
        length = self.temperature_length or self.rope.n_ctx_orig
        return tempered(q, pos, strength=self.temperature_scale, length=length)

    def feed_forward(self, x: Node, layer: Layer, batch: Batch) -> Node:
        if layer.il < self.n_layer_dense:
            return layer.label(swiglu_mlp(layer, x, fused=batch.options.fused), "ffn_out")
        return moe(layer, x, self.experts, fused=batch.options.fused)


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


def _yarn_log_mul(keys: Keys, value: float) -> float:
    """0.1 x mscale_all_dim. Some files have mscale_all_dim itself, which is at least 0.707."""
    if value <= 0.5:
        return value
    warn(
        f"key '{keys.architecture}.rope.scaling.yarn_log_multiplier': {value} is taken for "
        "mscale_all_dim, because 0.1 x mscale_all_dim is at most 0.5"
    )
    return 0.1 * value
