"""Graphs whose kernels run on the host, compared with the oracle."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np

import pyggml as gg
from benchmarks.gpu_bench import random_blocks
from pyggml import quants
from pyggml.backends.cuda.gpu import H200, Device
from pyggml.parity.tolerance import nmse
from tests.cuda.emulated import run_all

rng = np.random.default_rng(5)


def random(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def constant(name: str, dtype: str, *shape: int) -> gg.Node:
    if dtype in quants.ENCODABLE:
        return gg.constant(random(*shape), dtype=dtype, name=name)
    rows = random_blocks(dtype, prod(shape[:-1]), shape[-1], rng)
    return gg.constant(rows.reshape(*shape[:-1], -1), dtype=dtype, name=name)


Graph = tuple[dict[str, gg.Node], dict]


def compare(
    outputs: dict[str, gg.Node], inputs: dict, folder: Path, limit: float, device: Device = H200
) -> None:
    compare_all({"": (outputs, inputs)}, folder, limit, device)


def compare_all(
    graphs: dict[str, Graph], folder: Path, limit: float, device: Device = H200
) -> None:
    for graph, results in zip(graphs, run_all([*graphs.values()], folder, device)):
        outputs, inputs = graphs[graph]
        expected = gg.compile(outputs, backends=["numpy"]).run(inputs)
        for name, values in expected.items():
            if values.dtype.kind == "i":
                np.testing.assert_array_equal(results[name], values)
            else:
                assert np.isfinite(values).all(), f"{graph} {name}"
                most = 10 * limit if "bf16" in graph else limit
                assert nmse(results[name], values) <= most, f"{graph} {name}"
