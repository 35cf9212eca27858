"""Kernels of decode steps and of a prompt's small steps, run on the host against the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pyggml as gg
from pyggml.parity.patterns import pattern
from pyggml.parity.tolerance import nmse
from tests.cuda.emulated import run

rng = np.random.default_rng(5)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def constant(name: str, dtype: str, *shape: int) -> gg.Node:
    return gg.constant(random(*shape), dtype=dtype, name=name)


def compare(outputs: dict[str, gg.Node], inputs: dict, folder: Path, limit: float) -> None:
    expected = gg.compile(outputs, backends=["numpy"]).run(inputs)
    results = run(outputs, inputs, folder)
    for name, values in expected.items():
        if values.dtype.kind == "i":
            np.testing.assert_array_equal(results[name], values)
        else:
            assert nmse(results[name], values) <= limit


@pytest.mark.parametrize(
    "name",
    ("experts", "grouped_experts", "divided_weights", "flat_weights", "norm_and_products"),
)
def test_patterns(name: str, tmp_path: Path) -> None:
    graph = pattern(name)
    compare(graph.outputs, graph.inputs, tmp_path, 1e-6)


@pytest.mark.parametrize(("dtype", "n_tokens"), [("iq4_nl", 1), ("q5_0", 1), ("iq4_nl", 3)])
def test_experts_make_their_columns_fixed_point(dtype: str, n_tokens: int, tmp_path: Path) -> None:
    """down reads what up and gate wrote, two tiles of rows a block; 468 rows are 59 tiles."""
    n_expert, n_ff, n_embd = 9, 512, 468
    up, gate = (constant(name, dtype, n_expert, n_ff, 256) for name in ("up", "gate"))
    down = constant("down", dtype, n_expert, n_embd, n_ff)
    x, ids = gg.input("x", ne=(256, 1, n_tokens)), gg.input("ids", "i32", ne=(18, n_tokens))
    hidden = gg.moe_up_gate(up, gate, x, ids)
    y = gg.mul_mat_id(down, hidden, ids)
    inputs = {"x": random(n_tokens, 1, 256), "ids": rng.integers(-1, 10, (n_tokens, 18))}
    inputs["ids"] = np.minimum(inputs["ids"], 8).astype(np.int32)
    compare({"y": y}, inputs, tmp_path, 1e-6)


@pytest.mark.parametrize(("k", "heads"), [(128, 4), (2816, 1)])
def test_a_product_makes_its_column_fixed_point(k: int, heads: int, tmp_path: Path) -> None:
    w, x = constant("w", "iq4_nl", heads, 20, k), gg.input("x", ne=(k, 1, heads))
    compare({"y": gg.mul_mat(w, x)}, {"x": random(heads, 1, k)}, tmp_path, 1e-8)
