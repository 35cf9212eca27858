"""Hyperparameters of DeepSeek-2 files: reading, derived values, contradictions."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from pyggml.errors import GGUFError, UnknownNameError
from pyggml.models.deepseek2 import DeepSeek2
from pyggml.models.known import tensor_sizes
from pyggml.models.model import Model
from pyggml.models.presets import PRESETS, TINY, V3, preset
from pyggml.models.presets import V2_LITE as LITE
from tests.models.config_keys import quietly, read
from tests.models.stand_ins import file_of

DEEPSEEK2 = [name for name, arch in PRESETS.items() if isinstance(arch, DeepSeek2)]


def sized(**changes: Any) -> DeepSeek2:
    """V3, its keys and tensors changed alike."""
    experts = {name: changes.pop(name) for name in ("gating_func",) if name in changes}
    return replace(V3, experts=replace(V3.experts, **experts), **changes)


@pytest.mark.parametrize("kv_b", ["split", "joined"])
@pytest.mark.parametrize("name", DEEPSEEK2)
def test_keys_round_trip(name: str, kv_b: Any) -> None:
    arch = preset(name, kv_b=kv_b)
    assert DeepSeek2.of(file_of(arch)) == arch


@pytest.mark.parametrize(
    ("name", "published"), [("deepseek-v2-lite", 15.7e9), ("deepseek-v3", 671e9)]
)
@pytest.mark.parametrize("kv_b", ["split", "joined"])
def test_parameter_counts_match_the_published_ones(name: str, published: float, kv_b: Any) -> None:
    sizes = tensor_sizes(preset(name, kv_b=kv_b))
    assert abs(sum(map(math.prod, sizes.values())) / published - 1) < 1e-3


def test_kq_scale_and_rope_of_the_published_models() -> None:
    for arch, kq_scale in ((LITE, 0.114721), (V3, 0.135234)):
        assert arch.kq_scale == pytest.approx(kq_scale, rel=1e-5)
        assert arch.rope_attn_factor == pytest.approx(0.730520, rel=1e-6)
        assert (arch.rope.freq_scale, arch.rope.ext_factor, arch.d_k) == (1 / 40, 1.0, 192)


def test_kq_scale_of_other_rope_scalings() -> None:
    log, root = math.log(40), math.sqrt(192)

    def scaled(base: DeepSeek2, **changes: Any) -> DeepSeek2:
        return replace(base, rope=replace(base.rope, **changes))

    plain = replace(V3, yarn_log_mul=0.0)
    assert plain.rope_attn_factor == 1
    assert plain.kq_scale == pytest.approx((1 + 0.1 * log) ** 2 / root)
    linear = scaled(plain, scaling="linear")
    rope = linear.rope
    assert (linear.rope_attn_factor, rope.ext_factor, rope.freq_scale) == (1, 0, 1 / 40)
    assert linear.kq_scale == pytest.approx((1 + 0.1 * log) ** 2 / root)
    none = scaled(V3, scaling="none", attn_factor=1.25)
    assert (none.rope_attn_factor, none.rope.freq_scale) == (1.25, 1)
    assert none.kq_scale == pytest.approx(1.25**2 / root)
    stretched = scaled(V3, attn_factor=1.25)
    assert stretched.kq_scale == pytest.approx(1.25**2 * V3.kq_scale)


def test_a_yarn_file_without_multiplier_warns() -> None:
    with pytest.warns(UserWarning, match="yarn_log_multiplier' is missing") as record:
        read(rope__scaling__yarn_log_multiplier=None)
    assert len(record) == 1 and record[0].filename.endswith("config_keys.py")
    quietly()
    quietly(rope__scaling__yarn_log_multiplier=None, rope__scaling__factor=0.0)


def test_a_multiplier_above_a_half_is_mscale_all_dim() -> None:
    """Some converters wrote mscale_all_dim itself, which is at least 0.707."""
    assert quietly(rope__scaling__yarn_log_multiplier=0.5).yarn_log_mul == 0.5
    for value in (0.51, 0.707, 1.0):
        message = f"yarn_log_multiplier': {value} is taken for mscale_all_dim"
        with pytest.warns(UserWarning, match=message) as record:
            arch = read(rope__scaling__yarn_log_multiplier=value)
        assert len(record) == 1 and record[0].filename.endswith("config_keys.py")
        assert arch.yarn_log_mul == pytest.approx(0.1 * value)
    assert arch.kq_scale == V3.kq_scale


def test_defaults_of_missing_keys() -> None:
    names = ("expert_weights_norm", "expert_weights_scale", "expert_group_count",
             "expert_group_used_count", "rope__scaling__type", "rope__scaling__factor",
             "rope__scaling__original_context_length", "expert_gating_func",
             "leading_dense_block_count", "attention__q_lora_rank")  # fmt: skip
    base = replace(V3, n_layer_dense=0, q_lora_rank=None)
    with pytest.warns(UserWarning, match="expert_gating_func"):
        arch = read(base, **dict.fromkeys(names))
    experts = arch.experts
    assert (experts.gating, experts.weights_norm, experts.weights_scale) == ("softmax", False, 0)
    assert (experts.n_group, experts.n_group_used, arch.n_layer_dense) == (1, 0, 0)
    assert (arch.rope.scaling, arch.rope.factor) == ("linear", 1)
    assert arch.q_lora_rank is None and arch.rope.n_ctx_orig == arch.n_ctx_train


@pytest.mark.parametrize("number", [None, 0])
@pytest.mark.parametrize(
    ("n_block", "n_vocab", "gating"),
    [
        (47, 154_880, "sigmoid"), (48, 154_880, "sigmoid"), (47, 129_280, "softmax"),
        (46, 154_880, "softmax"), (61, 154_880, "softmax"), (27, 102_400, "softmax"),
    ],
)  # fmt: skip
def test_gating_of_files_without_the_key(
    n_block: int, n_vocab: int, gating: str, number: int | None
) -> None:
    """GLM-4.7-Flash (recognized by its sizes, as in llama.cpp) uses a sigmoid, others a softmax."""
    base = sized(n_block=n_block, n_vocab=n_vocab)
    message = f"expert_gating_func' is missing: choosing experts by {gating}"
    with pytest.warns(UserWarning, match=message) as record:
        assert read(base, expert_gating_func=number).experts.gating == gating
    assert len(record) == 1 and record[0].filename.endswith("config_keys.py")
    assert quietly(base, expert_gating_func=1).experts.gating == "softmax"
    assert quietly(base, expert_gating_func=2).experts.gating == "sigmoid"
    dense = replace(base, n_layer_dense=n_block)  # no experts, so no warning
    assert quietly(dense, expert_gating_func=number).n_layer_dense == n_block
    # Keys of experts that no layer has are known all the same.
    quietly(dense, expert_gating_func=number, expert_shared_feed_forward_length=2048)


def test_warnings_name_the_line_of_the_user() -> None:
    file = file_of(V3, {"expert_gating_func": None, "pooling_type": 0})
    with pytest.warns(UserWarning) as record:
        DeepSeek2.of(file)
    assert [warning.filename for warning in record] == [__file__] * 2
    with pytest.warns(UserWarning) as record:
        Model(file)
    assert [warning.filename for warning in record] == [__file__] * 2


def test_blocks_that_predict_further_tokens_are_left_out() -> None:
    base = sized(n_block=48, n_nextn=1)
    extra = {"blk.47.nextn.eh_proj.weight": (1,), "blk.47.attn_norm.weight": (1,)}
    file = file_of(base, {}, extra)
    with pytest.warns(UserWarning, match="the last 1 of 48 blocks .* left out") as record:
        arch = DeepSeek2.of(file)
    assert len(record) == 1 and record[0].filename == __file__
    assert (arch.n_layer, arch.n_nextn) == (47, 1)
    assert "blk.46.attn_norm.weight" in tensor_sizes(arch)
    assert "blk.47.attn_norm.weight" not in tensor_sizes(arch)
    assert arch.fields() == file.fields
    with pytest.warns(UserWarning), pytest.raises(UnknownNameError, match="no layer 47"):
        Model(file).layer(47)
    for n in (48, 99):
        with pytest.raises(GGUFError, match="nextn_predict_layers"):
            read(base, extra, nextn_predict_layers=n)
    with pytest.raises(GGUFError, match=r"'blk.47.nextn.eh_proj.weight', 'blk.47.attn_norm"):
        read(sized(n_block=47), extra)


def test_a_temperature_of_queries() -> None:
    base = replace(V3, temperature_scale=0.1, temperature_length=8192)
    arch = quietly(base)
    assert (arch.temperature_scale, arch.temperature_length) == (0.1, 8192)
    assert arch.fields()["deepseek2.attention.temperature_length"] == 8192
    # As in llama.cpp for Mistral 3, whose files have no length.
    without = quietly(replace(base, temperature_length=None))
    assert without.temperature_length is None and without.rope.n_ctx_orig == 4096
    assert quietly(attention__temperature_length=8192).temperature_scale == 0


def test_the_old_name_of_a_factor_and_the_ramp_of_yarn() -> None:
    arch = quietly(rope__scaling__factor=None, rope__scale_linear=8.0)
    assert arch.rope.factor == 8
    assert quietly(rope__scale_linear=8.0).rope.factor == 40
    arch = quietly(rope__scaling__yarn_beta_fast=16.0, rope__scaling__yarn_beta_slow=2.0)
    assert (arch.rope.beta_fast, arch.rope.beta_slow) == (16, 2)
    assert quietly(arch) == arch


def test_vocabulary_size_from_tokens() -> None:
    nine = sized(n_vocab=9)
    tokens = {"tokenizer.ggml.tokens": ["a"] * 9}
    assert DeepSeek2.of(file_of(nine, tokens | {"vocab_size": None})).n_vocab == 9
    with pytest.raises(GGUFError, match=r"vocab_size': 129280, but .* has 9 tokens"):
        DeepSeek2.of(file_of(V3, tokens))
    for bad in (None, 7):
        with pytest.raises(GGUFError, match="vocab_size': is missing"):
            DeepSeek2.of(file_of(nine, {"tokenizer.ggml.tokens": bad, "vocab_size": None}))


def test_kv_b_follows_the_tensors() -> None:
    joined, split = replace(V3, kv_b="joined"), replace(V3, kv_b="split")
    assert quietly(joined).kv_b == "joined"
    assert quietly(split).kv_b == "split"
    both: dict[str, Any] = {n: ne for n, ne in tensor_sizes(split).items() if "_b." in n}
    assert quietly(joined, both).kv_b == "split"
    # The layout of the tensors and that of the keys are independent.
    keys = {key.removeprefix("deepseek2."): value for key, value in joined.fields().items()
            if "attention." in key} | {"attention.key_length_mla": None,
                                       "attention.value_length_mla": None}  # fmt: skip
    assert DeepSeek2.of(file_of(split, keys)).kv_b == "split"
    lacking = dict.fromkeys(n for n in tensor_sizes(split) if n.endswith("attn_v_b.weight"))
    with pytest.raises(GGUFError, match="neither"):
        read(split, cast(Any, lacking))


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
        read(**{key.replace(".", "__"): value})


def test_other_contradictions() -> None:
    with pytest.raises(GGUFError, match="head_count_kv': 1, must be 128 because of head_count"):
        read(replace(V3, kv_b="joined"), attention__head_count_kv=1)
    with pytest.raises(GGUFError, match="groups of 2 have fewer"):
        read(expert_group_count=128, expert_group_used_count=3)
    for architecture in ("llama", None, 7):
        with pytest.raises(GGUFError, match=r"general\.architecture"):
            DeepSeek2.of(file_of(TINY, {"general.architecture": architecture}))
