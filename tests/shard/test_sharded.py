"""A sharded graph computes what the whole graph does."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import pyggml as gg
from pyggml import backends
from pyggml.errors import GraphError
from tests.plan.graphs import graphs, inputs_of
from tests.shard.graphs import Layers, cuts, layers

EXAMPLES = settings(
    max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def places(n: int) -> list[str]:
    return [f"null:{i}" for i in range(n)]


def close(one: Any, other: Any) -> None:
    """Equal up to the order of sums, and the rounding of rows in a cache that follows from it."""
    for name in one:
        a, b = (np.asarray(x[name], np.float64) for x in (one, other))
        assert a.shape == b.shape, name
        assert np.linalg.norm(a - b) <= 2e-3 * np.linalg.norm(b) + 1e-6, name


def run(plan: gg.Plan, inputs: dict[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
    """The outputs of two runs, and all states after them."""
    outputs = [plan.run(inputs) for _ in range(2)][-1]
    names = dict.fromkeys(str(key).split("@")[0] for key in plan.store.homes)
    return outputs, {name: plan.store.read(name) for name in names}


@EXAMPLES
@given(layers(), cuts(), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_random_layers(
    graph: Layers, cut: tuple[dict[str, Any], int], seed: int, pinned: bool, budget: bool
) -> None:
    """Caches, experts, unequal shares, stages, pins, budgets, and devices that run late."""
    chosen, n = cut
    whole = gg.compile(graph.outputs, updates=graph.updates)
    pins = {r"down|wo": "null:7"} if pinned else None
    amb = 0.002 if budget else None
    try:
        plan = gg.compile(
            graph.outputs, updates=graph.updates, backends=places(n), shard=chosen, pins=pins
        )
        if budget:
            plan = gg.compile(
                graph.outputs, updates=graph.updates, backends=places(n), shard=chosen, pins=pins,
                amb=max(amb or 0, plan.memory.score_peak / 2**20 * 0.9 + 1e-3),
            )  # fmt: skip
    except GraphError as error:
        assume("shard=" not in str(error))
        raise
    except gg.BudgetError:
        assume(False)
    for i in range(n):
        backends.get("null", i).queue.pace = random.Random(seed + i)
    try:
        for one, other in zip(run(plan, graph.used), run(whole, graph.used)):
            close(one, other)
    finally:
        for i in range(n):
            backends.get("null", i).queue.pace = None


@EXAMPLES
@given(graphs(states=True), st.integers(2, 8), st.booleans())
def test_random_ops(graph: Any, n: int, stages: bool) -> None:
    """Views, handles, concats and broadcasts, in whatever way they are combined."""
    outputs, updates = graph
    shard = {"layers": n} if stages else "auto"
    plan = gg.compile(outputs, updates=updates, backends=places(n), shard=shard)
    whole = gg.compile(outputs, updates=updates)
    inputs = inputs_of(whole.graph.nodes)
    for one, other in zip(run(plan, inputs), run(whole, inputs)):
        for name in other:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6)


@EXAMPLES
@given(layers(), st.integers(2, 8))
def test_the_same_cut_gives_the_same_bits(graph: Layers, n: int) -> None:
    plans = [
        gg.compile(graph.outputs, updates=graph.updates, backends=places(n), shard="auto")
        for _ in range(2)
    ]
    assert str(plans[0]) == str(plans[1])
    one, other = (plan.run(graph.used) for plan in plans)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(autouse=True)
def verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYGGML_VERIFY", "1")
