"""What architectures with DeepSeek's latent attention have in common: keys, tensors and graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pyggml.gguf import GGUFFile
from pyggml.models.base import Architecture, Sizes
from pyggml.models.batch import Batch
from pyggml.models.keys import Keys, group, key
from pyggml.models.layers import Rope, mlp_tensors, swiglu_mlp
from pyggml.models.mla import Mla
from pyggml.models.moe import Experts, moe
from pyggml.models.weights import Layer
from pyggml.node import Node
from pyggml.where import warn


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent(Architecture):
    """Latent attention (mla.py), and experts after the first dense layers.

    d_nope  attention.key_length_mla, or key_length, minus n_rot
    d_v     attention.value_length_mla, or value_length
    merged  whether experts' up and gate are one tensor, ffn_gate_up_exps
    """

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
    merged: bool = False

    def check(self, keys: Keys) -> None:
        self.experts.check(keys, self.n_layer, self.n_layer_dense)
        if self.n_layer_dense and not self.n_ff:
            keys.integer("feed_forward_length")  # raises
        if self.rope.scaling == "yarn" and self.rope.freq_scale != 1 and not self.yarn_log_mul:
            warn(
                f"key '{keys.architecture}.rope.scaling.yarn_log_multiplier' is missing: using "
                "llama.cpp's attention scale for such files, which may be wrong for this model"
            )

    @property
    def d_k(self) -> int:
        """Head size of keys in the standard form: d_nope + n_rot."""
        return self.d_nope + self.n_rot

    @property
    def rope_attn_factor(self) -> float:
        """rope_ext's attn_factor."""
        raise NotImplementedError

    @property
    def kq_scale(self) -> float:
        """The scale of q.k."""
        raise NotImplementedError

    @property
    def log_factor(self) -> float:
        """L = ln(factor), or 0 for scaling type none."""
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
        sizes |= self.kv_b_tensors()
        sizes["attn_output"] = (self.n_head * self.d_v, n_embd)
        sizes["ffn_norm"] = (n_embd,)
        if il < self.n_layer_dense:
            return sizes | mlp_tensors(n_embd, self.n_ff)
        return sizes | self.experts.tensors(n_embd, merged=self.merged)

    def optional_tensors(self, il: int) -> Sizes:
        return {} if il < self.n_layer_dense else {"exp_probs_b.bias": (self.experts.n_expert,)}

    def kv_b_tensors(self) -> Sizes:
        """The expansion of keys and values, in the layout that the file must have."""
        return {
            "attn_k_b": (self.d_nope, self.kv_lora_rank, self.n_head),
            "attn_v_b": (self.kv_lora_rank, self.d_v, self.n_head),
        }

    def stored_sizes(self, name: str, ne: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """ik_llama.cpp stacks the heads' rows of attn_k_b and attn_v_b."""
        stacked = name.endswith(("attn_k_b.weight", "attn_v_b.weight"))
        return ((ne[0], ne[1] * ne[2]),) if stacked else ()

    # -- graphs -------------------------------------------------------------------------------

    def form(self, batch: Batch) -> str:
        """The form of attention for a batch: prompts expand the latent cache (mla=3)."""
        options = batch.options
        if not options.mla:
            return "standard"
        expands = options.mla == 3 and options.flash and batch.n_tokens >= options.expand_from
        return "expanded" if expands else "latent"

    @property
    def mla_numbers(self) -> Mla:
        """The numbers of `mla`."""
        return Mla(
            n_head=self.n_head, q_lora_rank=self.q_lora_rank, kv_lora_rank=self.kv_lora_rank,
            d_nope=self.d_nope, n_rot=self.n_rot, d_v=self.d_v, eps=self.rms_eps,
            kq_scale=self.kq_scale,
        )  # fmt: skip

    def rotation(self, batch: Batch) -> Callable[[Node, int], Node]:
        """`mla`'s rotate: neighbours turn together."""

        def rotate(x: Node, offset: int) -> Node:
            return self.rope.rotate(x, batch.pos, n_rot=self.n_rot, mode="normal", offset=offset,
                                    attn_factor=self.rope_attn_factor)  # fmt: skip

        return rotate

    def feed_forward(self, x: Node, layer: Layer, batch: Batch) -> Node:
        if layer.il < self.n_layer_dense:
            return layer.label(swiglu_mlp(layer, x, fused=batch.options.fused), "ffn_out")
        return moe(layer, x, self.experts, fused=batch.options.fused)


# -- reading a file -----------------------------------------------------------------------------


def head_sizes(keys: Keys, values: dict[str, Any], *, absorbed: bool) -> dict[str, int]:
    """d_nope and d_v.

    absorbed  The file is for absorbed attention: its plain keys describe one shared head of
              kv_lora_rank + rope, and the true head sizes are in the _mla keys
    """
    kv_lora_rank, n_rot = values["kv_lora_rank"], values["n_rot"]
    if n_rot % 2:
        keys.fail("rope.dimension_count", f"{n_rot}, must be even")
    if absorbed:
        keys.equal("attention.key_length", kv_lora_rank + n_rot, "kv_lora_rank + rope")
        keys.equal("attention.value_length", kv_lora_rank, "kv_lora_rank")
        keys.equal("attention.head_count_kv", 1, "key_length_mla")
    else:
        reason = "head_count without key_length_mla"
        keys.equal("attention.head_count_kv", values["n_head"], reason)
    suffix = "_mla" if absorbed else ""
    key_length = keys.integer(f"attention.key_length{suffix}", least=n_rot + 1)
    value_length = keys.integer(f"attention.value_length{suffix}")
    return {"d_nope": key_length - n_rot, "d_v": value_length}


def has_choice_bias(file: GGUFFile, values: dict[str, Any]) -> bool:
    """Whether every layer with experts has exp_probs_b.bias."""
    layers = range(values["n_layer_dense"], values["n_block"] - values["n_nextn"])
    biases = [f"blk.{il}.exp_probs_b.bias" in file.tensors for il in layers]
    return any(biases) and all(biases)


def yarn_log_mul(keys: Keys, value: float) -> float:
    """0.1 x mscale_all_dim. Some files have mscale_all_dim itself, which is at least 0.707."""
    if value <= 0.5:
        return value
    warn(
        f"key '{keys.architecture}.rope.scaling.yarn_log_multiplier': {value} is taken for "
        "mscale_all_dim, because 0.1 x mscale_all_dim is at most 0.5"
    )
    return 0.1 * value
