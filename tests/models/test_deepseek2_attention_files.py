"""Attention layers read from GGUF files, in every layout of their tensors."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import pyggml as gg
from pyggml import gguf, quants
from pyggml.dtypes import TYPES
from pyggml.models.deepseek2 import DeepSeek2
from pyggml.models.model import Model
from pyggml.models.presets import TINY
from pyggml.models.synth import random_tensors, synth
from pyggml.parity.tolerance import relative_error
from tests.models.attention_cases import (
    EXACT,
    AttentionCase,
    all_forms,
    both_layouts,
    options,
    sizes_of,
)
from tests.reference.deepseek import attention_f64


@all_forms
@both_layouts
@pytest.mark.parametrize("q_lora", [None, 96])
def test_a_layer_of_a_file(
    tmp_path: Path, q_lora: int | None, kv_b: str, form: str, flash: bool
) -> None:
    path = tmp_path / "tiny.gguf"
    synth(path, replace(TINY, kv_b=kv_b, q_lora_rank=q_lora), dtype="f16")
    with gguf.open(path) as file:
        model = Model(file)
        arch = deepseek2(model)
        weights = {
            name.removeprefix("blk.2."): np.asarray(file.array(name), np.float64)
            for name in file.tensors
            if name.startswith("blk.2.attn_")
        }
        x = np.random.default_rng(0).standard_normal((12, arch.n_embd)).astype("f4")
        expected = attention_f64(weights, x, np.arange(12), **sizes_of(arch))
        case = AttentionCase(arch, model.layer(2), x, expected)
        result = case.run(options(form, flash, "f32"), [10, 1, 1])
    assert relative_error(result, expected) < EXACT


def deepseek2(model: Model) -> DeepSeek2:
    assert isinstance(model.arch, DeepSeek2)
    return model.arch


def stacked_and_joined(type: str) -> tuple[DeepSeek2, dict[str, gguf.Tensor]]:
    """One layer as ik_llama.cpp writes it: attn_k_b and attn_v_b in two dimensions, and attn_kv_b.

    Both layouts hold random weights of their own, so a result shows which one was used.
    """
    joined = replace(TINY, n_block=1, kv_b="joined", n_layer_dense=1)
    tensors = {t.name: t for t in random_tensors(joined, TYPES[type], 0)}
    for tensor in random_tensors(replace(joined, kv_b="split"), TYPES[type], 0):
        if tensor.name.endswith(("attn_k_b.weight", "attn_v_b.weight")):
            ne = tensor.ne
            tensors[tensor.name] = replace(tensor, ne=(ne[0], ne[1] * ne[2]))
    return joined, tensors


@all_forms
@pytest.mark.parametrize("omission", ["nothing", "attn_kv_b"])
@pytest.mark.parametrize("type", ["f16", "q8_0", "iq4_nl"])
def test_a_layer_with_both_layouts_and_stacked_heads(
    tmp_path: Path, type: str, omission: str, form: str, flash: bool
) -> None:
    joined, tensors = stacked_and_joined(type)
    path = tmp_path / "layer.gguf"
    gguf.write(path, joined.fields(), [t for n, t in tensors.items() if omission not in n])
    with gguf.open(path) as file:
        model = Model(file)
        arch, layer = deepseek2(model), model.layer(0)
        weights = {
            name.removeprefix("blk.0."): quants.decode_rows(info.dtype, file.array(name))
            for name, info in file.tensors.items()
            if "attn_" in name
        }
        assert arch.kv_b == "split"
        assert layer["attn_k_b"].ne == (32, 64, 4, 1)
        assert layer["attn_v_b"].ne == (64, 32, 4, 1)
        if form == "latent" or omission == "attn_kv_b":  # the layer uses attn_k_b and attn_v_b
            weights.pop("attn_kv_b.weight", None)
            for key in ("attn_k_b.weight", "attn_v_b.weight"):
                weights[key] = weights[key].reshape(4, -1, weights[key].shape[-1])
        x = np.random.default_rng(0).standard_normal((12, joined.n_embd)).astype("f4")
        expected = attention_f64(weights, x, np.arange(12), **sizes_of(arch))
        case = AttentionCase(arch, layer, x, expected)
        result = case.run(options(form, flash, "f32"), [10, 1, 1])
    assert relative_error(result, expected) < (EXACT if type == "f16" else 1e-3)


def test_stacked_heads_must_divide_the_rows(tmp_path: Path) -> None:
    joined, tensors = stacked_and_joined("f16")
    wrong = replace(tensors["blk.0.attn_k_b.weight"], ne=(32, 255))
    path = tmp_path / "layer.gguf"
    in_file = [*(tensors | {wrong.name: wrong}).values()]
    gguf.write(path, joined.fields(), in_file, header_only=True)
    os.truncate(path, 64 << 20)  # the weights are zeros
    with gguf.open(path) as file:
        with pytest.raises(gg.GGUFError, match=r"attn_k_b.*\[32, 255\].*\[32, 64, 4\]"):
            DeepSeek2.of(file)
        with pytest.raises(gg.GGUFError, match=r"attn_k_b.*\[32, 255\]"):
            Model(file)


def test_layers_and_weights_that_do_not_exist(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    synth(path, TINY, dtype="f16")
    with gguf.open(path) as file:
        model = Model(file)
        for il in (-1, 3):
            with pytest.raises(gg.UnknownNameError, match=f"no layer {il}: the model has 3"):
                model.layer(il)
        with pytest.raises(gg.UnknownNameError, match="attn_q"):
            model.layer(0)["attn_q"]
