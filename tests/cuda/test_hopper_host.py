"""attention_hopper.cu, run on the host against NumPy."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyggml as gg
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
