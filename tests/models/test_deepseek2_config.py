"""Hyperparameters of DeepSeek-2 files: reading, derived values, contradictions."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pyggml.errors import GGUFError, UnknownNameError
from pyggml.models.config import DeepSeek2Config
from pyggml.models.deepseek2 import Layer
from pyggml.models.presets import PRESETS, config_fields, preset
from pyggml.models.tensors import tensor_sizes
from tests.models.config_keys import LITE, V3, config_of, fields_of


@pytest.mark.parametrize("kv_b", ["split", "joined"])
@pytest.mark.parametrize("name", PRESETS)
def test_keys_round_trip(name: str, kv_b: Any) -> None:
    config = preset(name, kv_b=kv_b)
    assert DeepSeek2Config.from_gguf(config_fields(config)) == config


@pytest.mark.parametrize(
    ("name", "published"), [("deepseek-v2-lite", 15.7e9), ("deepseek-v3", 671e9)]
)
@pytest.mark.parametrize("kv_b", ["split", "joined"])
def test_parameter_counts_match_the_published_ones(name: str, published: float, kv_b: Any) -> None:
    sizes = tensor_sizes(preset(name, kv_b=kv_b))
    assert abs(sum(map(math.prod, sizes.values())) / published - 1) < 1e-3


def test_kq_scale_and_rope_of_the_published_models() -> None:
    for config, kq_scale in ((LITE, 0.114721), (V3, 0.135234)):
        assert config.kq_scale == pytest.approx(kq_scale, rel=1e-5)
        assert config.rope_attn_factor == pytest.approx(0.730520, rel=1e-6)
        assert (config.freq_scale, config.ext_factor, config.d_k) == (1 / 40, 1.0, 192)


def test_kq_scale_of_other_rope_scalings() -> None:
    log, root = math.log(40), math.sqrt(192)
    plain = replace(V3, yarn_log_mul=0.0)
    assert plain.rope_attn_factor == 1
    assert plain.kq_scale == pytest.approx((1 + 0.1 * log) ** 2 / root)
    linear = replace(plain, rope_scaling="linear")
    assert (linear.rope_attn_factor, linear.ext_factor, linear.freq_scale) == (1, 0, 1 / 40)
    assert linear.kq_scale == pytest.approx((1 + 0.1 * log) ** 2 / root)
    none = replace(V3, rope_scaling="none", attn_factor=1.25)
    assert (none.rope_attn_factor, none.freq_scale) == (1.25, 1)
    assert none.kq_scale == pytest.approx(1.25**2 / root)
    scaled = replace(V3, attn_factor=1.25)
    assert scaled.kq_scale == pytest.approx(1.25**2 * V3.kq_scale)


def test_a_yarn_file_without_multiplier_warns() -> None:
    with pytest.warns(UserWarning, match="yarn_log_multiplier"):
        DeepSeek2Config.from_gguf(fields_of(rope__scaling__yarn_log_multiplier=None))
    config_of(fields_of())


def test_defaults_of_missing_keys() -> None:
    names = ("expert_gating_func", "expert_weights_norm", "expert_weights_scale",
             "expert_group_count", "expert_group_used_count", "leading_dense_block_count",
             "rope__scaling__type", "rope__scaling__factor", "attention__q_lora_rank",
             "rope__scaling__original_context_length")  # fmt: skip
    with pytest.warns(UserWarning, match="expert_gating_func"):
        config = DeepSeek2Config.from_gguf(fields_of(**dict.fromkeys(names)))
    assert (config.gating, config.weights_norm, config.weights_scale) == ("softmax", False, 0)
    assert (config.n_group, config.n_group_used, config.n_layer_dense) == (1, 1, 0)
    assert (config.rope_scaling, config.rope_factor) == ("linear", 1)
    assert config.q_lora_rank is None and config.n_ctx_orig == config.n_ctx_train


@pytest.mark.parametrize("number", [None, 0])
@pytest.mark.parametrize(
    ("n_layer", "n_vocab", "gating"),
    [
        (47, 154_880, "sigmoid"), (48, 154_880, "sigmoid"), (47, 129_280, "softmax"),
        (46, 154_880, "softmax"), (61, 154_880, "softmax"), (27, 102_400, "softmax"),
    ],
)  # fmt: skip
def test_gating_of_files_without_the_key(
    n_layer: int, n_vocab: int, gating: str, number: int | None
) -> None:
    """GLM-4.7-Flash (recognized by its sizes, as in llama.cpp) uses a sigmoid, others a softmax."""
    fields = fields_of(block_count=n_layer, vocab_size=n_vocab, expert_gating_func=number)
    message = f"expert_gating_func' is missing: choosing experts by {gating}"
    with pytest.warns(UserWarning, match=message) as record:
        assert DeepSeek2Config.from_gguf(fields).gating == gating
    assert len(record) == 1 and record[0].filename == __file__
    assert config_of(fields | {"deepseek2.expert_gating_func": 1}).gating == "softmax"
    assert config_of(fields | {"deepseek2.expert_gating_func": 2}).gating == "sigmoid"
    dense = fields | {"deepseek2.leading_dense_block_count": n_layer}
    assert config_of(dense).n_layer_dense == n_layer  # no experts, so no warning


def test_blocks_that_predict_further_tokens_are_left_out() -> None:
    fields = fields_of(block_count=48, nextn_predict_layers=1)
    tensors = [*tensor_sizes(replace(V3, n_layer=47)), "blk.47.nextn.eh_proj.weight",
               "blk.47.attn_norm.weight"]  # fmt: skip
    with pytest.warns(UserWarning, match="the last 1 of 48 blocks .* left out") as record:
        config = DeepSeek2Config.from_gguf(fields, tensors)
    assert len(record) == 1 and record[0].filename == __file__
    assert (config.n_layer, config.n_layer_nextn) == (47, 1)
    assert "blk.46.attn_norm.weight" in tensor_sizes(config)
    assert "blk.47.attn_norm.weight" not in tensor_sizes(config)
    assert config_fields(config) == fields
    with pytest.warns(UserWarning), pytest.raises(UnknownNameError, match="no layer 47"):
        Layer.of(SimpleNamespace(tensors={}), DeepSeek2Config.from_gguf(fields), 47)  # type: ignore[arg-type]
    for n in (48, 99):
        with pytest.raises(GGUFError, match="nextn_predict_layers"):
            DeepSeek2Config.from_gguf(fields_of(block_count=48, nextn_predict_layers=n))
    with pytest.raises(GGUFError, match=r"'blk.47.attn_norm.weight', 'blk.47.nextn"):
        DeepSeek2Config.from_gguf(fields_of(block_count=47), sorted(tensors))


def test_a_temperature_of_queries() -> None:
    config = config_of(
        fields_of(attention__temperature_scale=0.1, attention__temperature_length=8192)
    )
    assert (config.temperature_scale, config.temperature_length) == (0.1, 8192)
    assert config_fields(config)["deepseek2.attention.temperature_length"] == 8192
    # As in llama.cpp for Mistral 3, whose files have no length.
    without = config_of(fields_of(attention__temperature_scale=0.1))
    assert without.temperature_length == without.n_ctx_orig == 4096
    assert config_of(fields_of(attention__temperature_length=8192)).temperature_scale == 0


def test_the_old_name_of_a_factor_and_the_ramp_of_yarn() -> None:
    config = config_of(fields_of(rope__scaling__factor=None, rope__scale_linear=8.0))
    assert config.rope_factor == 8
    config = config_of(
        fields_of(rope__scaling__yarn_beta_fast=16.0, rope__scaling__yarn_beta_slow=2.0)
    )
    assert (config.yarn_beta_fast, config.yarn_beta_slow) == (16, 2)
    assert DeepSeek2Config.from_gguf(config_fields(config)) == config


def test_vocabulary_size_from_tokens() -> None:
    fields = fields_of(vocab_size=None) | {"tokenizer.ggml.tokens": ["a"] * 9}
    assert DeepSeek2Config.from_gguf(fields).n_vocab == 9
    with pytest.raises(GGUFError, match=r"vocab_size': 129280, but .* has 9 tokens"):
        DeepSeek2Config.from_gguf(fields_of() | {"tokenizer.ggml.tokens": ["a"] * 9})


def test_kv_b_follows_the_tensors() -> None:
    read = DeepSeek2Config.from_gguf
    joined, split = {"blk.0.attn_kv_b.weight"}, {"blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"}
    assert read(fields_of(), joined).kv_b == "joined"
    assert read(fields_of(replace(V3, kv_b="joined")), split | joined).kv_b == "split"
    with pytest.raises(GGUFError, match="neither"):
        read(fields_of(), {"blk.0.attn_k_b.weight"})


BAD_VALUES: list[tuple[str, Any]] = [
    ("block_count", None), ("block_count", 0), ("block_count", 10**9), ("block_count", "27"),
    ("block_count", True), ("block_count", np.arange(3)), ("block_count", 27.0),
    ("context_length", 0), ("embedding_length", 0), ("vocab_size", None),
    ("leading_dense_block_count", 62), ("feed_forward_length", None), ("feed_forward_length", 0),
    ("attention.head_count", 0), ("attention.head_count_kv", 128),
    ("attention.kv_lora_rank", None), ("attention.q_lora_rank", 0),
    ("attention.key_length", 192), ("attention.value_length", 128),
    ("attention.key_length_mla", 64), ("attention.value_length_mla", None),
    ("attention.layer_norm_rms_epsilon", None), ("attention.layer_norm_rms_epsilon", 0.0),
    ("attention.layer_norm_rms_epsilon", -1e-6), ("attention.layer_norm_rms_epsilon", math.nan),
    ("rope.dimension_count", 63), ("rope.dimension_count", 0), ("rope.freq_base", 0.0),
    ("rope.freq_base", math.inf), ("rope.scaling.type", "longrope"), ("rope.scaling.factor", -1.0),
    ("rope.scaling.factor", math.nan), ("rope.scaling.original_context_length", 0),
    ("rope.scaling.yarn_log_multiplier", math.nan), ("rope.scaling.attn_factor", 0.0),
    ("expert_count", 0), ("expert_count", None), ("expert_used_count", 257),
    ("expert_used_count", 0), ("expert_feed_forward_length", None), ("expert_gating_func", 3),
    ("nextn_predict_layers", -1), ("nextn_predict_layers", 61), ("nextn_predict_layers", True),
    ("attention.temperature_scale", -0.1), ("attention.temperature_length", 0),
    ("rope.scale_linear", math.nan), ("rope.scaling.yarn_beta_fast", 0.0),
    ("expert_shared_feed_forward_length", 5), ("expert_weights_scale", -1.0),
    ("expert_weights_norm", 1), ("expert_group_count", 7),
    ("expert_group_count", 256), ("expert_group_used_count", 9), ("expert_shared_count", -1),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=str)
def test_bad_keys_are_named(key: str, value: Any) -> None:
    with pytest.raises(GGUFError, match=rf"key 'deepseek2\.{key}': "):
        DeepSeek2Config.from_gguf(fields_of(**{key.replace(".", "__"): value}))


def test_other_contradictions() -> None:
    with pytest.raises(GGUFError, match="head_count_kv': 1, must be 128 because of head_count"):
        fields = fields_of(replace(V3, kv_b="joined"), attention__head_count_kv=1)
        DeepSeek2Config.from_gguf(fields)
    with pytest.raises(GGUFError, match="groups of 2 have fewer"):
        DeepSeek2Config.from_gguf(fields_of(expert_group_count=128, expert_group_used_count=3))
    for architecture in ("llama", None, 7):
        with pytest.raises(GGUFError, match=r"general\.architecture"):
            DeepSeek2Config.from_gguf({"general.architecture": architecture})
