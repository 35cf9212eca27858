"""Published models and small ones as hyperparameters, for files with random weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice
from typing import Any

from pyggml.errors import ShapeError, UnknownNameError
from pyggml.models.base import MAX_LAYERS, Architecture
from pyggml.models.compressed import HEAVY, PLAIN, SPARSE, Compressed
from pyggml.models.deepseek2 import DeepSeek2, KvB
from pyggml.models.deepseek4 import DeepSeek4
from pyggml.models.deepseek32 import DeepSeek32
from pyggml.models.glm4moe import Glm4Moe
from pyggml.models.glm_dsa import GLM_52_CTX, GlmDsa, default_types
from pyggml.models.gpt_oss import GptOss
from pyggml.models.gqa import Heads
from pyggml.models.indexer import Indexer
from pyggml.models.latent import Latent
from pyggml.models.layers import Rope
from pyggml.models.llama import Llama
from pyggml.models.moe import Experts
from pyggml.models.qwen3 import Qwen3, Qwen3Moe

# The sizes of published models are those of their config.json at huggingface.co: of deepseek-ai/
# DeepSeek-V2-Lite, DeepSeek-V3 and DeepSeek-V3.2-Exp, openai/gpt-oss-20b and gpt-oss-120b,
# meta-llama/Llama-3.1-8B, Qwen/Qwen3-30B-A3B, zai-org/GLM-4.5-Air and GLM-5, and
# HuggingFaceTB/SmolLM2-135M. tests/models/published.py has the numbers of parameters, and
# tests/oracle/test_published.py compares every key. Those of DeepSeek-V4-Pro are from reports about
# it.

_YARN = Rope(scaling="yarn", factor=40.0, n_ctx_orig=4096)
V2_LITE = DeepSeek2(
    n_block=27, n_layer_dense=1, n_ctx_train=163840, n_vocab=102400, n_embd=2048, rms_eps=1e-6,
    n_head=16, kv_lora_rank=512, d_nope=128, n_rot=64, d_v=128, n_ff=10944,
    experts=Experts(n_ff=1408, n_expert=64, n_used=6, n_shared=2, gating_func=1),
    rope=_YARN, yarn_log_mul=0.0707,
)  # fmt: skip
V3 = replace(
    V2_LITE, n_block=61, n_layer_dense=3, n_vocab=129280, n_embd=7168, n_head=128, q_lora_rank=1536,
    n_ff=18432, yarn_log_mul=0.1,
    experts=Experts(
        n_ff=2048, n_expert=256, n_used=8, n_shared=1, gating_func=2, choice_bias=True,
        weights_norm=True, weights_scale=2.5, n_group=8, n_group_used=4,
    ),
)  # fmt: skip

TINY = replace(
    V3, n_block=3, n_layer_dense=1, n_vocab=512, n_embd=256, n_head=4, q_lora_rank=96,
    kv_lora_rank=64, d_nope=32, n_rot=16, d_v=32, n_ff=512,
    experts=replace(V3.experts, n_ff=128, n_expert=8, n_used=2, n_group=4, n_group_used=2),
)  # fmt: skip
#: Without their last block, which predicts further tokens.
V32 = DeepSeek32(
    n_block=61, n_layer_dense=3, n_ctx_train=163840, n_vocab=129280, n_embd=7168, rms_eps=1e-6,
    n_head=128, q_lora_rank=1536, kv_lora_rank=512, d_nope=128, n_rot=64, d_v=128, n_ff=18432,
    experts=V3.experts, rope=_YARN, yarn_log_mul=0.1,
    indexer=Indexer(n_head=64, d=128, top_k=2048),
)  # fmt: skip
GLM_5 = GlmDsa(
    n_block=78, n_layer_dense=3, n_ctx_train=202752, n_vocab=154880, n_embd=6144, rms_eps=1e-5,
    n_head=64, q_lora_rank=2048, kv_lora_rank=512, d_nope=192, n_rot=64, d_v=256, n_ff=12288,
    experts=replace(V3.experts, n_group=1, n_group_used=1),
    rope=Rope(freq_base=1000000.0, factor=1.0, n_ctx_orig=202752),
    indexer=Indexer(n_head=32, d=128, top_k=2048), types=default_types(78, 202752),
)  # fmt: skip
#: Its rope.freq_base is GLM-5's, not checked against the published file.
GLM_52 = replace(
    GLM_5, n_ctx_train=GLM_52_CTX, rope=replace(GLM_5.rope, n_ctx_orig=GLM_52_CTX),
    types=default_types(78, GLM_52_CTX),
)  # fmt: skip
TINY_DEEPSEEK32 = replace(
    V32, n_block=3, n_layer_dense=1, n_vocab=512, n_embd=256, n_head=4, q_lora_rank=96,
    kv_lora_rank=64, d_nope=32, n_rot=32, d_v=32, n_ff=512, experts=TINY.experts,
    indexer=Indexer(n_head=8, d=64, top_k=32),
)  # fmt: skip
TINY_GLM_DSA = replace(
    GLM_52, n_block=4, n_layer_dense=1, n_vocab=512, n_embd=256, n_head=4, q_lora_rank=96,
    kv_lora_rank=64, d_nope=32, n_rot=32, d_v=32, n_ff=512, types=default_types(4, GLM_52_CTX),
    experts=replace(TINY.experts, n_group=1, n_group_used=1),
    indexer=Indexer(n_head=8, d=64, top_k=32),
)  # fmt: skip
V4_FLASH = DeepSeek4(
    n_block=43, n_ctx_train=1048576, n_vocab=129280, n_embd=4096, rms_eps=1e-6,
    attn=Compressed(
        n_head=64, d=512, n_rot=64, q_rank=1024, window=128, n_group=8, out_rank=1024, n_index=64,
        d_index=128, top_k=512, freq_base=160000.0,
    ),
    rope=Rope(scaling="yarn", factor=16.0, n_ctx_orig=65536),
    ratios=(PLAIN, PLAIN, SPARSE, *(20 * (HEAVY, SPARSE))),
    experts=Experts(
        n_ff=2048, n_expert=256, n_used=6, n_shared=1, gating_func=4, choice_bias=True,
        weights_norm=True, weights_scale=1.5,
    ),
    n_hash=3, clamp=43 * (10.0,), clamp_shared=43 * (10.0,), n_stream=4, n_sinkhorn=20, hc_eps=1e-6,
)  # fmt: skip
V4_PRO = replace(
    V4_FLASH, n_block=61, n_embd=7168, ratios=(HEAVY, HEAVY, SPARSE, *(29 * (HEAVY, SPARSE))),
    attn=replace(V4_FLASH.attn, n_head=128, q_rank=1536, n_group=16, top_k=1024),
    experts=replace(V4_FLASH.experts, n_ff=3072, n_expert=384, weights_scale=2.5),
    clamp=61 * (10.0,), clamp_shared=61 * (10.0,),
)  # fmt: skip
TINY_V4 = replace(
    V4_FLASH, n_block=4, n_ctx_train=4096, n_vocab=512, n_embd=128, rms_eps=1e-5,
    attn=Compressed(
        n_head=4, d=64, n_rot=32, q_rank=96, window=16, n_group=2, out_rank=64, n_index=4,
        d_index=64, top_k=8, freq_base=160000.0,
    ),
    rope=Rope(scaling="yarn", factor=16.0, n_ctx_orig=256),
    ratios=(PLAIN, SPARSE, HEAVY, SPARSE), n_hash=1, clamp=4 * (1.5,), clamp_shared=4 * (1.5,),
    experts=replace(V4_FLASH.experts, n_ff=64, n_expert=8, n_used=2), n_sinkhorn=3,
)  # fmt: skip
GPT_OSS_20B = GptOss(
    n_block=24, n_ctx_train=131072, n_vocab=201088, n_embd=2880, rms_eps=1e-5, n_ff=2880,
    window=128, heads=Heads(n_head=64, n_head_kv=8, d_k=64, d_v=64, n_rot=64),
    experts=Experts(n_ff=2880, n_expert=32, n_used=4, gating_func=3),
    rope=Rope(freq_base=150000.0, scaling="yarn", factor=32.0, n_ctx_orig=4096),
)  # fmt: skip
GPT_OSS_120B = replace(GPT_OSS_20B, n_block=36, experts=replace(GPT_OSS_20B.experts, n_expert=128))
LLAMA_31_8B = Llama(
    n_block=32, n_ctx_train=131072, n_vocab=128256, n_embd=4096, rms_eps=1e-5, n_ff=14336,
    heads=Heads(n_head=32, n_head_kv=8, d_k=128, d_v=128, n_rot=128),
    rope=Rope(freq_base=500000.0, factor=1.0, n_ctx_orig=131072), rope_factors=True,
)  # fmt: skip
QWEN3_30B_A3B = Qwen3Moe(
    n_block=48, n_ctx_train=40960, n_vocab=151936, n_embd=2048, rms_eps=1e-6, n_ff=6144,
    heads=Heads(n_head=32, n_head_kv=4, d_k=128, d_v=128, n_rot=128),
    experts=Experts(n_ff=768, n_expert=128, n_used=8, gating_func=1, weights_norm=True),
    rope=Rope(freq_base=1000000.0, factor=1.0, n_ctx_orig=40960),
)  # fmt: skip
#: Without its last block, which predicts further tokens.
GLM_45_AIR = Glm4Moe(
    n_block=46, n_layer_dense=1, n_ctx_train=131072, n_vocab=151552, n_embd=4096, rms_eps=1e-5,
    n_ff=10944, heads=Heads(n_head=96, n_head_kv=8, d_k=128, d_v=128, n_rot=64),
    experts=Experts(
        n_ff=1408, n_expert=128, n_used=8, n_shared=1, gating_func=2, choice_bias=True,
        weights_norm=True, weights_scale=1.0, n_group_used=1,
    ),
    rope=Rope(freq_base=1000000.0, factor=1.0, n_ctx_orig=131072), qkv_bias=True,
)  # fmt: skip
TINY_GPT_OSS = GptOss(
    n_block=3, n_ctx_train=4096, n_vocab=512, n_embd=96, rms_eps=1e-5, window=8,
    heads=Heads(n_head=4, n_head_kv=2, d_k=32, d_v=32, n_rot=32),
    experts=Experts(n_ff=64, n_expert=6, n_used=2, gating_func=3),
    rope=Rope(freq_base=150000.0, scaling="yarn", factor=32.0, n_ctx_orig=4096),
)  # fmt: skip

SMOLLM2 = Llama(
    n_block=30, n_ctx_train=8192, n_vocab=49152, n_embd=576, rms_eps=1e-5, n_ff=1536, tied=True,
    heads=Heads(n_head=9, n_head_kv=3, d_k=64, d_v=64, n_rot=64),
    rope=Rope(freq_base=100_000.0, n_ctx_orig=8192),
)  # fmt: skip
TINY_LLAMA = replace(
    SMOLLM2, n_block=2, n_ctx_train=2048, n_vocab=512, n_embd=256, n_ff=512,
    heads=Heads(n_head=8, n_head_kv=2, d_k=32, d_v=32, n_rot=32),
    rope=Rope(freq_base=10_000.0, n_ctx_orig=2048),
)  # fmt: skip

TINY_QWEN3 = Qwen3(
    n_block=2, n_ctx_train=2048, n_vocab=512, n_embd=256, rms_eps=1e-6, n_ff=512, tied=True,
    heads=Heads(n_head=8, n_head_kv=2, d_k=64, d_v=64, n_rot=64),
    rope=Rope(freq_base=1_000_000.0, n_ctx_orig=2048),
)  # fmt: skip
TINY_QWEN3MOE = replace(
    QWEN3_30B_A3B, n_block=2, n_ctx_train=2048, n_vocab=512, n_embd=256, n_ff=512,
    heads=TINY_QWEN3.heads, rope=TINY_QWEN3.rope,
    experts=replace(QWEN3_30B_A3B.experts, n_ff=128, n_expert=8, n_used=2),
)  # fmt: skip
TINY_GLM4MOE = replace(
    GLM_45_AIR, n_block=3, n_ctx_train=2048, n_vocab=512, n_embd=256, n_ff=512, qk_norm=True,
    heads=replace(TINY_QWEN3.heads, n_rot=32), rope=TINY_QWEN3.rope,
    experts=replace(GLM_45_AIR.experts, n_ff=128, n_expert=8, n_used=2),
)  # fmt: skip

#: The published models, a small one for CPUs, and tiny ones for tests: `tiny` has every feature of
#: V3. There is a tiny one for each architecture.
PRESETS: dict[str, Architecture] = {
    "deepseek-v2-lite": V2_LITE,
    "deepseek-v3": V3,
    "deepseek-v3.2": V32,
    "deepseek-v4-flash": V4_FLASH,
    "deepseek-v4-pro": V4_PRO,
    "glm-4.5-air": GLM_45_AIR,
    "glm-5": GLM_5,
    "glm-5.2": GLM_52,
    "gpt-oss-20b": GPT_OSS_20B,
    "gpt-oss-120b": GPT_OSS_120B,
    "llama-3.1-8b": LLAMA_31_8B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "small": replace(
        V2_LITE, n_vocab=32000, n_embd=1024, n_head=8, n_ff=2816,
        experts=replace(V2_LITE.experts, n_ff=512, n_expert=16, n_used=4, n_shared=1),
    ),
    "smollm2-135m": SMOLLM2,
    "tiny": TINY,
    "tiny-deepseek32": TINY_DEEPSEEK32,
    "tiny-deepseek4": TINY_V4,
    "tiny-glm-dsa": TINY_GLM_DSA,
    "tiny-glm4moe": TINY_GLM4MOE,
    "tiny-gpt-oss": TINY_GPT_OSS,
    "tiny-llama": TINY_LLAMA,
    "tiny-qwen3": TINY_QWEN3,
    "tiny-qwen3moe": TINY_QWEN3MOE,
}  # fmt: skip


def preset(name: str, *, layers: int | None = None, kv_b: KvB = "split") -> Architecture:
    """The preset called `name`, with `layers` layers if given.

    kv_b  the layout of attn_kv_b in DeepSeek models

    UnknownNameError for an unknown name, ShapeError for an impossible number of layers.
    """
    if name not in PRESETS:
        raise UnknownNameError(f"no preset {name!r}; choose from {', '.join(PRESETS)}")
    arch = PRESETS[name]
    n_layer = arch.n_layer if layers is None else layers
    if not 1 <= n_layer <= MAX_LAYERS:
        raise ShapeError(f"layers must be 1 to {MAX_LAYERS}, got {n_layer}")
    changes: dict[str, Any] = {"n_block": n_layer}
    if isinstance(arch, Latent):
        changes["n_layer_dense"] = min(arch.n_layer_dense, n_layer)
    if isinstance(arch, DeepSeek2):
        changes["kv_b"] = kv_b
    if isinstance(arch, GlmDsa):
        changes["types"] = default_types(n_layer, arch.n_ctx_train)
    if isinstance(arch, DeepSeek4):
        changes |= {
            name: tuple(islice(cycle(getattr(arch, name)), n_layer))
            for name in ("ratios", "clamp", "clamp_shared")
        }
    return replace(arch, **changes)
