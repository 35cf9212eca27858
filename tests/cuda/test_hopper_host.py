"""attention_hopper.cu, run on the host against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda.attention import flash
from pyggml.parity.patterns import pattern
from pyggml.parity.tolerance import CLASSES, nmse
from pyggml.quants import encode
from tests.cuda.emulated import run


@pytest.mark.parametrize("seed", (0, 1))
def test_rows_of_f16_that_a_product_reads(seed: int, tmp_path: Path) -> None:
    graph = pattern("attention_of_a_prompt", seed)
    outputs = {name: y for name, y in graph.outputs.items() if name != "q8_0"}
    inputs = {name: x for name, x in graph.inputs.items() if not name.startswith("q8_0")}
    results = run(outputs, inputs, tmp_path)
    for name, expected in gg.compile(outputs).run(inputs).items():
        assert nmse(results[name], expected) <= 1e-6, name


def test_caches_of_bf16(tmp_path: Path) -> None:
    """Queries and weights have 8 bits: they alone make an NMSE of 5e-6."""
    graph = pattern("attention_of_a_prompt_bf16")
    caches = {name: encode("bf16", graph.inputs[name]) for name in "kv"}
    results = run(graph.outputs, {**graph.inputs, **caches}, tmp_path)
    for name, expected in gg.compile(graph.outputs).run(graph.inputs).items():
        assert nmse(results[name], expected) <= CLASSES["bf16"], name


def test_heads_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three heads of keys start before those of the next three; the last set has one."""
    monkeypatch.setattr(flash, "TOGETHER", 132 // 3)
    rng = np.random.default_rng(0)
    d, n, heads = 64, 160, 7
    q = gg.input("q", ne=(d, n, 2 * heads))
    k, v = (gg.input(x, "f16", ne=(d, n, heads)) for x in "kv")
    mask = gg.causal_mask(gg.input("pos", "i32", ne=(n,)), n_kv=n)
    outputs = {"y": gg.flash_attn_ext(q, k, v, mask, scale=0.125)}
    values = {x: rng.standard_normal((heads, n, d)).astype(np.float16) for x in "kv"}
    inputs = {
        "q": rng.standard_normal((2 * heads, n, d), np.float32),
        "pos": np.arange(n),
        **values,
    }
    results = run(outputs, inputs, tmp_path)
    assert nmse(results["y"], gg.compile(outputs).run(inputs)["y"]) <= 1e-6
