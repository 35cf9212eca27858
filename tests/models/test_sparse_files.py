"""Files of DeepSeek V3.2 and GLM-5: how they are read, and the errors of bad ones."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyggml.errors import GGUFError
from pyggml.models.base import architecture
from pyggml.models.deepseek32 import DeepSeek32
from pyggml.models.glm_dsa import GLM_52_CTX, GlmDsa, default_types
from pyggml.models.known import all_sizes, tensor_sizes
from pyggml.models.presets import (
    GLM_5,
    GLM_52,
    PRESETS,
    TINY_DEEPSEEK32,
    TINY_GLM_DSA,
    V3,
    V32,
    preset,
)
from tests.models.stand_ins import Changes, file_of
from tests.models.test_deepseek2_unknown import KEYS

SPARSE = [name for name, arch in PRESETS.items() if isinstance(arch, DeepSeek32)]
INDEXER = {f"attention.indexer.{name}" for name in ("head_count", "key_length", "top_k")}
both = pytest.mark.parametrize("arch", [TINY_DEEPSEEK32, TINY_GLM_DSA], ids=lambda a: a.name)


def read(
    arch: DeepSeek32, keys: Mapping[str, Any] | None = None, tensors: Changes | None = None
) -> Any:
    """What is read from a file of `arch` with other keys and tensors; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return type(arch).of(file_of(arch, keys, tensors))


@pytest.mark.parametrize("name", SPARSE)
def test_keys_round_trip(name: str) -> None:
    assert read(PRESETS[name]) == PRESETS[name]  # type: ignore[arg-type]
    assert architecture(PRESETS[name].name) is type(PRESETS[name])


def test_the_keys_that_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lookups: dict[str, set[str]] = {}
    monkeypatch.setattr(
        "pyggml.models.base.check_file", lambda c, keys, *_: lookups.update({c.name: keys.lookups})
    )
    for arch in (V32, GLM_52):
        type(arch).of(file_of(arch))
    expected = KEYS - {"attention.temperature_length", "attention.temperature_scale"} | INDEXER
    assert lookups["deepseek32"] == expected
    assert lookups["glm-dsa"] == expected | {"attention.indexer.types"}


def test_the_tensors_of_an_indexer() -> None:
    own = set(tensor_sizes(V32)) - set(tensor_sizes(replace(V3)))
    names = {name.split(".", 2)[2] for name in own}
    assert names == {
        "indexer.attn_q_b.weight", "indexer.attn_k.weight", "indexer.k_norm.weight",
        "indexer.k_norm.bias", "indexer.proj.weight",
    }  # fmt: skip
    assert len(own) == 61 * 5
    assert tensor_sizes(V32)["blk.60.indexer.attn_q_b.weight"] == (1536, 8192)
    layers = {name.split(".")[1] for name in all_sizes(GLM_52) if "indexer" in name}
    assert layers == {str(il) for il in (0, 1, *range(2, 78, 4))} and len(layers) == 21


def test_which_layers_of_glm_have_an_indexer() -> None:
    """With the key, as it says; without, all of GLM-5's, and GLM-5.2's known ones."""
    absent = {"attention.indexer.types": None}
    assert all(GLM_5.types) and read(GLM_5, absent) == GLM_5
    assert sum(GLM_52.types) == 21 and read(GLM_52, absent) == GLM_52
    short = replace(GLM_52, n_ctx_train=GLM_52_CTX - 1, types=(True,) * 78)
    full = {f"blk.{il}.{name}": ne for il in range(78) for name, ne in _indexer(GLM_52).items()}
    keys = absent | {"context_length": GLM_52_CTX - 1}
    assert read(GLM_52, keys, full) == short
    assert preset("glm-5.2", layers=7) == replace(
        GLM_52, n_block=7, types=(True, True, True, False, False, False, True)
    )
    assert default_types(3, 4096) == (True, True, True)


def _indexer(arch: GlmDsa) -> dict[str, tuple[int, ...]]:
    sizes = arch.indexer.tensors(arch.n_embd, arch.q_lora_rank)
    return {n if n.endswith(".bias") else f"{n}.weight": ne for n, ne in sizes.items()}


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (np.array([1, 0, 1, 0], np.int32), "must be an array of bools"),
        (True, "must be an array of bools"),
        (np.array([True, True]), "2 values, must be 4"),
        (np.array([False, True, True, True]), "layer 0 must have an indexer"),
    ],
)
def test_wrong_types(types: Any, message: str) -> None:
    with pytest.raises(GGUFError, match=f"'glm-dsa.attention.indexer.types': .*{message}"):
        read(TINY_GLM_DSA, {"attention.indexer.types": types})


@both
def test_missing_keys(arch: DeepSeek32) -> None:
    required = INDEXER | {
        "attention.q_lora_rank", "attention.kv_lora_rank", "attention.key_length_mla",
        "attention.value_length_mla", "rope.dimension_count", "block_count", "context_length",
        "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon",
        "expert_count", "expert_used_count", "expert_feed_forward_length", "feed_forward_length",
    }  # fmt: skip
    for name in required:
        with pytest.raises(GGUFError, match=f"key '{arch.name}.{name}'"):
            read(arch, {name: None})


def test_the_gate_is_a_sigmoid_without_a_key_in_glm_only() -> None:
    for keys in ({"expert_gating_func": None}, {"expert_gating_func": 0}):
        assert read(TINY_GLM_DSA, keys) == TINY_GLM_DSA
        with pytest.raises(GGUFError, match=r"key 'deepseek32.expert_gating_func'"):
            read(TINY_DEEPSEEK32, keys)
    for arch in (TINY_DEEPSEEK32, TINY_GLM_DSA):
        with pytest.raises(GGUFError, match=rf"key '{arch.name}.expert_gating_func': 3"):
            read(arch, {"expert_gating_func": 3})


@both
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.head_count_kv", 4, "must be 1 because of key_length_mla"),
        ("attention.key_length", 97, "must be 96 because of kv_lora_rank"),
        ("attention.value_length", 96, "must be 64 because of kv_lora_rank"),
        ("attention.indexer.key_length", 8, "8, must be at least 32"),
        ("attention.indexer.top_k", 0, "0, must be 1 to"),
        ("rope.dimension_count", 31, "31, must be even"),
    ],
)
def test_wrong_values(arch: DeepSeek32, key: str, value: Any, message: str) -> None:
    with pytest.raises(GGUFError, match=f"key '{arch.name}.{key}': .*{message}"):
        read(arch, {key: value})


@both
def test_missing_and_unknown_tensors(arch: DeepSeek32) -> None:
    for name in tensor_sizes(arch):
        if name != "output.weight" and "exp_probs_b" not in name:
            with pytest.raises(GGUFError, match=f"tensor '{name}' of ne=.* is missing"):
                read(arch, tensors={name: None})
    ranks = arch.kv_lora_rank, arch.n_head * (arch.d_nope + arch.d_v)
    unknown = {"blk.0.attn_kv_b.weight": ranks, "blk.0.indexer.wk.weight": (64, 64)}
    if isinstance(arch, GlmDsa):
        unknown["blk.3.indexer.proj.weight"] = (256, 8)  # a shared layer has no indexer
    for name, ne in unknown.items():
        with pytest.raises(GGUFError, match=f"tensor '{name}': unknown"):
            read(arch, tensors={name: ne})
    with pytest.raises(GGUFError, match=r"attention.temperature_scale': unknown"):
        read(arch, {"attention.temperature_scale": 0.1})


@both
def test_blocks_of_mtp_are_left_out(arch: DeepSeek32) -> None:
    """block_count counts them, the types of the indexers do not; their tensors may be missing."""
    n = arch.n_layer
    extra = {f"blk.{n}.nextn.eh_proj.weight": (512, 256), f"blk.{n}.indexer.proj.weight": (256, 8)}
    for tensors in ({}, extra):
        file = file_of(arch, {"block_count": n + 1, "nextn_predict_layers": 1}, tensors)
        with pytest.warns(UserWarning, match=f"the last 1 of {n + 1} blocks predict further"):
            config: Any = type(arch).of(file)
        assert config == replace(arch, n_block=n + 1, n_nextn=1)
        assert (config.n_layer, tensor_sizes(config)) == (n, tensor_sizes(arch))
