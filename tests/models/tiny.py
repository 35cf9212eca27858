"""Tiny models of transformers that between them have every feature of their architectures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    DeepseekV4Config,
    DeepseekV32Config,
    Glm4MoeConfig,
    GlmMoeDsaConfig,
    GptOssConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

#: Longer than the original length of the models whose rope is scaled.
TOKENS = [(31 * i * i + 7 * i) % 89 for i in range(45)]

#: For DeepSeek V4: two of its longest windows, and more rows than it chooses.
LONG = [(31 * i * i + 7 * i + i // 89) % 89 for i in range(301)]

SIZES: dict[str, Any] = {"vocab_size": 89, "num_hidden_layers": 2, "max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
BETAS = {"rope_theta": 100.0, "beta_fast": 1.5, "beta_slow": 0.25}


def llama(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**SIZES | {
        "hidden_size": 48, "intermediate_size": 72, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 20,
    } | changes)  # fmt: skip


def qwen3(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**SIZES | {
        "hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 10,
        "num_key_value_heads": 5, "head_dim": 12,
    } | changes)  # fmt: skip


def qwen3moe(**changes: Any) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**SIZES | {
        "hidden_size": 32, "intermediate_size": 72, "moe_intermediate_size": 32, "num_experts": 7,
        "num_experts_per_tok": 3, "norm_topk_prob": True, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16,
    } | changes)  # fmt: skip


def glm4moe(**changes: Any) -> Glm4MoeConfig:
    return Glm4MoeConfig(**SIZES | {
        "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 72,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 16, "use_qk_norm": True, "attention_bias": True,
        "num_nextn_predict_layers": 0,
    } | changes)  # fmt: skip


def deepseek(version: int, **changes: Any) -> Any:
    """A config of V2 or V3."""
    return {2: DeepseekV2Config, 3: DeepseekV3Config}[version](**SIZES | {
        "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 72,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1, "num_attention_heads": 3, "num_key_value_heads": 3,
        "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
        "v_head_dim": 10,
    } | changes)  # fmt: skip


def sparse(config: Any, **changes: Any) -> Any:
    """A config of V3.2 or GLM-5, which chooses 7 rows. Its norms have the eps that transformers
    gives to those of q_a and kv_a in any case."""
    return config(**SIZES | {
        "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 96,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1, "num_attention_heads": 3, "num_key_value_heads": 3,
        "q_lora_rank": 32, "kv_lora_rank": 48, "qk_nope_head_dim": 24, "qk_rope_head_dim": 16,
        "v_head_dim": 20, "index_n_heads": 11, "index_head_dim": 64, "index_topk": 7,
        "rms_norm_eps": 1e-6,
    } | changes)  # fmt: skip


def deepseek32(**changes: Any) -> DeepseekV32Config:
    rope = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
    return sparse(DeepseekV32Config, **{"rope_parameters": rope} | changes)


def glm_dsa(**changes: Any) -> GlmMoeDsaConfig:
    types = ["full", "full", "shared", "shared", "full", "shared"]
    return sparse(GlmMoeDsaConfig, **{
        "num_hidden_layers": 6, "n_group": 1, "topk_group": 1, "indexer_types": types,
    } | changes)  # fmt: skip


LAYERS4 = [
    "compressed_sparse_attention", "sliding_attention", "heavily_compressed_attention",
    "compressed_sparse_attention", "heavily_compressed_attention",
]  # fmt: skip
YARN4 = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
    "beta_slow": 1.0,
}  # fmt: skip


def deepseek4(**changes: Any) -> DeepseekV4Config:
    return DeepseekV4Config(**SIZES | {
        "num_hidden_layers": 5, "layer_types": LAYERS4, "max_position_embeddings": 512,
        "mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 3, "hidden_size": 48,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "num_attention_heads": 6, "head_dim": 40, "qk_rope_head_dim": 16, "q_lora_rank": 24,
        "sliding_window": 21, "o_groups": 3, "o_lora_rank": 20, "index_n_heads": 11,
        "index_head_dim": 64, "index_topk": 7, "swiglu_limit": 1.5, "rope_parameters": YARN4,
        "routed_scaling_factor": 1.5,
    } | changes)  # fmt: skip


def gpt_oss(**changes: Any) -> GptOssConfig:
    return GptOssConfig(**SIZES | {
        "num_hidden_layers": 3, "hidden_size": 40, "intermediate_size": 32,
        "num_local_experts": 6, "num_experts_per_tok": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 9, "rope_parameters": YARN,
    } | changes)  # fmt: skip


@dataclass(frozen=True)
class Tiny:
    """A model, and how its file stores it.

    dtype   type of matrices; blocks need rows of whole blocks
    merged  whether the experts' gate and up are one tensor
    seed    of the weights. Those of sparse attention have wide gaps between the scores of the rows
            that are chosen and of the others (tests/reference/sparse.py): rounding may swap close
            ones, which changes the logits
    tokens  that its logits are compared for
    """

    config: Any
    dtype: str = "f32"
    merged: bool = False
    seed: int = 0
    tokens: list[int] = field(default_factory=lambda: TOKENS)


MODELS = {
    "llama": Tiny(llama()),
    "llama biases": Tiny(llama(attention_bias=True, mlp_bias=True)),
    "llama tied llama3": Tiny(
        llama(num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
              rope_parameters=LLAMA3)
    ),
    "llama linear": Tiny(llama(rope_parameters=LINEAR)),
    "llama yarn": Tiny(llama(num_hidden_layers=3, rope_parameters=YARN)),
    "llama yarn betas": Tiny(llama(rope_parameters=YARN | BETAS)),
    "llama q8_0": Tiny(llama(hidden_size=96, intermediate_size=64, head_dim=32), "q8_0"),
    "llama q4_1": Tiny(
        llama(hidden_size=96, intermediate_size=64, head_dim=32, tie_word_embeddings=True), "q4_1"
    ),
    "llama nvfp4": Tiny(
        llama(hidden_size=192, intermediate_size=128, head_dim=64, attention_bias=True), "nvfp4"
    ),
    "qwen3": Tiny(qwen3()),
    "qwen3 tied yarn": Tiny(qwen3(tie_word_embeddings=True, rope_parameters=YARN)),
    "qwen3 biases": Tiny(qwen3(attention_bias=True)),
    "qwen3moe": Tiny(qwen3moe()),
    "qwen3moe merged": Tiny(qwen3moe(num_experts_per_tok=1), merged=True),
    "qwen3moe q8_0": Tiny(qwen3moe(), "q8_0"),
    "qwen3moe nvfp4": Tiny(
        qwen3moe(hidden_size=64, moe_intermediate_size=64, head_dim=32), "nvfp4"
    ),
    "glm4moe": Tiny(glm4moe()),
    "glm4moe air": Tiny(
        glm4moe(n_group=1, topk_group=1, n_shared_experts=2, use_qk_norm=False,
                norm_topk_prob=False, attention_bias=False, first_k_dense_replace=2)
    ),
    "glm4moe merged": Tiny(glm4moe(head_dim=24, first_k_dense_replace=0), merged=True),
    "deepseek2 lite": Tiny(
        deepseek(2, q_lora_rank=None, topk_method="greedy", n_group=1, topk_group=1,
                 norm_topk_prob=False, routed_scaling_factor=1.0)
    ),
    "deepseek2 v2": Tiny(
        deepseek(2, topk_method="group_limited_greedy", norm_topk_prob=False,
                 rope_parameters=YARN | {"mscale": 0.707, "mscale_all_dim": 0.707})
    ),
    "deepseek2 v3": Tiny(
        deepseek(3, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0})
    ),
    "deepseek2 v3 merged": Tiny(deepseek(3, first_k_dense_replace=0), merged=True),
    "deepseek32": Tiny(deepseek32(), seed=42),
    "glm-dsa": Tiny(glm_dsa(), seed=47),
    "deepseek32 magnitude": Tiny(
        deepseek32(num_hidden_layers=2,
                   rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}), seed=96
    ),
    "deepseek32 q8_0": Tiny(
        deepseek32(kv_lora_rank=64, qk_rope_head_dim=32, v_head_dim=32), "q8_0", seed=53
    ),
    "glm-dsa merged": Tiny(
        glm_dsa(num_hidden_layers=2, indexer_types=["full"] * 2, first_k_dense_replace=0),
        merged=True, seed=19
    ),
    "deepseek4": Tiny(deepseek4(), tokens=LONG),
    "deepseek4 like V4-Pro": Tiny(
        deepseek4(num_hidden_layers=3, layer_types=[LAYERS4[2], *LAYERS4[2:4]],
                  mlp_layer_types=["hash_moe", "hash_moe", "moe"], routed_scaling_factor=2.5),
        tokens=LONG[:140],
    ),
    "deepseek4 plain rope": Tiny(
        deepseek4(num_hidden_layers=2, layer_types=LAYERS4[2:4], rope_parameters=None,
                  mlp_layer_types=["moe", "hash_moe"][::-1], index_topk=100, sliding_window=5,
                  swiglu_limit=10.0, hc_sinkhorn_iters=3),
        tokens=LONG[:140],
    ),
    "deepseek4 q8_0": Tiny(
        deepseek4(num_hidden_layers=3, layer_types=LAYERS4[:3], mlp_layer_types=["hash_moe"] * 3,
                  hidden_size=64, head_dim=64, q_lora_rank=32, o_lora_rank=32, o_groups=2),
        "q8_0", tokens=LONG[:140],
    ),
    "gpt-oss": Tiny(gpt_oss()),
    "gpt-oss mxfp4": Tiny(gpt_oss(hidden_size=64, num_hidden_layers=2), "mxfp4"),
    "gpt-oss nvfp4": Tiny(gpt_oss(hidden_size=64, intermediate_size=64, head_dim=32), "nvfp4"),
    "gpt-oss q8_0": Tiny(gpt_oss(hidden_size=64, num_hidden_layers=2), "q8_0"),
}  # fmt: skip
