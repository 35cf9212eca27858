"""What the rows of a GPU's record must reach on an H200, and what we hope for.

    model_prompt_2048   at least 85,000 t/s, 105,000 hoped for

A rate must be at least its bar, anything else at most. Records of other GPUs have the same bars: an
H100 computes as fast, but has 0.7 of an H200's memory bandwidth.
"""

from __future__ import annotations

from benchmarks.record import Row

#: Row -> (bar, goal).
BARS: dict[str, tuple[float, float | None]] = {
    "layer_decode_d4096": (38, 27), "layer_prompt_2048": (0.9, 0.7),
    "model_load": (4.5, None), "model_nmse": (1e-4, None), "model_nmse_f32": (1e-9, None),
    "model_prompt_512": (45_000, 58_000), "model_prompt_2048": (85_000, 105_000),
    "model_prompt_8192": (75_000, 90_000), "model_prompt_16384": (65_000, 75_000),
    "model_softmax_prompt_16384": (28_000, 35_000),
    "model_softmax_amb_256_prompt_16384": (28_000, 35_000),
    "model_decode_loop_d0": (1000, 1300), "model_decode_loop_d4096": (950, 1230),
    "model_decode_loop_d16384": (850, 1080),
    "model_decode_d0": (900, 1200), "model_decode_d4096": (850, 1130),
    "model_decode_d16384": (780, 1000),
    "model_decode_logits_d0": (900, 1200), "model_decode_logits_d4096": (850, 1130),
    "model_decode_logits_d16384": (780, 1000),
    "model_standard_decode_loop_d0": (950, 1250), "model_standard_decode_loop_d4096": (750, 980),
    "model_standard_decode_loop_d16384": (450, 520),
    "model_q8_0_decode_loop_d16384": (850, 1080),
    "host_share_us": (60, None),
    "experts_decode_d4096_of_llama": (1, None), "experts_prompt_2048_of_llama": (1, None),
    "whole_prompt_2048_of_llama": (3, None), "whole_decode_d4096_of_llama": (1.3, None),
    "mul_mat_vec_iq4_nl": (0.78, 0.88), "mul_mat_vec_q4_K": (0.78, 0.9),
    "mul_mat_vec_q6_K": (0.8, 0.9), "mul_mat_vec_q8_0": (0.92, 0.95),
    "mul_mat_vec_iq3_xxs": (0.6, 0.75),
    "mul_mat_iq4_nl_n512": (500, 580), "mul_mat_iq4_nl_n2048": (600, 660),
    "moe_up_gate_iq4_nl_t1": (8.5, 7), "moe_up_gate_iq4_nl_t512": (330, 400),
    "moe_up_gate_iq4_nl_t2048": (480, 560), "moe_up_gate_iq4_nl_t4096": (530, 620),
    "fa_192_128_h16_n2048": (410, 440), "fa_192_128_h16_n4096": (520, 570),
    "fa_192_128_h16_n8192": (560, 600), "fa_192_128_h16_n16384": (600, 640),
    "fa_192_128_h128_n4096": (590, 620), "fa_192_128_mask_slowdown": (1.05, None),
    "fa_192_128_h16_q1_n4096": (2.5, 2.8), "fa_192_128_h16_q1_n16384": (3.6, 3.8),
    "fa_576_512_h16_q1_n16384": (9, 7), "fa_576_512_h128_q1_n16384": (15, 11),
    "fa_576_512_h16_q1_n16384_q8_0": (8, 5.5), "amb_256_slowdown": (1.1, None),
    "sparse_indexer_n65536": (0.5, 0.8), "sparse_top_k_n65536": (25, 12),
    "sparse_top_k_n163840": (40, 20), "sparse_gain_n65536": (3, 6),
    "sparse_prompt_2048_n32768": (200, 400),
    "v4_flash_decode": (120, 300), "v4_flash_prompt": (2500, 6000),
    "v4_whole_decode_loop_d8192": (120, 300), "v4_whole_prompt_2048": (2500, 6000),
    "compile_cold": (60, None), "compile_cached": (1, None),
    "example_worst_error_f16": (1e-2, None), "example_worst_error_q8_0": (3e-2, None),
    "example_worst_error_f16_prec_f32": (1e-3, None),
    "example_worst_error_q8_0_prec_f32": (2e-2, None),
    "fuzz_cases_failed": (0, None), "fuzz_graphs_failed": (0, None),
    "parity_failed": (0, None), "parity_unsupported_share": (0.05, None),
}  # fmt: skip


def set_bars(rows: list[Row]) -> None:
    """Set `bar` and `goal` of all rows that have them here."""
    for row in rows:
        if row["name"] in BARS:
            row["bar"], row["goal"] = BARS[row["name"]]
