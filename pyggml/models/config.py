"""DeepSeek-2 hyperparameters as GGUF keys give them, checked against each other."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeAlias

from pyggml.errors import GGUFError

KvB: TypeAlias = Literal["split", "joined"]
ARCHITECTURE = "deepseek2"

MAX_LAYERS = 10_000
_MAX_SIZE = 1 << 31
_GATING: dict[int, Literal["softmax", "sigmoid"]] = {0: "softmax", 1: "softmax", 2: "sigmoid"}


@dataclass(frozen=True, slots=True)
class DeepSeek2Config:
    """Sizes and constants of a DeepSeek-V2 or -V3 model; the GGUF key of each beside it.

    The keys lack the prefix `deepseek2.`; "-> x" is the value where the key is missing.
    """

    n_layer: int  # block_count
    n_layer_dense: int  # leading_dense_block_count -> 0
    n_ctx_train: int  # context_length
    n_vocab: int  # vocab_size -> number of tokenizer.ggml.tokens
    n_embd: int  # embedding_length
    n_head: int  # attention.head_count
    q_lora_rank: int | None  # attention.q_lora_rank -> None: one attn_q instead of attn_q_a, _b
    kv_lora_rank: int  # attention.kv_lora_rank
    d_nope: int  # attention.key_length_mla, or key_length without it, less rope.dimension_count
    n_rot: int  # rope.dimension_count
    d_v: int  # attention.value_length_mla, or value_length without it
    n_ff: int  # feed_forward_length (dense layers)
    n_ff_exp: int  # expert_feed_forward_length
    n_expert: int  # expert_count -> 0
    n_expert_used: int  # expert_used_count
    n_expert_shared: int  # expert_shared_count -> 0
    rms_eps: float = 1e-6  # attention.layer_norm_rms_epsilon (required)
    gating: Literal["softmax", "sigmoid"] = "softmax"  # expert_gating_func 1, 2
    weights_norm: bool = False  # expert_weights_norm
    weights_scale: float = 0.0  # expert_weights_scale; 0 (missing) and 1 scale nothing
    n_group: int = 1  # expert_group_count
    n_group_used: int = 1  # expert_group_used_count
    rope_freq_base: float = 10000.0  # rope.freq_base
    rope_scaling: Literal["none", "linear", "yarn"] = "linear"  # rope.scaling.type
    rope_factor: float = 1.0  # rope.scaling.factor; 0 is 1
    n_ctx_orig: int = 0  # rope.scaling.original_context_length -> context_length
    yarn_log_mul: float = 0.0  # rope.scaling.yarn_log_multiplier (0.1 x mscale_all_dim)
    attn_factor: float = 1.0  # rope.scaling.attn_factor
    kv_b: KvB = "split"  # attn_k_b + attn_v_b, or attn_kv_b

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any], tensors: Collection[str] = ()) -> DeepSeek2Config:
        """The hyperparameters in the keys of a file (`GGUFFile.fields`).

        `kv_b` follows the names in `tensors` where given (split wins if both are there), else the
        presence of key_length_mla. Warns of a yarn file without yarn_log_multiplier (`kq_scale`).
        GGUFError names the key that is missing, of the wrong type, or contradicts another.
        """
        config = _read(_Keys(fields), tensors)
        if config.rope_scaling == "yarn" and config.rope_factor != 1 and not config.yarn_log_mul:
            warnings.warn(
                f"key '{ARCHITECTURE}.rope.scaling.yarn_log_multiplier' is missing: attention is "
                "scaled as llama.cpp does for such a file; the model may mean something else",
                stacklevel=2,
            )
        return config

    @property
    def d_k(self) -> int:
        """Head size of keys in the standard form: nope and rope parts."""
        return self.d_nope + self.n_rot

    @property
    def n_ff_shared(self) -> int:
        """Width of the shared experts as one feed-forward net."""
        return self.n_ff_exp * self.n_expert_shared

    @property
    def n_group_top(self) -> int:
        """How many of its experts score a group: the best one (V2) or the best two (V3)."""
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
        """rope_ext's attn_factor a, with A the key attn_factor and L = ln(factor).

        yarn: a = A c / (1 + 0.1 L), c = 1 with a yarn_log_multiplier, else 1 + 0.1 L.
        linear and none: a = A. As llama.cpp has it.
        """
        if self.rope_scaling == "yarn" and self.yarn_log_mul:
            return self.attn_factor / (1 + 0.1 * self._log_factor)
        return self.attn_factor

    @property
    def kq_scale(self) -> float:
        """Scale of q.k: ms^2 / sqrt(d_k), ms = a (1 + 0.1 L) (1 + yarn_log_multiplier L).

        a is `rope_attn_factor`, L = ln(factor), 0 for scaling type none. As llama.cpp has it.
        """
        log = self._log_factor
        ms = self.rope_attn_factor * (1 + 0.1 * log) * (1 + self.yarn_log_mul * log)
        return ms * ms / math.sqrt(self.d_k)

    @property
    def _log_factor(self) -> float:
        return -math.log(self.freq_scale)


class _Keys:
    """Typed and bounded look-ups among the keys of the architecture."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = fields
        if (found := fields.get("general.architecture")) != ARCHITECTURE:
            raise GGUFError(f"key 'general.architecture': {found!r}, must be {ARCHITECTURE!r}")

    def fail(self, key: str, problem: str) -> NoReturn:
        raise GGUFError(f"key '{ARCHITECTURE}.{key}': {problem}")

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.fields.get(f"{ARCHITECTURE}.{key}", default)
        if value is None:
            self.fail(key, "is missing")
        if type(value) is not kind:
            self.fail(key, f"is of type {type(value).__name__}, must be {kind.__name__}")
        return value

    def has(self, key: str) -> bool:
        return f"{ARCHITECTURE}.{key}" in self.fields

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = _MAX_SIZE
    ) -> int:
        value: int = self.get(key, int, default)
        if not least <= value <= most:
            self.fail(key, f"{value}, must be {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A finite float greater than 0, or 0 too where `zero`."""
        value: float = self.get(key, float, default)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            limit = "not negative" if zero else "greater than 0"
            self.fail(key, f"{value}, must be finite and {limit}")
        return value

    def equal(self, key: str, expected: int, because: str) -> None:
        if (value := self.get(key, int, expected)) != expected:
            self.fail(key, f"{value}, but {because} makes it {expected}")


def _read(keys: _Keys, tensors: Collection[str]) -> DeepSeek2Config:
    n_layer = keys.integer("block_count", most=MAX_LAYERS)
    n_layer_dense = keys.integer("leading_dense_block_count", 0, least=0, most=n_layer)
    n_ctx = keys.integer("context_length")
    return DeepSeek2Config(
        n_layer=n_layer,
        n_layer_dense=n_layer_dense,
        n_ctx_train=n_ctx,
        n_vocab=_n_vocab(keys),
        n_embd=keys.integer("embedding_length"),
        rms_eps=keys.number("attention.layer_norm_rms_epsilon"),
        n_ff=_n_ff(keys, n_layer_dense > 0),
        kv_b=_kv_b(keys, tensors),
        **_attention(keys),
        **_rope_scaling(keys, n_ctx),
        **_experts(keys, n_layer > n_layer_dense),
    )


def _n_ff(keys: _Keys, any_dense: bool) -> int:
    return keys.integer("feed_forward_length", None if any_dense else 0, least=int(any_dense))


def _n_vocab(keys: _Keys) -> int:
    tokens = keys.fields.get("tokenizer.ggml.tokens")
    known = len(tokens) if isinstance(tokens, Sized) else None
    n_vocab = keys.integer("vocab_size", known)
    if known is not None and known != n_vocab:
        keys.fail("vocab_size", f"{n_vocab}, but tokenizer.ggml.tokens holds {known}")
    return n_vocab


def _kv_b(keys: _Keys, tensors: Collection[str]) -> KvB:
    if not tensors:
        return "split" if keys.has("attention.key_length_mla") else "joined"
    if {"blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"} <= set(tensors):
        return "split"
    if "blk.0.attn_kv_b.weight" in tensors:
        return "joined"
    raise GGUFError("neither blk.0.attn_kv_b nor blk.0.attn_k_b and attn_v_b is in the file")


def _attention(keys: _Keys) -> dict[str, Any]:
    n_head = keys.integer("attention.head_count")
    kv_lora_rank = keys.integer("attention.kv_lora_rank")
    n_rot = keys.integer("rope.dimension_count")
    if n_rot % 2:
        keys.fail("rope.dimension_count", f"{n_rot}, must be even")
    # A file for absorbed attention describes one shared head of kv_lora + rope; the true sizes
    # stand under the _mla keys.
    if mla := keys.has("attention.key_length_mla"):
        keys.equal("attention.key_length", kv_lora_rank + n_rot, "kv_lora_rank + rope")
        keys.equal("attention.value_length", kv_lora_rank, "kv_lora_rank")
        keys.equal("attention.head_count_kv", 1, "key_length_mla")
    else:
        keys.equal("attention.head_count_kv", n_head, "head_count, without key_length_mla,")
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


def _rope_scaling(keys: _Keys, n_ctx: int) -> dict[str, Any]:
    kind = keys.get("rope.scaling.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        keys.fail("rope.scaling.type", f"{kind!r}, must be none, linear or yarn")
    return {
        "rope_freq_base": keys.number("rope.freq_base", 10000.0),
        "rope_scaling": kind,
        "rope_factor": keys.number("rope.scaling.factor", 1.0, zero=True) or 1.0,
        "n_ctx_orig": keys.integer("rope.scaling.original_context_length", n_ctx),
        "yarn_log_mul": keys.number("rope.scaling.yarn_log_multiplier", 0.0, zero=True),
        "attn_factor": keys.number("rope.scaling.attn_factor", 1.0),
    }


def _experts(keys: _Keys, any_moe: bool) -> dict[str, Any]:
    required = None if any_moe else 0
    least = int(any_moe)
    n_expert = keys.integer("expert_count", required, least=least)
    used = keys.integer("expert_used_count", required, least=least, most=n_expert)
    gating = keys.integer("expert_gating_func", 1, least=0)
    if gating not in _GATING:
        keys.fail("expert_gating_func", f"{gating}, must be 1 (softmax) or 2 (sigmoid)")
    n_group = keys.integer("expert_group_count", 1, least=0) or 1
    group_used = keys.integer("expert_group_used_count", n_group, least=0, most=n_group) or n_group
    if n_group > 1:
        size, rest = divmod(n_expert, n_group)
        if rest or size < 2:
            problem = f"{n_group} groups of at least 2 do not divide {n_expert} experts"
            keys.fail("expert_group_count", problem)
        if size * group_used < used:
            problem = f"{group_used} groups of {size} hold fewer than the {used} experts used"
            keys.fail("expert_group_used_count", problem)
    return {
        "n_expert": n_expert,
        "n_expert_used": used,
        "n_expert_shared": keys.integer("expert_shared_count", 0, least=0),
        "n_ff_exp": keys.integer("expert_feed_forward_length", required, least=least),
        "gating": _GATING[gating],
        "weights_norm": keys.get("expert_weights_norm", bool, False),
        "weights_scale": keys.number("expert_weights_scale", 0.0, zero=True),
        "n_group": n_group,
        "n_group_used": group_used,
    }
