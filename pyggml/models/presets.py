"""DeepSeek-2 presets, and files with random weights for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np

from pyggml.dtypes import F32, TYPES, DType
from pyggml.errors import ShapeError, UnknownNameError
from pyggml.gguf.format import DEFAULT_ALIGNMENT
from pyggml.gguf.synth import drawn_type, fitting_type, random_tensor
from pyggml.gguf.writer import Progress, Tensor, write
from pyggml.models.config import ARCHITECTURE, MAX_LAYERS, DeepSeek2Config, KvB
from pyggml.models.tensors import tensor_sizes

_LITE = DeepSeek2Config(
    n_layer=27, n_layer_dense=1, n_ctx_train=163840, n_vocab=102400, n_embd=2048, n_head=16,
    q_lora_rank=None, kv_lora_rank=512, d_nope=128, n_rot=64, d_v=128, n_ff=10944, n_ff_exp=1408,
    n_expert=64, n_expert_used=6, n_expert_shared=2, weights_scale=1.0, rope_scaling="yarn",
    rope_factor=40.0, n_ctx_orig=4096, yarn_log_mul=0.0707,
)  # fmt: skip
_V3 = replace(
    _LITE, n_layer=61, n_layer_dense=3, n_vocab=129280, n_embd=7168, n_head=128, q_lora_rank=1536,
    n_ff=18432, n_ff_exp=2048, n_expert=256, n_expert_used=8, n_expert_shared=1, gating="sigmoid",
    weights_norm=True, weights_scale=2.5, n_group=8, n_group_used=4, yarn_log_mul=0.1,
)  # fmt: skip

#: The published models (sizes from their config.json), a small one for CPUs, and a tiny one for
#: tests with every feature of V3.
PRESETS: dict[str, DeepSeek2Config] = {
    "deepseek-v2-lite": _LITE,
    "deepseek-v3": _V3,
    "small": replace(
        _LITE, n_vocab=32000, n_embd=1024, n_head=8, n_ff=2816, n_ff_exp=512, n_expert=16,
        n_expert_used=4, n_expert_shared=1,
    ),
    "tiny": replace(
        _V3, n_layer=3, n_layer_dense=1, n_vocab=512, n_embd=256, n_head=4, q_lora_rank=96,
        kv_lora_rank=64, d_nope=32, n_rot=16, d_v=32, n_ff=512, n_ff_exp=128, n_expert=8,
        n_expert_used=2, n_group=4, n_group_used=2,
    ),
}  # fmt: skip

#: llama.cpp's general.file_type of a file whose weights are mostly of a type.
_FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_K": 10,
    "q3_K": 11, "q4_K": 14, "q5_K": 16, "q6_K": 18, "iq2_xxs": 19, "iq2_xs": 20, "iq3_xxs": 23,
    "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26, "iq2_s": 28, "iq4_xs": 30, "bf16": 32, "tq1_0": 36,
    "tq2_0": 37,
}  # fmt: skip


def preset(name: str, *, layers: int | None = None, kv_b: KvB = "split") -> DeepSeek2Config:
    """The preset called `name`, with `layers` layers if given, in either layout of kv_b.

    UnknownNameError for an unknown name, ShapeError for an impossible number of layers.
    """
    if name not in PRESETS:
        raise UnknownNameError(f"no preset {name!r}; choose from {', '.join(PRESETS)}")
    config = PRESETS[name]
    n_layer = config.n_layer if layers is None else layers
    if not 1 <= n_layer <= MAX_LAYERS:
        raise ShapeError(f"layers must be 1 to {MAX_LAYERS}, got {n_layer}")
    return replace(
        config, n_layer=n_layer, n_layer_dense=min(config.n_layer_dense, n_layer), kv_b=kv_b
    )


def synth(
    path: str | PathLike[str],
    config: DeepSeek2Config,
    *,
    type: str = "iq4_nl",
    seed: int = 0,
    name: str = "random",
    header_only: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write a GGUF file of the model with random weights, and return its size in bytes.

    Matrices have a standard deviation of 1/sqrt(fan-in), and norms are about 1. Norms, the router
    and its bias are f32. Rows that are not whole blocks of `type` become q8_0, or f16.
    output.weight is q6_K if `type` has fewer bits, as quantizers do it.
    """
    if seed < 0:
        raise ShapeError(f"seed must not be negative, got {seed}")
    preferred = drawn_type(type)
    tensors = list(random_tensors(config, preferred, seed))
    general: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        "general.name": name,
        "general.alignment": DEFAULT_ALIGNMENT,
        "general.file_type": _FILE_TYPES[preferred.name],
        "general.quantization_version": 2,
    }
    fields = general | config_fields(config) | _vocabulary(config.n_vocab)
    return write(path, fields, tensors, header_only=header_only, progress=progress)


def random_tensors(config: DeepSeek2Config, preferred: DType, seed: int) -> Iterator[Tensor]:
    """The tensors of the model with random values, their types chosen as `synth` describes."""
    for name, ne in tensor_sizes(config).items():
        leaf = name.split(".", 2)[-1] if name.startswith("blk.") else name
        if leaf.endswith("norm.weight"):
            yield random_tensor(name, F32, ne, std=0.05, mean=1.0, seed=seed)
        elif leaf == "exp_probs_b.bias":
            yield random_tensor(name, F32, ne, std=0.05, seed=seed)
        else:
            # attn_k_b is stored transposed: the model sums over its ne[1].
            fan_in = ne[1] if leaf == "attn_k_b.weight" else ne[0]
            type_ = fitting_type(_type_of(leaf, preferred), ne[0])
            yield random_tensor(name, type_, ne, std=fan_in**-0.5, seed=seed)


def _type_of(leaf: str, preferred: DType) -> DType:
    if leaf == "ffn_gate_inp.weight":
        return F32
    q6 = TYPES["q6_K"]
    if leaf == "output.weight" and preferred.nbytes * q6.block < q6.nbytes * preferred.block:
        return q6
    return preferred


def config_fields(config: DeepSeek2Config) -> dict[str, Any]:
    """The keys of a file of the model; DeepSeek2Config.from_gguf reads them back as `config`."""
    split = config.kv_b == "split"
    keys: dict[str, Any] = {
        "vocab_size": config.n_vocab,
        "context_length": config.n_ctx_train,
        "embedding_length": config.n_embd,
        "block_count": config.n_layer + config.n_layer_nextn,
        "nextn_predict_layers": config.n_layer_nextn or None,
        "leading_dense_block_count": config.n_layer_dense,
        "feed_forward_length": config.n_ff,
        "attention.head_count": config.n_head,
        "attention.head_count_kv": 1 if split else config.n_head,
        "attention.layer_norm_rms_epsilon": config.rms_eps,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + config.n_rot if split else config.d_k,
        "attention.value_length": config.kv_lora_rank if split else config.d_v,
        "attention.key_length_mla": config.d_k if split else None,
        "attention.value_length_mla": config.d_v if split else None,
        "expert_feed_forward_length": config.n_ff_exp,
        "expert_count": config.n_expert,
        "expert_used_count": config.n_expert_used,
        "expert_shared_count": config.n_expert_shared,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.n_group_used,
        "expert_weights_scale": config.weights_scale,
        "expert_weights_norm": config.weights_norm,
        "expert_gating_func": 2 if config.gating == "sigmoid" else 1,
        "rope.dimension_count": config.n_rot,
        "rope.freq_base": config.rope_freq_base,
        "rope.scaling.type": config.rope_scaling,
        "rope.scaling.factor": config.rope_factor,
        "rope.scaling.original_context_length": config.n_ctx_orig or config.n_ctx_train,
        "rope.scaling.yarn_log_multiplier": config.yarn_log_mul or None,
        "attention.temperature_scale": config.temperature_scale or None,
        "attention.temperature_length": config.temperature_length or None,
    }
    for key, value, default in (
        ("attn_factor", config.attn_factor, 1.0),
        ("yarn_beta_fast", config.yarn_beta_fast, 32.0),
        ("yarn_beta_slow", config.yarn_beta_slow, 1.0),
    ):
        if value != default:
            keys[f"rope.scaling.{key}"] = value
    fields = {f"{ARCHITECTURE}.{key}": v for key, v in keys.items() if v is not None}
    return {"general.architecture": ARCHITECTURE} | fields


def _vocabulary(n_vocab: int) -> dict[str, Any]:
    """Placeholder tokens <0>, <1>, ... with BOS and EOS and one merge; not a usable tokenizer."""
    tokens = [f"<{i}>" for i in range(n_vocab)]
    tokens[2:5] = ["a", "b", "ab"]
    types = np.ones(n_vocab, np.int32)
    types[:2] = 3  # control
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "deepseek-llm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }
