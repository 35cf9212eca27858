"""DeepSeek-2 hyperparameters: reading, derived values, contradictions; and synthetic files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as reference
import numpy as np
import pytest

from pyggml import gguf
from pyggml.errors import DTypeError, GGUFError, ShapeError, UnknownNameError
from pyggml.models.config import DeepSeek2Config, _read
from pyggml.models.deepseek2 import Layer
from pyggml.models.keys import Keys
from pyggml.models.known import KNOWN
from pyggml.models.presets import PRESETS, config_fields, preset, synth
from pyggml.models.tensors import check_tensors, tensor_sizes

LITE, V3 = PRESETS["deepseek-v2-lite"], PRESETS["deepseek-v3"]


def fields_of(base: DeepSeek2Config = V3, **keys: Any) -> dict[str, Any]:
    """The keys of `base`, some of them replaced or (None) removed; __ stands for a dot."""
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
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeepSeek2Config.from_gguf(fields_of())


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


def quiet(fields: dict[str, Any], tensors: Collection[str] = ()) -> DeepSeek2Config:
    """The configuration; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return DeepSeek2Config.from_gguf(fields, tensors)


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
    with pytest.warns(UserWarning, match=message) as caught:
        assert DeepSeek2Config.from_gguf(fields).gating == gating
    assert len(caught) == 1 and caught[0].filename == __file__
    assert quiet(fields | {"deepseek2.expert_gating_func": 1}).gating == "softmax"
    assert quiet(fields | {"deepseek2.expert_gating_func": 2}).gating == "sigmoid"
    dense = fields | {"deepseek2.leading_dense_block_count": n_layer}
    assert quiet(dense).n_layer_dense == n_layer  # no experts, so no warning


def test_blocks_that_predict_further_tokens_are_left_out() -> None:
    fields = fields_of(block_count=48, nextn_predict_layers=1)
    tensors = [*tensor_sizes(replace(V3, n_layer=47)), "blk.47.nextn.eh_proj.weight",
               "blk.47.attn_norm.weight"]  # fmt: skip
    with pytest.warns(UserWarning, match="the last 1 of 48 blocks .* left out") as caught:
        config = DeepSeek2Config.from_gguf(fields, tensors)
    assert len(caught) == 1 and caught[0].filename == __file__
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
    config = quiet(fields_of(attention__temperature_scale=0.1, attention__temperature_length=8192))
    assert (config.temperature_scale, config.temperature_length) == (0.1, 8192)
    assert config_fields(config)["deepseek2.attention.temperature_length"] == 8192
    # As in llama.cpp for Mistral 3, whose files have no length.
    without = quiet(fields_of(attention__temperature_scale=0.1))
    assert without.temperature_length == without.n_ctx_orig == 4096
    assert quiet(fields_of(attention__temperature_length=8192)).temperature_scale == 0


def test_the_old_name_of_a_factor_and_the_ramp_of_yarn() -> None:
    config = quiet(fields_of(rope__scaling__factor=None, rope__scale_linear=8.0))
    assert config.rope_factor == 8
    config = quiet(fields_of(rope__scaling__yarn_beta_fast=16.0, rope__scaling__yarn_beta_slow=2.0))
    assert (config.yarn_beta_fast, config.yarn_beta_slow) == (16, 2)
    assert DeepSeek2Config.from_gguf(config_fields(config)) == config


# --- unknown keys and tensors --------------------------------------------------------------------


def test_the_list_of_keys_matches_what_is_read() -> None:
    lookups: set[str] = set()
    for config in (V3, LITE, replace(V3, kv_b="joined"), replace(LITE, kv_b="joined")):
        keys = Keys("deepseek2", config_fields(config))
        _read(keys, ())
        lookups |= keys.lookups
    assert lookups == KNOWN["deepseek2"].keys


def test_the_list_of_tensors_covers_all_files() -> None:
    known = KNOWN["deepseek2"]
    for config in (V3, LITE, replace(V3, kv_b="joined")):
        names = [name.split(".", 2)[-1] for name in tensor_sizes(config) if name[:4] == "blk."]
        assert set(names) <= known.layer_tensors()
    theirs = reference.MODEL_TENSORS[reference.MODEL_ARCH.DEEPSEEK2]
    names = [reference.TENSOR_NAMES[t] for t in theirs]
    layer = {
        n.removeprefix("blk.{bid}.") for n in names if n.startswith("blk.") and "nextn" not in n
    }
    assert {n for n in layer if f"{n}.weight" not in known.layer_tensors()} <= {
        # Of exp_probs_b, files have the bias. The others belong to rope_freqs and to DeepSeek-OCR's
        # plain attention, which share gguf-py's list.
        "exp_probs_b", "attn_rot_embd", "attn_k", "attn_v", "attn_qkv",
    }  # fmt: skip


@pytest.mark.parametrize(
    "key", ["attention.new_factor", "swiglu_clamp_exp", "attention.indexer.top_k"]
)
def test_an_unknown_key_is_an_error(key: str) -> None:
    with pytest.raises(GGUFError, match=rf"key 'deepseek2.{key}': unknown"):
        DeepSeek2Config.from_gguf(fields_of() | {f"deepseek2.{key}": 1})


def test_unknown_keys_are_counted() -> None:
    fields = fields_of() | {f"deepseek2.x{i}": i for i in range(7)}
    with pytest.raises(GGUFError, match=r"keys 'deepseek2\.x0', .* and 4 more: unknown"):
        DeepSeek2Config.from_gguf(fields)


@pytest.mark.parametrize(
    ("key", "off", "on"),
    [
        ("attention.sliding_window", 0, 4096), ("attn_logit_softcapping", 0.0, 50.0),
        ("attention.causal", True, False), ("logit_scale", 1.0, 0.5),
        ("rope.scaling.yarn_ext_factor", -1.0, 0.5), ("attention.sliding_window", 0, [1, 0]),
    ],
)  # fmt: skip
def test_features_that_are_not_computed_must_be_off(key: str, off: Any, on: Any) -> None:
    quiet(fields_of() | {f"deepseek2.{key}": off})
    with pytest.raises(GGUFError, match=rf"'deepseek2.{key}': pyggml does not compute"):
        DeepSeek2Config.from_gguf(fields_of() | {f"deepseek2.{key}": on})


def test_keys_of_other_namespaces_are_ignored() -> None:
    names = ("tokenizer.ggml.new", "general.new", "quantize.imatrix.file", "split.count",
             "llama.block_count", "deepseek2x.y", "bare")  # fmt: skip
    quiet(fields_of() | dict.fromkeys(names, 1))


def test_one_warning_names_everything_ignored() -> None:
    fields = fields_of() | {
        "deepseek2.pooling_type": 0,
        "deepseek2.attention.layer_norm_epsilon": 1.0,
    }
    tensors = [*tensor_sizes(V3), "v.patch_embd.weight", "mm.0.weight"]
    with pytest.warns(UserWarning, match="not used: .*layer_norm_epsilon, .*mm.0.weight") as caught:
        DeepSeek2Config.from_gguf(fields, tensors)
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_q.bias", "blk.3.ffn_down_exps.bias", "blk.0.attn_sinks.weight",
        "rope_freqs.weight",
        "blk.0.attn_output.lora_a", "blk.61.attn_norm.weight", "token_embd_norm.weight", "blk.x",
        "output.bias", "blk.0.attn_norm.scale",
    ],
)  # fmt: skip
def test_an_unknown_tensor_is_an_error(name: str) -> None:
    with pytest.raises(GGUFError, match=f"tensor '{name}': unknown for .* 61 blocks"):
        DeepSeek2Config.from_gguf(fields_of(), [*tensor_sizes(V3), name])


def test_factors_of_products_are_known() -> None:
    more = ["blk.0.attn_q_a.scale", "blk.5.ffn_up_exps.scale", "blk.5.ffn_up_exps.input_scale",
            "blk.5.ffn_gate_up_exps.weight", "output.scale"]  # fmt: skip
    quiet(fields_of(), [*tensor_sizes(V3), *more])


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
    ("nextn_predict_layers", -1), ("nextn_predict_layers", 61), ("nextn_predict_layers", True),
    ("attention.temperature_scale", -0.1), ("attention.temperature_length", 0),
    ("rope.scale_linear", math.nan), ("rope.scaling.yarn_beta_fast", 0.0),
    ("expert_shared_feed_forward_length", 5), ("expert_weights_scale", -1.0),
    ("expert_weights_norm", 1), ("expert_group_count", 7),
    ("expert_group_count", 256), ("expert_group_used_count", 9), ("expert_shared_count", -1),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), BAD, ids=str)
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
def test_a_tiny_file_end_to_end(tmp_path: Path, type_: str, kv_b: Any) -> None:
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
def test_matrices_preserve_the_scale_of_activations(tmp_path: Path, kv_b: Any) -> None:
    config = preset("tiny", kv_b=kv_b)
    synth(tmp_path / "t", config, type="f32")
    # attn_k_b is stored transposed: its ne[1] is the latent, over which attn_kv_b sums.
    fan_in = {"attn_k_b": config.kv_lora_rank, "attn_v_b": config.kv_lora_rank,
              "attn_kv_b": config.kv_lora_rank, "attn_q_a": config.n_embd,
              "ffn_gate_inp": config.n_embd, "ffn_down_exps": config.n_ff_exp}  # fmt: skip
    with gguf.open(tmp_path / "t") as file:
        leaves = [leaf for leaf in fan_in if f"blk.1.{leaf}.weight" in file.tensors]
        for leaf in leaves:
            std = float(file.array(f"blk.1.{leaf}.weight").std())
            assert std * math.sqrt(fan_in[leaf]) == pytest.approx(1, rel=0.05), leaf
    assert len(leaves) == (5 if kv_b == "split" else 4)


def test_v3_header_with_its_real_sizes(tmp_path: Path) -> None:
    synth(tmp_path / "v3.gguf", preset("deepseek-v3"), type="q4_K", header_only=True)
    with gguf.open(tmp_path / "v3.gguf", allow_missing_data=True) as file:
        assert not file.complete and os_size(file) < 8 << 20
        assert sum(t.n_elements for t in file.tensors.values()) == 671_026_419_200
        check_tensors(DeepSeek2Config.from_gguf(file.fields, file.tensors), file.tensors)
        with pytest.raises(GGUFError, match="not in the file"):
            file.array("output.weight")


def test_a_layer_keeps_its_weights_if_others_are_removed(tmp_path: Path) -> None:
    for layers in (2, 3):
        synth(tmp_path / f"{layers}", preset("tiny", layers=layers), type="q8_0")
    with gguf.open(tmp_path / "2") as two, gguf.open(tmp_path / "3") as three:
        for name in two.tensors:
            np.testing.assert_array_equal(two.array(name), three.array(name))


def test_check_tensors_names_the_wrong_tensor(tmp_path: Path) -> None:
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
    for name, ne in {"blk.1.ffn_up_exps.scale": (8,), "blk.1.attn_q_a.scale": (1,),
                     "blk.1.attn_output.scale": ()}.items():  # fmt: skip
        good, wrong = (replace(tensors["output_norm.weight"], ne=n) for n in (ne, (3,)))
        check_tensors(config, tensors | {name: good})
        with pytest.raises(GGUFError, match=rf"'{name}': ne=\[3\], but"):
            check_tensors(config, tensors | {name: wrong})
    merged = replace(tensors["blk.1.ffn_up_exps.weight"], ne=(256, 256, 8))
    for part in ("up", "gate"):
        del tensors[f"blk.1.ffn_{part}_exps.weight"]
    check_tensors(config, tensors | {"blk.1.ffn_gate_up_exps.weight": merged})
    with pytest.raises(GGUFError, match=r"ffn_gate_exps.weight' of ne=\[256, 128, 8\] is missing"):
        check_tensors(config, tensors)
