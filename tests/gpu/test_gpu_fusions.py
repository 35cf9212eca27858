"""Graphs in which the CUDA backend does several nodes in one step, against NumPy."""

from __future__ import annotations

import pytest

from pyggml.parity.patterns import PATTERNS, pattern
from tests.gpu.checks import same_as_numpy

#: Relative error of an output; products are of 16-bit numbers, cache rows may be of 8 bits.
MOST = 2e-3
ROUNDED = {"bf16": 1e-2, "q8_0": 2e-2}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PATTERNS)
def test_fused_steps(name: str, seed: int) -> None:
    most = next((most for kind, most in ROUNDED.items() if kind in name), MOST)
    graph = pattern(name, seed)
    same_as_numpy(graph.outputs, graph.inputs, most, backends=["cuda"])
