"""What models of transformers are called in GGUF: keys and tensors of each type of model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Attribute of a model's config -> keys, without the architecture's prefix.
COMMON = {
    "vocab_size": ["vocab_size"],
    "num_hidden_layers": ["block_count"],
    "max_position_embeddings": ["context_length"],
    "hidden_size": ["embedding_length"],
    "intermediate_size": ["feed_forward_length"],
    "num_attention_heads": ["attention.head_count"],
    "num_key_value_heads": ["attention.head_count_kv"],
    "head_dim": ["attention.key_length", "attention.value_length"],
    "rms_norm_eps": ["attention.layer_norm_rms_epsilon"],
}
EXPERTS = {
    "num_experts_per_tok": ["expert_used_count"],
    "moe_intermediate_size": ["expert_feed_forward_length"],
}
SHARED_EXPERTS = {
    "n_routed_experts": ["expert_count"],
    "n_shared_experts": ["expert_shared_count"],
    "first_k_dense_replace": ["leading_dense_block_count"],
    "routed_scaling_factor": ["expert_weights_scale"],
    "norm_topk_prob": ["expert_weights_norm"],
    "n_group": ["expert_group_count"],
    "topk_group": ["expert_group_used_count"],
}
LATENT = {  # the layout of kv_b that llama.cpp no longer writes, but reads
    "head_dim": ["rope.dimension_count"],
    "qk_head_dim": ["attention.key_length"],
    "v_head_dim": ["attention.value_length"],
    "q_lora_rank": ["attention.q_lora_rank"],
    "kv_lora_rank": ["attention.kv_lora_rank"],
}
ABSORBED = {  # today's layout: the plain keys describe one shared head, of the cache's rows
    "qk_rope_head_dim": ["rope.dimension_count"],
    "qk_head_dim": ["attention.key_length_mla"],
    "v_head_dim": ["attention.value_length_mla"],
    "q_lora_rank": ["attention.q_lora_rank"],
    "kv_lora_rank": ["attention.kv_lora_rank", "attention.value_length"],
    "head_dim": [],
    "num_key_value_heads": [],
    "index_n_heads": ["attention.indexer.head_count"],
    "index_head_dim": ["attention.indexer.key_length"],
    "index_topk": ["attention.indexer.top_k"],
}
ROPE = {
    "rope_theta": "freq_base",
    "factor": "scaling.factor",
    "original_max_position_embeddings": "scaling.original_context_length",
    "beta_fast": "scaling.yarn_beta_fast",
    "beta_slow": "scaling.yarn_beta_slow",
}

#: Name of a module or parameter -> name of the tensor; those of a layer without its prefix.
MODEL = {
    "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output",
    **{f"hc_head.hc_{x}": f"output_hc_{x}" for x in ("fn", "base", "scale")},
}  # fmt: skip
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.experts.gate_up_proj": "ffn_gate_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.indexer.wq_b": "indexer.attn_q_b",
    "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm",
    "self_attn.indexer.weights_proj": "indexer.proj",
    "self_attn.sinks": "attn_sinks",
    "mlp.router": "ffn_gate_inp",
    "mlp.experts.gate_up_proj_bias": "ffn_gate_up_exps.bias",
    "mlp.experts.down_proj_bias": "ffn_down_exps.bias",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How models of a type are converted.

    name      general.architecture
    keys      attribute of the config -> keys, besides COMMON
    fields    keys with one value for all models
    tensors   names that differ from LAYER's
    permuted  matrices whose heads have halves that rotate together in transformers, and neighbours
              that do in llama.cpp
    transposed  experts' matrices are [in, out] in transformers, with gate and up in turns
    absorbed    kv_b is stored as attn_k_b, transposed, and attn_v_b
    more      (config) -> fields that are not the value of one attribute
    """

    name: str
    keys: dict[str, list[str]] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    permuted: tuple[str, ...] = ()
    transposed: bool = False
    absorbed: bool = False
    more: Callable[[Any], dict[str, Any]] = lambda config: {}


RATIOS = {
    "sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128,
}  # fmt: skip


def _deepseek4(config: Any) -> dict[str, Any]:
    n, limit = config.num_hidden_layers, np.float32(config.swiglu_limit)
    return {
        "attention.compress_ratios": np.array([RATIOS[t] for t in config.layer_types], np.int32),
        "attention.compress_rope_freq_base": float(config.compress_rope_theta),
        "swiglu_clamp_exp": np.full(n, limit),
        "swiglu_clamp_shexp": np.full(n, limit),
        "hash_layer_count": config.mlp_layer_types.count("hash_moe"),
        "embedding_length_out": config.hc_mult * config.hidden_size,
    }


def _compressor(module: str, tensor: str) -> dict[str, str]:
    """The tensors of a compressor of DeepSeek V4."""
    return {
        f"{module}.kv_proj": f"{tensor}_kv",
        f"{module}.gate_proj": f"{tensor}_gate",
        f"{module}.kv_norm": f"{tensor}_norm",
        f"{module}.position_bias": f"{tensor}_ape",
    }


DEEPSEEK4 = {
    "self_attn.q_a_norm": "attn_q_a_norm",
    "self_attn.kv_proj": "attn_kv",
    "self_attn.kv_norm": "attn_kv_a_norm",
    "self_attn.o_a_proj": "attn_output_a",
    "self_attn.o_b_proj": "attn_output_b",
    "self_attn.compressor.indexer.q_b_proj": "indexer.attn_q_b",
    "self_attn.compressor.indexer.scorer.weights_proj": "indexer.proj",
    "mlp.gate.tid2eid": "ffn_gate_tid2eid",
    **_compressor("self_attn.compressor", "attn_compressor"),
    **_compressor("self_attn.compressor.indexer", "indexer_compressor"),
    **{f"{part}_hc.{x}": f"hc_{part}_{x}" for part in ("attn", "ffn")
       for x in ("fn", "base", "scale")},
}  # fmt: skip


RECIPES = {
    "llama": Recipe(
        name="llama",
        keys={"head_dim": [*COMMON["head_dim"], "rope.dimension_count"]},
        permuted=("self_attn.q_proj", "self_attn.k_proj"),
    ),
    "qwen3": Recipe(name="qwen3"),
    "qwen3_moe": Recipe(name="qwen3moe", keys=EXPERTS | {"num_experts": ["expert_count"]}),
    "glm4_moe": Recipe(
        name="glm4moe",
        keys=EXPERTS | SHARED_EXPERTS,
        fields={"expert_gating_func": 2},
        tensors={"post_attention_layernorm": "post_attention_norm"},
    ),
    "deepseek_v2": Recipe(
        name="deepseek2", keys=EXPERTS | SHARED_EXPERTS | LATENT, fields={"expert_gating_func": 1}
    ),
    "deepseek_v3": Recipe(
        name="deepseek2", keys=EXPERTS | SHARED_EXPERTS | LATENT, fields={"expert_gating_func": 2}
    ),
    "deepseek_v32": Recipe(
        name="deepseek32",
        keys=EXPERTS | SHARED_EXPERTS | ABSORBED,
        fields={"expert_gating_func": 2, "attention.head_count_kv": 1},
        absorbed=True,
    ),
    "glm_moe_dsa": Recipe(
        name="glm-dsa",
        keys=EXPERTS | SHARED_EXPERTS | ABSORBED,
        fields={"expert_gating_func": 2, "attention.head_count_kv": 1},
        absorbed=True,
    ),
    "deepseek_v4": Recipe(
        name="deepseek4",
        keys=EXPERTS
        | {
            key: SHARED_EXPERTS[key]
            for key in (
                "n_routed_experts",
                "n_shared_experts",
                "routed_scaling_factor",
                "norm_topk_prob",
            )
        }
        | {
            "q_lora_rank": ["attention.q_lora_rank"],
            "qk_rope_head_dim": ["rope.dimension_count"],
            "sliding_window": ["attention.sliding_window"],
            "o_groups": ["attention.output_group_count"],
            "o_lora_rank": ["attention.output_lora_rank"],
            "index_n_heads": ["attention.indexer.head_count"],
            "index_head_dim": ["attention.indexer.key_length"],
            "index_topk": ["attention.indexer.top_k"],
            "hc_mult": ["hyper_connection.count"],
            "hc_sinkhorn_iters": ["hyper_connection.sinkhorn_iterations"],
            "hc_eps": ["hyper_connection.epsilon"],
        },
        fields={"expert_gating_func": 4},
        tensors=DEEPSEEK4,
        more=_deepseek4,
    ),
    "gpt_oss": Recipe(
        name="gpt-oss",
        keys={
            "num_experts_per_tok": ["expert_used_count"],
            "num_local_experts": ["expert_count"],
            "intermediate_size": ["feed_forward_length", "expert_feed_forward_length"],
            "sliding_window": ["attention.sliding_window"],
        },
        tensors={"post_attention_layernorm": "post_attention_norm"},
        transposed=True,
    ),
}
