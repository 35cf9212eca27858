"""The float64 attention layer against stored results of transformers (deepseek_*.npz)."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pyggml.parity.tolerance import relative_error
from tests.fixtures.case import HERE
from tests.reference.deepseek import attention_f64

FIXTURES = sorted(HERE.glob("deepseek_*.npz"), key=str)
#: Both sides are float64; only the order of sums differs (1e-15 measured).
BOUND = 1e-13


def read(path: object) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, float]]:
    with np.load(str(path)) as file:
        arrays = dict(file)
    weights = {name: arrays[name] for name in arrays if name.endswith(".weight")}
    return weights, arrays, json.loads(str(arrays["sizes"]))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_prompt_and_decoded_tokens_agree(path: object) -> None:
    weights, at, sizes = read(path)
    out = attention_f64(weights, at["x"], at["positions"], **sizes)
    assert out.shape == at["out"].shape == (14, 40)
    assert relative_error(out, at["out"]) < BOUND


@pytest.mark.parametrize("path", FIXTURES[:1] + FIXTURES[-1:], ids=lambda path: path.stem)
def test_both_layouts_of_kv_b_give_the_same(path: object) -> None:
    weights, at, sizes = read(path)
    whole = attention_f64(weights, at["x"], at["positions"], **sizes)
    kv_b = weights.pop("attn_kv_b.weight").reshape(4, 22, 24)  # [H, nope | v, kv_lora]
    weights["attn_k_b.weight"] = kv_b[:, :12].transpose(0, 2, 1)
    weights["attn_v_b.weight"] = kv_b[:, 12:]
    np.testing.assert_array_equal(attention_f64(weights, at["x"], at["positions"], **sizes), whole)


def test_both_versions_with_and_without_a_query_latent_are_stored() -> None:
    variants = {(path.stem[9:11], "attn_q_a.weight" in read(path)[0]) for path in FIXTURES}
    assert variants == {("v2", False), ("v2", True), ("v3", False), ("v3", True)}
