"""Graphs with nodes that the CUDA backend fuses, compared with NumPy."""

from __future__ import annotations

import pytest

from pyggml.parity.patterns import PATTERNS, pattern
from tests.gpu.checks import same_as_numpy

#: Largest relative error of an output. Products use 16-bit numbers; cache rows may have 8 bits.
MOST = 2e-3
ROUNDED = {"bf16": 1e-2, "q8_0": 2e-2}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PATTERNS)
def test_fused_steps(name: str, seed: int) -> None:
    most = next((most for dtype, most in ROUNDED.items() if dtype in name), MOST)
    graph = pattern(name, seed)
    same_as_numpy(graph.outputs, graph.inputs, most, backends=["cuda"])
