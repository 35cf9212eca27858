"""Time of compile() for thousands of nodes: pytest benchmarks/test_compile.py"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.step import LoopStep
from pyggml.node import Node


def layers(n_nodes: int) -> tuple[dict[str, Node], list[Node]]:
    """A transformer with about `n_nodes` nodes: caches, softmax attention and feed-forward."""
    x = gg.input("x", "f32", ne=(64, 8))
    pos = gg.input("pos", "i32", ne=(8,))
    mask = gg.causal_mask(pos, n_kv=32)
    updates: list[Node] = []
    w = [gg.constant(np.zeros((64, 64), np.float16), name=f"w{i}") for i in range(6)]
    for layer in range(n_nodes // 33):
        h = gg.mul(gg.rms_norm(x, eps=1e-6), gg.constant(np.ones(64, np.float32)))
        q, k, v = (gg.reshape(gg.mul_mat(w[i], h), ne=(16, 4, 8)) for i in range(3))
        q, k = (gg.rope_ext(t, pos, n_dims=16) for t in (q, k))
        caches = [gg.state(f"{name}{layer}", "f16", ne=(64, 32)) for name in "kv"]
        keys, values = (
            gg.set_rows(cache, gg.reshape(t, ne=(64, 8)), pos) for cache, t in zip(caches, (k, v))
        )
        updates += [keys, values]
        keys, values = (
            gg.permute(gg.reshape(t, ne=(16, 4, 32)), axes=(0, 2, 1)) for t in (keys, values)
        )
        scores = gg.mul_mat(keys, gg.permute(q, axes=(0, 2, 1)))
        weights = gg.soft_max_ext(scores, mask, scale=0.25)
        out = gg.mul_mat(gg.transpose(values), weights)
        out = gg.reshape(gg.cont(gg.permute(out, axes=(0, 2, 1))), ne=(64, 8))
        x = gg.add(x, gg.mul_mat(w[3], out))
        h = gg.rms_norm(x, eps=1e-6)
        x = gg.add(x, gg.mul_mat(w[5], gg.mul(gg.silu(gg.mul_mat(w[4], h)), h)))
    return {"y": x}, updates


@pytest.mark.parametrize("n_nodes", [1250, 5000])
@pytest.mark.parametrize("cut", [False, True], ids=["plain", "amb"])
def test_compile(benchmark: Any, n_nodes: int, cut: bool) -> None:
    outputs, updates = layers(n_nodes)
    peak = gg.compile(outputs, updates=updates).memory.score_peak
    amb = 0.99 * peak / 2**20 if cut else None  # every layer's attention becomes a loop
    plan = benchmark(gg.compile, outputs, updates=updates, amb=amb)
    assert cut == any(isinstance(step, LoopStep) for step in plan.steps)
    assert 0.8 * n_nodes < len(plan.graph.nodes) < 1.6 * n_nodes
