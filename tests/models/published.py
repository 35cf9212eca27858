"""config.json of published models (huggingface.co), as far as it describes their graphs.

The numbers of parameters are those of the files' metadata there; of deepseek-v3.2, glm-5 and
glm-5.2, those of transformers' models of these configs.
"""

from __future__ import annotations

from typing import Any

YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64, "hidden_size": 2880,
    "intermediate_size": 2880, "max_position_embeddings": 131072, "num_attention_heads": 64,
    "num_experts_per_tok": 4, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "num_local_experts": 128, "rms_norm_eps": 1e-05, "sliding_window": 128, "vocab_size": 201088,
    "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "rope_parameters": {**YARN, "rope_theta": 150000.0, "beta_fast": 32.0, "beta_slow": 1.0,
                        "truncate": False},
}  # fmt: skip

V32: dict[str, Any] = {
    "model_type": "deepseek_v32", "first_k_dense_replace": 3, "hidden_size": 7168,
    "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False, "topk_group": 4, "v_head_dim": 128, "vocab_size": 129280,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
GLM_5: dict[str, Any] = {
    "model_type": "glm_moe_dsa", "first_k_dense_replace": 3, "hidden_size": 6144,
    "index_head_dim": 128, "index_n_heads": 32, "index_topk": 2048, "intermediate_size": 12288,
    "kv_lora_rank": 512, "max_position_embeddings": 202752, "moe_intermediate_size": 2048,
    "n_group": 1, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 64, "num_experts_per_tok": 8, "num_hidden_layers": 78,
    "num_key_value_heads": 64, "q_lora_rank": 2048, "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False, "topk_group": 1, "v_head_dim": 256, "vocab_size": 154880,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}  # fmt: skip

#: Preset -> its config. GLM-5.2's rope_theta is GLM-5's, not seen in its config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v3.2": V32,
    "glm-5": GLM_5,
    "glm-5.2": GLM_5
    | {"max_position_embeddings": 1048576, "index_topk_freq": 4, "index_skip_topk_offset": 3},
    "gpt-oss-120b": GPT_OSS,
    "gpt-oss-20b": GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    "llama-3.1-8b": {
        "model_type": "llama", "attention_bias": False, "head_dim": 128, "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "vocab_size": 128256,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "attention_bias": False, "head_dim": 128, "hidden_size": 2048,
        "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
        "vocab_size": 151936, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "glm-4.5-air": {
        "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1,
        "head_dim": 128, "hidden_size": 4096, "intermediate_size": 10944,
        "max_position_embeddings": 131072, "moe_intermediate_size": 1408, "n_group": 1,
        "n_routed_experts": 128, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_attention_heads": 96, "num_experts_per_tok": 8, "num_hidden_layers": 46,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False, "topk_group": 1, "use_qk_norm": False, "vocab_size": 151552,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5,
        },
    },
}  # fmt: skip

#: Preset -> number of parameters; without the blocks that predict further tokens (MTP), except for
#: glm-4.5-air.
PARAMETERS = {
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "deepseek-v3.2": 671_877_944_064,
    "glm-4.5-air": 110_468_824_832,
    "glm-5": 743_911_218_432,
    "glm-5.2": 743_377_019_904,
    "gpt-oss-120b": 116_829_156_672,
    "gpt-oss-20b": 20_914_757_184,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm2-135m": 134_515_008,
}
