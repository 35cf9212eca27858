"""Results of all forms of the attention layer against transformers and against float64."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.models.layers import Rope
from pyggml.models.presets import TINY
from pyggml.parity.tolerance import relative_error
from tests.fixtures.case import HERE
from tests.models.attention_cases import (
    EXACT,
    AttentionCase,
    all_forms,
    both_layouts,
    options,
    random_case,
    sizes_of,
    split_kv_b,
)
from tests.models.stand_ins import layer_of

#: Fixture -> q_lora_rank and rope scaling, as a GGUF file has them.
PLAIN = Rope(scaling="none", factor=1.0, n_ctx_orig=4096)
YARN = replace(PLAIN, scaling="yarn")
FIXTURES: dict[str, dict[str, Any]] = {
    "v2_lite": {"q_lora_rank": None},
    "v2": {"q_lora_rank": 20, "rope": replace(YARN, factor=40.0), "yarn_log_mul": 0.0707},
    "v3": {"q_lora_rank": 24, "rope": replace(YARN, factor=8.0), "yarn_log_mul": 0.1},
    "v3_plain": {"q_lora_rank": None},
}


def transformers_case(name: str, kv_b: str) -> AttentionCase:
    with np.load(HERE / f"deepseek_{name}.npz") as file:
        arrays = dict(file)
    arch = replace(
        TINY, n_embd=40, n_head=4, kv_lora_rank=24, d_nope=12, n_rot=16, d_v=10,
        **{"rope": PLAIN, "yarn_log_mul": 0.0} | FIXTURES[name],
    )  # fmt: skip
    for key, value in json.loads(str(arrays["sizes"])).items():
        if key in sizes_of(arch):
            assert sizes_of(arch)[key] == pytest.approx(value, rel=1e-12), key
    weights = {
        key.removesuffix(".weight"): array
        for key, array in arrays.items()
        if key.endswith(".weight")
    }
    weights = split_kv_b(weights, 4, 12) if kv_b == "split" else weights
    layer = layer_of({f"{key}.weight": array for key, array in weights.items()})
    x = arrays["x"].astype(np.float32)
    return AttentionCase(arch, layer, x, arrays["out"], arrays["positions"][0])


@all_forms
@both_layouts
@pytest.mark.parametrize("name", FIXTURES)
def test_a_prompt_and_three_tokens_match_transformers(
    name: str, kv_b: str, form: str, flash: bool
) -> None:
    case = transformers_case(name, kv_b)
    result = case.run(options(form, flash, "f32"), [11, 1, 1, 1], n_kv=16)
    assert relative_error(result[:11], case.expected[:11]) < EXACT
    assert relative_error(result[11:], case.expected[11:]) < EXACT


def test_cache_rows_must_be_whole_blocks() -> None:
    case = transformers_case("v3", "joined")  # latent rows of 40
    with pytest.raises(gg.ShapeError, match="q8_0"):
        case.arch.cache(0, 16, 16, options("latent", True, "q8_0"))


@all_forms
@both_layouts
@pytest.mark.parametrize("n_head", [1, 3, 7])
def test_odd_head_counts(n_head: int, kv_b: str, form: str, flash: bool) -> None:
    case = random_case(n_head, kv_b)
    result = case.run(options(form, flash, "f32"), [20, 1, 1, 1, 1])
    assert relative_error(result, case.expected) < EXACT


@all_forms
@both_layouts
@pytest.mark.parametrize(
    ("cache_type", "bound"),
    [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 2e-2), ("q4_0", 2e-1)],
)
def test_cache_types(cache_type: str, bound: float, kv_b: str, form: str, flash: bool) -> None:
    case = random_case(3, kv_b, q_lora=48)
    result = case.run(options(form, flash, cache_type), [20, 1, 1, 1, 1])
    error = relative_error(result, case.expected)
    assert bound / 100 < error < bound


@all_forms
@both_layouts
@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_weights_that_the_graph_must_transpose(
    type: str, kv_b: str, form: str, flash: bool
) -> None:
    case = random_case(3, kv_b, type)
    result = case.run(options(form, flash, "f32"), [20, 1, 1, 1, 1])
    assert relative_error(result, case.expected) < (EXACT if type == "f16" else 1e-3)


@all_forms
@both_layouts
@pytest.mark.parametrize("cache_type", ["f32", "f16"])
def test_products_of_weights_with_factors(
    cache_type: str, kv_b: str, form: str, flash: bool
) -> None:
    """The weights are 2^9 to 2^15 times as large, so a product without its factor exceeds f16."""
    case = random_case(3, kv_b, q_lora=48, factors=True)
    result = case.run(options(form, flash, cache_type), [20, 1, 1, 1, 1])
    assert relative_error(result, case.expected) < (EXACT if cache_type == "f32" else 1e-3)


@all_forms
@both_layouts
@pytest.mark.parametrize("length", [1, 5, 7, 24])
def test_queries_have_a_temperature(length: int, kv_b: str, form: str, flash: bool) -> None:
    """It grows at every multiple of the length. Without it, results differ visibly."""
    case = random_case(3, kv_b, temperature_scale=0.9, temperature_length=length)
    result = case.run(options(form, flash, "f32"), [20, 1, 1, 1, 1])
    assert relative_error(result, case.expected) < EXACT
    plain = random_case(3, kv_b)
    assert (relative_error(plain.expected, case.expected) > 100 * EXACT) == (length < 24)


@pytest.mark.parametrize("length", [1, 3, 10, 8192, 16384])
def test_a_temperature_is_exact_around_every_multiple(length: int) -> None:
    """A rounded quotient could land on the wrong side there. Negative positions count as 0."""
    rng = np.random.default_rng(length)
    periods = rng.integers(0, 2**24 // length, 2000)
    pos = np.concatenate([periods * length + d for d in (-1, 0, 1)]).astype(np.int32)
    arch = replace(TINY, temperature_scale=0.1, temperature_length=length)
    ones = gg.constant(np.ones((len(pos), 1, 1), np.float32), name="ones")
    q = arch.tempered(ones, gg.input("pos", "i32", ne=(len(pos),)))
    result = gg.compile({"q": q}).run(pos=pos)["q"].reshape(-1)
    valid = np.maximum(pos.astype(np.int64), 0)
    np.testing.assert_allclose(result, 1 + 0.1 * np.log1p(valid // length), rtol=3e-7)


def test_the_length_of_a_temperature_is_the_original_context_if_missing() -> None:
    """As in llama.cpp for Mistral 3, whose files have no length."""
    arch = replace(TINY, temperature_scale=0.1, rope=replace(TINY.rope, n_ctx_orig=16))
    assert arch.temperature_length is None
    q = arch.tempered(gg.input("q", ne=(1, 1, 2)), gg.input("pos", "i32", ne=(2,)))
    result = gg.compile({"q": q}).run(q=np.ones((2, 1, 1)), pos=[15, 16])["q"].reshape(-1)
    np.testing.assert_allclose(result, [1, 1 + 0.1 * np.log(2)], rtol=3e-7)
