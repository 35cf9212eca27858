"""Keys and tensors that a DeepSeek-2 file holds and pyggml does not know or does not use."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gguf as gguf_py
import pytest

from pyggml.errors import GGUFError
from pyggml.models.config import DeepSeek2Config, _read
from pyggml.models.keys import Keys
from pyggml.models.known import KNOWN
from pyggml.models.presets import config_fields
from pyggml.models.tensors import tensor_sizes
from tests.models.config_keys import LITE, V3, config_of, fields_of


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
    of_gguf_py = gguf_py.MODEL_TENSORS[gguf_py.MODEL_ARCH.DEEPSEEK2]
    names = [gguf_py.TENSOR_NAMES[t] for t in of_gguf_py]
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
    config_of(fields_of() | {f"deepseek2.{key}": off})
    with pytest.raises(GGUFError, match=rf"'deepseek2.{key}': pyggml does not compute"):
        DeepSeek2Config.from_gguf(fields_of() | {f"deepseek2.{key}": on})


def test_keys_of_other_namespaces_are_ignored() -> None:
    names = ("tokenizer.ggml.new", "general.new", "quantize.imatrix.file", "split.count",
             "llama.block_count", "deepseek2x.y", "bare")  # fmt: skip
    config_of(fields_of() | dict.fromkeys(names, 1))


def test_one_warning_names_everything_ignored() -> None:
    fields = fields_of() | {
        "deepseek2.pooling_type": 0,
        "deepseek2.attention.layer_norm_epsilon": 1.0,
    }
    tensors = [*tensor_sizes(V3), "v.patch_embd.weight", "mm.0.weight"]
    with pytest.warns(UserWarning, match="not used: .*layer_norm_epsilon, .*mm.0.weight") as record:
        DeepSeek2Config.from_gguf(fields, tensors)
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
        DeepSeek2Config.from_gguf(fields_of(), [*tensor_sizes(V3), name])


def test_factors_of_products_are_known() -> None:
    more = ["blk.0.attn_q_a.scale", "blk.5.ffn_up_exps.scale", "blk.5.ffn_up_exps.input_scale",
            "blk.5.ffn_gate_up_exps.weight", "output.scale"]  # fmt: skip
    config_of(fields_of(), [*tensor_sizes(V3), *more])
