"""Keys and tensors that a DeepSeek-2 file holds and pyggml does not know or does not use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf as gguf_py
import numpy as np
import pytest

from pyggml.errors import GGUFError
from pyggml.models.deepseek2 import DeepSeek2
from pyggml.models.keys import Keys
from pyggml.models.known import all_sizes, tensor_sizes
from pyggml.models.presets import TINY, V3
from pyggml.models.presets import V2_LITE as LITE
from tests.models.config_keys import quietly, read
from tests.models.stand_ins import file_of

#: What llama.cpp reads (llama-arch.cpp, llama-model.cpp) and gguf-py's converters write.
KEYS = {
    "attention.head_count", "attention.head_count_kv", "attention.key_length",
    "attention.key_length_mla", "attention.kv_lora_rank",
    "attention.layer_norm_rms_epsilon", "attention.q_lora_rank",
    "attention.temperature_length", "attention.temperature_scale",
    "attention.value_length", "attention.value_length_mla", "block_count",
    "context_length", "embedding_length", "expert_count",
    "expert_feed_forward_length", "expert_gating_func", "expert_group_count",
    "expert_group_used_count", "expert_shared_count",
    "expert_shared_feed_forward_length", "expert_used_count", "expert_weights_norm",
    "expert_weights_scale", "feed_forward_length", "leading_dense_block_count",
    "nextn_predict_layers", "rope.dimension_count", "rope.freq_base",
    "rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.factor",
    "rope.scaling.original_context_length", "rope.scaling.type",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
    "rope.scaling.yarn_log_multiplier", "vocab_size",
}  # fmt: skip


def test_the_keys_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two layouts read different keys, and together exactly those of the list."""
    lookups: set[str] = set()
    monkeypatch.setattr(
        "pyggml.models.base.check_file", lambda _, keys, *__: lookups.update(keys.lookups)
    )
    for arch in (V3, LITE, replace(V3, kv_b="joined"), replace(LITE, kv_b="joined")):
        DeepSeek2.of(file_of(arch))
        keys = {key.removeprefix("deepseek2.") for key in arch.fields()} - {"general.architecture"}
        assert keys <= lookups
    assert lookups == KEYS
    assert Keys("deepseek2", V3.fields()).lookups == set()


def test_the_tensors_that_are_known() -> None:
    def layer_tensors(arch: DeepSeek2) -> set[str]:
        return {name.split(".", 2)[-1] for name in all_sizes(arch) if name.startswith("blk.")}

    known: set[str] = set()
    for arch in (V3, LITE, replace(V3, kv_b="joined"), replace(V3, merged=True)):
        known |= layer_tensors(arch)
        assert set(tensor_sizes(arch)) <= set(all_sizes(arch))
    of_gguf_py = gguf_py.MODEL_TENSORS[gguf_py.MODEL_ARCH.DEEPSEEK2]
    names = [gguf_py.TENSOR_NAMES[t] for t in of_gguf_py]
    layer = {
        n.removeprefix("blk.{bid}.") for n in names if n.startswith("blk.") and "nextn" not in n
    }
    assert {n for n in layer if f"{n}.weight" not in known} <= {
        # Of exp_probs_b, files have the bias. The others belong to rope_freqs and to DeepSeek-OCR's
        # plain attention, which share gguf-py's list.
        "exp_probs_b", "attn_rot_embd", "attn_k", "attn_v", "attn_qkv",
    }  # fmt: skip
    assert {n for n in known if n.endswith(".scale")} == {
        n.replace(".weight", ".scale") for n in known if n.endswith(".weight") and "norm" not in n
    }


@pytest.mark.parametrize(
    "key", ["attention.new_factor", "swiglu_clamp_exp", "attention.indexer.top_k"]
)
def test_an_unknown_key_is_an_error(key: str) -> None:
    with pytest.raises(GGUFError, match=rf"key 'deepseek2.{key}': unknown"):
        DeepSeek2.of(file_of(TINY, {key: 1}))


def test_unknown_keys_are_counted() -> None:
    keys = {f"x{i}": i for i in range(7)}
    with pytest.raises(GGUFError, match=r"keys 'deepseek2\.x0', .* and 4 more: unknown"):
        DeepSeek2.of(file_of(TINY, keys))


@pytest.mark.parametrize(
    ("key", "off", "on"),
    [
        ("attention.sliding_window", 0, 4096), ("attn_logit_softcapping", 0.0, 50.0),
        ("attention.causal", True, False), ("logit_scale", 1.0, 0.5),
        ("rope.scaling.yarn_ext_factor", -1.0, 0.5), ("attention.sliding_window", 0, [1, 0]),
        ("attention.sliding_window", 0, np.array([1, 0])),
    ],
)  # fmt: skip
def test_features_that_are_not_computed_must_be_off(key: str, off: Any, on: Any) -> None:
    quietly(TINY, **{key.replace(".", "__"): off})
    with pytest.raises(GGUFError, match=rf"'deepseek2.{key}': pyggml does not compute"):
        DeepSeek2.of(file_of(TINY, {key: on}))


def test_keys_of_other_namespaces_are_ignored() -> None:
    names = ("tokenizer.ggml.new", "general.new", "quantize.imatrix.file", "split.count",
             "llama.block_count", "deepseek2x.y", "bare")  # fmt: skip
    file = file_of(TINY)
    file.fields.update(dict.fromkeys(names, 1))
    assert DeepSeek2.of(file) == TINY


def test_one_warning_names_everything_ignored() -> None:
    keys = {"pooling_type": 0, "attention.layer_norm_epsilon": 1.0}
    file = file_of(TINY, keys, {"v.patch_embd.weight": (1,), "mm.0.weight": (1,)})
    with pytest.warns(UserWarning, match="not used: .*layer_norm_epsilon, .*mm.0.weight") as record:
        DeepSeek2.of(file)
    assert len(record) == 1 and record[0].filename == __file__


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
        read(V3, {name: (1,)})


def test_factors_of_products_are_known() -> None:
    more = {"blk.0.attn_q_a.scale": (1,), "blk.5.ffn_up_exps.scale": (256,),
            "blk.5.ffn_up_exps.input_scale": (256,), "output.scale": (1,),
            "token_embd.scale": (1,)}  # fmt: skip
    quietly(V3, more)
