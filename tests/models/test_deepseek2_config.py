"""DeepSeek-2 hyperparameters: what is read, what is derived, what contradicts."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyggml import gguf
from pyggml.errors import DTypeError, GGUFError, ShapeError, UnknownNameError
from pyggml.models.config import DeepSeek2Config
from pyggml.models.presets import PRESETS, config_fields, preset, synth
from pyggml.models.tensors import check_tensors, tensor_sizes

LITE, V3 = PRESETS["deepseek-v2-lite"], PRESETS["deepseek-v3"]


def changed(base: DeepSeek2Config = V3, **keys: Any) -> dict[str, Any]:
    """The keys of `base` with some replaced (dots as __), or removed (None)."""
    fields = config_fields(base)
    for name, value in keys.items():
        fields[f"deepseek2.{name.replace('__', '.')}"] = value
    return {key: value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize("kv_b", ["split", "joined"])
@pytest.mark.parametrize("name", PRESETS)
def test_keys_round_trip(name: str, kv_b: Any) -> None:
    config = preset(name, kv_b=kv_b)
    assert DeepSeek2Config.from_gguf(config_fields(config)) == config


@pytest.mark.parametrize(
    ("name", "published"), [("deepseek-v2-lite", 15.7e9), ("deepseek-v3", 671e9)]
)
@pytest.mark.parametrize("kv_b", ["split", "joined"])
def test_parameter_counts_are_the_published(name: str, published: float, kv_b: Any) -> None:
    sizes = tensor_sizes(preset(name, kv_b=kv_b))
    assert abs(sum(map(math.prod, sizes.values())) / published - 1) < 1e-3


def test_kq_scale_and_rope_of_the_published_models() -> None:
    for config, kq_scale in ((LITE, 0.114721), (V3, 0.135234)):
        assert config.kq_scale == pytest.approx(kq_scale, rel=1e-5)
        assert config.rope_attn_factor == pytest.approx(0.730520, rel=1e-6)
        assert (config.freq_scale, config.ext_factor, config.d_k) == (1 / 40, 1.0, 192)


def test_kq_scale_of_the_other_kinds_of_file() -> None:
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
        DeepSeek2Config.from_gguf(changed(rope__scaling__yarn_log_multiplier=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeepSeek2Config.from_gguf(changed())


def test_defaults_of_missing_keys() -> None:
    names = ("expert_gating_func", "expert_weights_norm", "expert_weights_scale",
             "expert_group_count", "expert_group_used_count", "leading_dense_block_count",
             "rope__scaling__type", "rope__scaling__factor", "attention__q_lora_rank",
             "rope__scaling__original_context_length")  # fmt: skip
    config = DeepSeek2Config.from_gguf(changed(**dict.fromkeys(names)))
    assert (config.gating, config.weights_norm, config.weights_scale) == ("softmax", False, 0)
    assert (config.n_group, config.n_group_used, config.n_layer_dense) == (1, 1, 0)
    assert (config.rope_scaling, config.rope_factor) == ("linear", 1)
    assert config.q_lora_rank is None and config.n_ctx_orig == config.n_ctx_train


def test_vocabulary_size_from_tokens() -> None:
    fields = changed(vocab_size=None) | {"tokenizer.ggml.tokens": ["a"] * 9}
    assert DeepSeek2Config.from_gguf(fields).n_vocab == 9
    with pytest.raises(GGUFError, match=r"vocab_size': 129280, but .* holds 9"):
        DeepSeek2Config.from_gguf(changed() | {"tokenizer.ggml.tokens": ["a"] * 9})


def test_kv_b_follows_the_tensors() -> None:
    read = DeepSeek2Config.from_gguf
    joined, split = {"blk.0.attn_kv_b.weight"}, {"blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight"}
    assert read(changed(), joined).kv_b == "joined"
    assert read(changed(replace(V3, kv_b="joined")), split | joined).kv_b == "split"
    with pytest.raises(GGUFError, match="neither"):
        read(changed(), {"blk.0.attn_k_b.weight"})


BAD: list[tuple[str, Any]] = [
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
    ("expert_weights_scale", -1.0), ("expert_weights_norm", 1), ("expert_group_count", 7),
    ("expert_group_count", 256), ("expert_group_used_count", 9), ("expert_shared_count", -1),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD, ids=str)
def test_bad_keys_are_named(key: str, value: Any) -> None:
    with pytest.raises(GGUFError, match=rf"key 'deepseek2\.{key}': "):
        DeepSeek2Config.from_gguf(changed(**{key.replace(".", "__"): value}))


def test_other_contradictions() -> None:
    with pytest.raises(GGUFError, match="head_count_kv': 1, but"):
        fields = changed(replace(V3, kv_b="joined"), attention__head_count_kv=1)
        DeepSeek2Config.from_gguf(fields)
    with pytest.raises(GGUFError, match="groups of 2 hold fewer"):
        DeepSeek2Config.from_gguf(changed(expert_group_count=128, expert_group_used_count=3))
    for architecture in ("llama", None, 7):
        with pytest.raises(GGUFError, match=r"general\.architecture"):
            DeepSeek2Config.from_gguf({"general.architecture": architecture})


def test_presets_refuse_nonsense(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="tiny"):
        preset("big")
    for layers in (0, 10**9):
        with pytest.raises(ShapeError, match="layers"):
            preset("tiny", layers=layers)
    with pytest.raises(DTypeError, match="choose from"):
        synth(tmp_path / "x", preset("tiny"), type="q8_K")
    with pytest.raises(ShapeError, match="seed"):
        synth(tmp_path / "x", preset("tiny"), seed=-1)
    assert preset("deepseek-v3", layers=2).n_layer_dense == 2


# --- synthetic files -----------------------------------------------------------------------------


@pytest.mark.parametrize("kv_b", ["split", "joined"])
@pytest.mark.parametrize("type_", ["f32", "bf16", "q4_K", "iq4_nl"])
def test_tiny_file_from_end_to_end(tmp_path: Path, type_: str, kv_b: Any) -> None:
    config = preset("tiny", kv_b=kv_b)
    size = synth(tmp_path / "t.gguf", config, type=type_, seed=1)
    with gguf.open(tmp_path / "t.gguf") as file:
        assert os_size(file) == size
        read = DeepSeek2Config.from_gguf(file.fields, file.tensors)
        assert replace(read, rms_eps=1e-6, yarn_log_mul=0.1) == config  # f32 in the file
        check_tensors(read, file.tensors)
        assert {n: t.ne for n, t in file.tensors.items()} == tensor_sizes(config)
        types = {n: t.dtype.name for n, t in file.tensors.items()}
        assert types["blk.0.attn_norm.weight"] == types["blk.1.ffn_gate_inp.weight"] == "f32"
        assert types["blk.2.exp_probs_b.bias"] == "f32"
        assert types["blk.1.ffn_gate_exps.weight"] == type_
        fallback = {"q4_K": "q8_0"}.get(type_, type_)
        assert types["blk.1.ffn_down_exps.weight"] == fallback  # rows of 128
        assert types["output.weight"] == ("q6_K" if type_ in ("q4_K", "iq4_nl") else type_)
        norm = file.array("output_norm.weight")
        assert 0.9 < norm.mean() < 1.1 and norm.std() > 0
        assert len(file.fields["tokenizer.ggml.tokens"]) == config.n_vocab  # type: ignore[arg-type]


def os_size(file: gguf.GGUFFile) -> int:
    return Path(file.paths[0]).stat().st_size


@pytest.mark.parametrize("kv_b", ["split", "joined"])
def test_matrices_keep_the_scale_of_what_they_multiply(tmp_path: Path, kv_b: Any) -> None:
    config = preset("tiny", kv_b=kv_b)
    synth(tmp_path / "t", config, type="f32")
    # attn_k_b is stored transposed: the latent is its ne[1], and what attn_kv_b sums over.
    fan_in = {"attn_k_b": config.kv_lora_rank, "attn_v_b": config.kv_lora_rank,
              "attn_kv_b": config.kv_lora_rank, "attn_q_a": config.n_embd,
              "ffn_gate_inp": config.n_embd, "ffn_down_exps": config.n_ff_exp}  # fmt: skip
    with gguf.open(tmp_path / "t") as file:
        found = [leaf for leaf in fan_in if f"blk.1.{leaf}.weight" in file.tensors]
        for leaf in found:
            std = float(file.array(f"blk.1.{leaf}.weight").std())
            assert std * math.sqrt(fan_in[leaf]) == pytest.approx(1, rel=0.05), leaf
    assert len(found) == (5 if kv_b == "split" else 4)


def test_v3_header_with_its_real_sizes(tmp_path: Path) -> None:
    synth(tmp_path / "v3.gguf", preset("deepseek-v3"), type="q4_K", header_only=True)
    with gguf.open(tmp_path / "v3.gguf", allow_missing_data=True) as file:
        assert not file.complete and os_size(file) < 8 << 20
        assert sum(t.n_elements for t in file.tensors.values()) == 671_026_419_200
        check_tensors(DeepSeek2Config.from_gguf(file.fields, file.tensors), file.tensors)
        with pytest.raises(GGUFError, match="not in the file"):
            file.array("output.weight")


def test_layers_keep_their_weights_when_others_go(tmp_path: Path) -> None:
    for layers in (2, 3):
        synth(tmp_path / f"{layers}", preset("tiny", layers=layers), type="q8_0")
    with gguf.open(tmp_path / "2") as two, gguf.open(tmp_path / "3") as three:
        for name in two.tensors:
            np.testing.assert_array_equal(two.array(name), three.array(name))


def test_check_tensors_names_what_is_wrong(tmp_path: Path) -> None:
    config = preset("tiny")
    synth(tmp_path / "t", config, header_only=True)
    with gguf.open(tmp_path / "t", allow_missing_data=True) as file:
        tensors = dict(file.tensors)
    with pytest.raises(GGUFError, match=r"'blk.0.attn_q_a.weight': ne=\[256, 96\].*\[256, 64\]"):
        check_tensors(replace(config, q_lora_rank=64), tensors)
    with pytest.raises(GGUFError, match=r"'blk.0.attn_q.weight' .*is missing"):
        check_tensors(replace(config, q_lora_rank=None), tensors)
    del tensors["output.weight"], tensors["blk.1.exp_probs_b.bias"]
    check_tensors(config, tensors)
