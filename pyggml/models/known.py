"""The keys and tensors of each architecture that pyggml knows.

A key or tensor that is not listed is an error, because it may change what the model computes. Keys
of the tokenizer, `general.*` and other namespaces do not belong to the architecture and are not
checked. The lists follow what llama.cpp reads (llama-arch.cpp, llama-model.cpp,
models/deepseek2.cpp) and what gguf-py's converters write.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pyggml.errors import GGUFError

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
#: Name prefixes of tensors outside the language model: vision, projectors, audio.
_OTHER_TOWERS = ("v.", "mm.", "a.", "resampler.")


@dataclass(frozen=True, slots=True)
class Known:
    """The keys (without the architecture's prefix) and tensors of an architecture.

    keys      keys that pyggml uses
    neutral   keys of features that pyggml does not compute -> the values that switch them off
    harmless  keys that never change the result
    layer     tensors of a layer that are not matrices, without `blk.N.`
    products  matrices of a layer, without `blk.N.` and `.weight`. Each may have a factor
              NAME.scale, which multiplies its product. NAME.input_scale is accepted but unused: it
              is for 4-bit activations, and ours have at least 16 bits.
    model     tensors outside the layers
    """

    keys: frozenset[str]
    neutral: Mapping[str, tuple[Any, ...]]
    harmless: frozenset[str]
    layer: frozenset[str]
    products: frozenset[str]
    model: frozenset[str]

    def layer_tensors(self) -> frozenset[str]:
        """All names that may follow `blk.N.`."""
        names = set(self.layer)
        for product in self.products:
            names |= {f"{product}.{suffix}" for suffix in ("weight", "scale", "input_scale")}
        return frozenset(names)


#: Keys of other architectures -> the values that switch them off.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "moe_every_n_layers": (0, 1),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.alpha": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (-1.0, 1.0),
    "router_logit_softcapping": (0.0,),
}
_HARMLESS = frozenset(
    {
        "attention.layer_norm_epsilon", "classifier.output_labels", "pooling_type",
        "rope.scaling.finetuned", "tensor_data_layout", "use_parallel_residual",
    }
)  # fmt: skip

KNOWN: dict[str, Known] = {
    "deepseek2": Known(
        keys=frozenset(
            {
                "attention.head_count", "attention.head_count_kv", "attention.key_length",
                "attention.key_length_mla", "attention.kv_lora_rank",
                "attention.layer_norm_rms_epsilon", "attention.q_lora_rank",
                "attention.temperature_length", "attention.temperature_scale",
                "attention.value_length", "attention.value_length_mla", "block_count",
                "context_length", "embedding_length", "expert_count",
                "expert_feed_forward_length", "expert_gating_func", "expert_group_count",
                "expert_group_used_count", "expert_shared_count",
                "expert_shared_feed_forward_length", "expert_used_count", "expert_weights_norm",
                "expert_weights_scale", "feed_forward_length", "leading_dense_block_count",
                "nextn_predict_layers", "rope.dimension_count", "rope.freq_base",
                "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.factor",
                "rope.scaling.original_context_length", "rope.scaling.type",
                "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
                "rope.scaling.yarn_log_multiplier", "vocab_size",
            }
        ),
        neutral=_NEUTRAL,
        harmless=_HARMLESS,
        layer=frozenset(
            {
                "attn_norm.weight", "attn_q_a_norm.weight", "attn_kv_a_norm.weight",
                "ffn_norm.weight", "exp_probs_b.bias",
            }
        ),
        products=frozenset(
            {
                "attn_q", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b",
                "attn_v_b", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "ffn_gate_inp",
                "ffn_gate_exps", "ffn_up_exps", "ffn_gate_up_exps", "ffn_down_exps",
                "ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp",
            }
        ),
        model=frozenset(
            {
                "token_embd.weight", "output_norm.weight", "output.weight", "output.scale",
                "output.input_scale",
            }
        ),
    ),
}  # fmt: skip


def check_known(
    architecture: str,
    fields: Mapping[str, Any],
    tensors: Collection[str],
    n_layer: int,
    n_block: int,
) -> None:
    """Raise a GGUFError for keys and tensors of the architecture that pyggml does not know.

    Tensors of blocks n_layer .. n_block - 1 are not checked: those blocks are left out. One warning
    names all keys and tensors that are ignored because they change nothing.
    """
    known = KNOWN[architecture]
    ignored = _check_keys(known, architecture, fields) + _check_tensors(
        known, architecture, tensors, n_layer, n_block
    )
    if ignored:
        warnings.warn(f"{architecture}: not used: {', '.join(sorted(ignored))}", stacklevel=3)


def _check_keys(known: Known, architecture: str, fields: Mapping[str, Any]) -> list[str]:
    unknown: list[str] = []
    ignored: list[str] = []
    for key, value in fields.items():
        prefix, _, name = key.partition(".")
        if prefix != architecture or name in known.keys:
            continue
        if name in known.harmless:
            ignored.append(key)
        elif name not in known.neutral:
            unknown.append(key)
        elif value not in known.neutral[name]:
            neutral = " or ".join(map(str, known.neutral[name]))
            raise GGUFError(f"key '{key}': pyggml does not compute {value}; it must be {neutral}")
    if unknown:
        raise GGUFError(
            f"key{'s' * (len(unknown) > 1)} {_listing(unknown)}: unknown for architecture "
            f"{architecture!r}, and the result may depend on it; try a newer pyggml"
        )
    return ignored


def _check_tensors(
    known: Known, architecture: str, tensors: Collection[str], n_layer: int, n_block: int
) -> list[str]:
    names = known.layer_tensors()
    unknown: list[str] = []
    ignored: list[str] = []
    for tensor in tensors:
        layer = _LAYER.fullmatch(tensor)
        if tensor in known.model or (layer and _is_known(layer, names, n_layer, n_block)):
            continue
        (ignored if tensor.startswith(_OTHER_TOWERS) else unknown).append(tensor)
    if unknown:
        raise GGUFError(
            f"tensor{'s' * (len(unknown) > 1)} {_listing(unknown)}: unknown for architecture "
            f"{architecture!r} with {n_block} blocks, and the result may depend on it; try a newer "
            "pyggml"
        )
    return ignored


def _is_known(layer: re.Match[str], names: Collection[str], n_layer: int, n_block: int) -> bool:
    il = int(layer[1])
    return layer[2] in names if il < n_layer else il < n_block


def _listing(names: list[str]) -> str:
    first = ", ".join(map(repr, names[:3]))
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
