"""DeepSeek-2 hyperparameters, read from GGUF keys and checked against each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pyggml.errors import GGUFError
from pyggml.models.keys import Keys
from pyggml.models.known import check_known

KvB: TypeAlias = Literal["split", "joined"]
ARCHITECTURE = "deepseek2"

MAX_LAYERS = 10_000
_GATING: dict[int, Literal["softmax", "sigmoid"]] = {1: "softmax", 2: "sigmoid"}


@dataclass(frozen=True, slots=True)
class DeepSeek2Config:
    """Sizes and constants of a DeepSeek-V2 or -V3 model.

    Each comment gives the GGUF key without the prefix `deepseek2.`, and after "->" the value if the
    key is missing.
    """

    n_layer: int  # block_count minus nextn_predict_layers
    n_layer_dense: int  # leading_dense_block_count -> 0
    n_ctx_train: int  # context_length
    n_vocab: int  # vocab_size -> number of tokenizer.ggml.tokens
    n_embd: int  # embedding_length
    n_head: int  # attention.head_count
    q_lora_rank: int | None  # attention.q_lora_rank -> None: one attn_q instead of attn_q_a, _b
    kv_lora_rank: int  # attention.kv_lora_rank
    d_nope: int  # attention.key_length_mla -> key_length; minus rope.dimension_count
    n_rot: int  # rope.dimension_count
    d_v: int  # attention.value_length_mla -> value_length
    n_ff: int  # feed_forward_length (dense layers)
    n_ff_exp: int  # expert_feed_forward_length
    n_expert: int  # expert_count -> 0
    n_expert_used: int  # expert_used_count
    n_expert_shared: int  # expert_shared_count -> 0
    rms_eps: float = 1e-6  # attention.layer_norm_rms_epsilon (required)
    gating: Literal["softmax", "sigmoid"] = "softmax"  # expert_gating_func 1, 2 (see _gating)
    weights_norm: bool = False  # expert_weights_norm
    weights_scale: float = 0.0  # expert_weights_scale -> 0; 0 and 1 scale nothing
    n_group: int = 1  # expert_group_count
    n_group_used: int = 1  # expert_group_used_count
    rope_freq_base: float = 10000.0  # rope.freq_base
    rope_scaling: Literal["none", "linear", "yarn"] = "linear"  # rope.scaling.type
    rope_factor: float = 1.0  # rope.scaling.factor; 0 means 1
    n_ctx_orig: int = 0  # rope.scaling.original_context_length -> context_length
    yarn_log_mul: float = 0.0  # rope.scaling.yarn_log_multiplier (0.1 x mscale_all_dim)
    attn_factor: float = 1.0  # rope.scaling.attn_factor
    yarn_beta_fast: float = 32.0  # rope.scaling.yarn_beta_fast
    yarn_beta_slow: float = 1.0  # rope.scaling.yarn_beta_slow
    temperature_scale: float = 0.0  # attention.temperature_scale; 0 means none
    temperature_length: int = 0  # attention.temperature_length -> n_ctx_orig
    n_layer_nextn: int = 0  # nextn_predict_layers: blocks after the layers, not computed
    kv_b: KvB = "split"  # attn_k_b + attn_v_b, or attn_kv_b

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], tensors: Collection[str] = ()) -> DeepSeek2Config:
        """The hyperparameters in the keys of a file (`GGUFFile.fields`).

        `kv_b` follows the tensor names if you pass `tensors` (split wins if a file has both
        layouts), and otherwise the presence of key_length_mla.

        GGUFError names a key that is missing, has the wrong type or contradicts another one, and
        any key or tensor of the architecture that pyggml does not know (see `known`).

        Warns about a yarn file without yarn_log_multiplier (see `kq_scale`), about a missing
        expert_gating_func, and about multi-token prediction blocks, which are left out.
        """
        config = _read(Keys(ARCHITECTURE, fields), tensors)
        n_block = config.n_layer + config.n_layer_nextn
        check_known(ARCHITECTURE, fields, tensors, config.n_layer, n_block)
        if config.n_layer_nextn:
            warnings.warn(
                f"key '{ARCHITECTURE}.nextn_predict_layers': the last {config.n_layer_nextn} of "
                f"{n_block} blocks predict further tokens (MTP) and are left out",
                stacklevel=2,
            )
        if config.rope_scaling == "yarn" and config.rope_factor != 1 and not config.yarn_log_mul:
            warnings.warn(
                f"key '{ARCHITECTURE}.rope.scaling.yarn_log_multiplier' is missing: using "
                "llama.cpp's attention scale for such files, which may be wrong for this model",
                stacklevel=2,
            )
        return config

    @property
    def d_k(self) -> int:
        """Head size of keys in the standard form: d_nope + n_rot."""
        return self.d_nope + self.n_rot

    @property
    def n_ff_shared(self) -> int:
        """Width of the shared experts, which are one feed-forward net."""
        return self.n_ff_exp * self.n_expert_shared

    @property
    def n_group_top(self) -> int:
        """Number of best experts whose scores add up to a group's score: one (V2) or two (V3)."""
        return 2 if self.gating == "sigmoid" else 1

    @property
    def freq_scale(self) -> float:
        """rope_ext's freq_scale."""
        return 1.0 if self.rope_scaling == "none" else 1.0 / self.rope_factor

    @property
    def ext_factor(self) -> float:
        """rope_ext's ext_factor."""
        return 1.0 if self.rope_scaling == "yarn" else 0.0

    @property
    def rope_attn_factor(self) -> float:
        """rope_ext's attn_factor a, as in llama.cpp.

        yarn with a yarn_log_multiplier: a = A / (1 + 0.1 L). Otherwise a = A. Here A is the key
        attn_factor and L = ln(factor).
        """
        if self.rope_scaling == "yarn" and self.yarn_log_mul:
            return self.attn_factor / (1 + 0.1 * self._log_factor)
        return self.attn_factor

    @property
    def kq_scale(self) -> float:
        """Scale of q.k, as in llama.cpp: ms^2 / sqrt(d_k).

        ms = a (1 + 0.1 L) (1 + yarn_log_multiplier L), where a is `rope_attn_factor` and
        L = ln(factor), or 0 for scaling type none.
        """
        log = self._log_factor
        ms = self.rope_attn_factor * (1 + 0.1 * log) * (1 + self.yarn_log_mul * log)
        return ms * ms / math.sqrt(self.d_k)

    @property
    def _log_factor(self) -> float:
        return -math.log(self.freq_scale)


def _read(keys: Keys, tensors: Collection[str]) -> DeepSeek2Config:
    n_block = keys.integer("block_count", most=MAX_LAYERS)
    n_layer_nextn = keys.integer("nextn_predict_layers", 0, least=0, most=n_block - 1)
    n_layer = n_block - n_layer_nextn
    n_layer_dense = keys.integer("leading_dense_block_count", 0, least=0, most=n_layer)
    n_ctx, n_vocab = keys.integer("context_length"), _n_vocab(keys)
    any_moe = n_layer > n_layer_dense
    return DeepSeek2Config(
        n_layer=n_layer,
        n_layer_dense=n_layer_dense,
        n_layer_nextn=n_layer_nextn,
        n_ctx_train=n_ctx,
        n_vocab=n_vocab,
        n_embd=keys.integer("embedding_length"),
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
        n_ff=_n_ff(keys, n_layer_dense > 0),
        kv_b=_kv_b(keys, tensors),
        gating=_gating(keys, n_block, n_vocab, any_moe),
        **_attention(keys),
        **_rope_scaling(keys, n_ctx),
        **_experts(keys, any_moe),
    )


def _n_ff(keys: Keys, any_dense: bool) -> int:
    return keys.integer("feed_forward_length", None if any_dense else 0, least=int(any_dense))


def _n_vocab(keys: Keys) -> int:
    tokens = keys.fields.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, Sized) else None
    n_vocab = keys.integer("vocab_size", n_tokens)
    if n_tokens is not None and n_tokens != n_vocab:
        keys.fail("vocab_size", f"{n_vocab}, but tokenizer.ggml.tokens has {n_tokens} tokens")
    return n_vocab


def _kv_b(keys: Keys, tensors: Collection[str]) -> KvB:
    if not tensors:
        return "split" if keys.has("attention.key_length_mla") else "joined"
    if {"blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"} <= set(tensors):
        return "split"
    if "blk.0.attn_kv_b.weight" in tensors:
        return "joined"
    raise GGUFError("the file has neither blk.0.attn_kv_b nor blk.0.attn_k_b and attn_v_b")


def _attention(keys: Keys) -> dict[str, Any]:
    n_head = keys.integer("attention.head_count")
    kv_lora_rank = keys.integer("attention.kv_lora_rank")
    n_rot = keys.integer("rope.dimension_count")
    if n_rot % 2:
        keys.fail("rope.dimension_count", f"{n_rot}, must be even")
    # The plain keys of a file for absorbed attention describe one shared head of kv_lora + rope;
    # the true head sizes are in the _mla keys.
    if mla := keys.has("attention.key_length_mla"):
        keys.equal("attention.key_length", kv_lora_rank + n_rot, "kv_lora_rank + rope")
        keys.equal("attention.value_length", kv_lora_rank, "kv_lora_rank")
        keys.equal("attention.head_count_kv", 1, "key_length_mla")
    else:
        keys.equal("attention.head_count_kv", n_head, "head_count without key_length_mla")
    suffix = "_mla" if mla else ""
    return {
        "n_head": n_head,
        "kv_lora_rank": kv_lora_rank,
        "n_rot": n_rot,
        "d_nope": keys.integer(f"attention.key_length{suffix}", least=n_rot + 1) - n_rot,
        "d_v": keys.integer(f"attention.value_length{suffix}"),
        "q_lora_rank": keys.integer("attention.q_lora_rank")
        if keys.has("attention.q_lora_rank")
        else None,
    }


def _rope_scaling(keys: Keys, n_ctx: int) -> dict[str, Any]:
    scaling = keys.get("rope.scaling.type", str, "linear")
    if scaling not in ("none", "linear", "yarn"):
        keys.fail("rope.scaling.type", f"{scaling!r}, must be none, linear or yarn")
    old_factor = keys.number("rope.scale_linear", 1.0, zero=True)  # the key's name until 2023
    n_ctx_orig = keys.integer("rope.scaling.original_context_length", n_ctx)
    temperature = keys.number("attention.temperature_scale", 0.0, zero=True)
    length = keys.integer("attention.temperature_length", n_ctx_orig)
    return {
        "rope_freq_base": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": scaling,
        "rope_factor": keys.number("rope.scaling.factor", old_factor, zero=True) or 1.0,
        "n_ctx_orig": n_ctx_orig,
        "yarn_log_mul": keys.number("rope.scaling.yarn_log_multiplier", 0.0, zero=True),
        "attn_factor": keys.number("rope.scaling.attn_factor", 1.0),
        "yarn_beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "yarn_beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
        "temperature_scale": temperature,
        "temperature_length": length if temperature else 0,
    }


def _gating(keys: Keys, n_block: int, n_vocab: int, any_moe: bool) -> Literal["softmax", "sigmoid"]:
    """The gating function, with llama.cpp's defaults if the key is missing or 0.

    Softmax, as the first V2 files have no key; but sigmoid for GLM-4.7-Flash, whose first files
    have no key either and are recognized by their sizes.
    """
    number = keys.integer("expert_gating_func", 0, least=0)
    if number not in (0, *_GATING):
        keys.fail("expert_gating_func", f"{number}, must be 1 (softmax) or 2 (sigmoid)")
    if number:
        return _GATING[number]
    gating: Literal["softmax", "sigmoid"] = "softmax"
    if n_block in (47, 48) and n_vocab == 154_880:
        gating = "sigmoid"
    if any_moe:
        warnings.warn(
            f"key '{ARCHITECTURE}.expert_gating_func' is missing: choosing experts by {gating}, "
            "llama.cpp's default for such files, which may be wrong for this model",
            stacklevel=4,
        )
    return gating


def _experts(keys: Keys, any_moe: bool) -> dict[str, Any]:
    required = None if any_moe else 0
    least = int(any_moe)
    n_expert = keys.integer("expert_count", required, least=least)
    used = keys.integer("expert_used_count", required, least=least, most=n_expert)
    n_group = keys.integer("expert_group_count", 1, least=0) or 1
    group_used = keys.integer("expert_group_used_count", n_group, least=0, most=n_group) or n_group
    if n_group > 1:
        size, remainder = divmod(n_expert, n_group)
        if remainder or size < 2:
            problem = f"{n_group}, must divide {n_expert} experts into groups of at least 2"
            keys.fail("expert_group_count", problem)
        if size * group_used < used:
            problem = f"{group_used} groups of {size} have fewer than the {used} experts used"
            keys.fail("expert_group_used_count", problem)
    n_shared = keys.integer("expert_shared_count", 0, least=0)
    n_ff_exp = keys.integer("expert_feed_forward_length", required, least=least)
    reason = "expert_shared_count x expert_feed_forward_length"
    keys.equal("expert_shared_feed_forward_length", n_shared * n_ff_exp, reason)
    return {
        "n_expert": n_expert,
        "n_expert_used": used,
        "n_expert_shared": n_shared,
        "n_ff_exp": n_ff_exp,
        "weights_norm": keys.get("expert_weights_norm", bool, False),
        "weights_scale": keys.number("expert_weights_scale", 0.0, zero=True),
        "n_group": n_group,
        "n_group_used": group_used,
    }
