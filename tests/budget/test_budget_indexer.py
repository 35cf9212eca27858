"""The scores of an indexer: the budget cuts them by tokens, as the op and in simpler ops."""

from __future__ import annotations

import numpy as np
import pytest
from checks import MIB, counts, least_of, loops

import pyggml as gg
from pyggml.node import Node

N_KV, TOKENS, HEADS, TOP = 3000, 70, 8, 100


def chosen(n3: int = 1, composed: bool = False) -> dict[str, Node]:
    """The ids that an indexer over a cache chooses for each token."""
    keys = gg.state("keys", "f16", ne=(32, N_KV, 1, n3))
    q, w = gg.input("q", ne=(32, HEADS, TOKENS, n3)), gg.input("w", ne=(HEADS, TOKENS, 1, n3))
    mask = gg.causal_mask(gg.input("pos", "i32", ne=(TOKENS,)), n_kv=N_KV)
    scores = gg.lightning_indexer(q, keys, w, mask)
    if composed:
        assert scores.op.meaning is not None
        scores = scores.op.meaning(*scores.src)
    return {"ids": gg.top_k(scores, k=TOP)}


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("n3", [1, 3])
def test_a_budget_changes_no_choice(composed: bool, n3: int) -> None:
    graph = chosen(n3, composed)
    rng = np.random.default_rng(0)
    values = {
        "q": rng.integers(-4, 5, (n3, TOKENS, HEADS, 32)).astype(np.float32),
        "w": rng.integers(-4, 5, (n3, 1, TOKENS, HEADS)).astype(np.float32),
        "pos": np.arange(N_KV - TOKENS, N_KV),
    }
    keys = rng.integers(-4, 5, (n3, 1, N_KV, 32)).astype(np.float16)
    whole = gg.compile(graph)
    heads = HEADS if composed else 1
    assert whole.memory.score_peak >= 4 * N_KV * TOKENS * n3 * heads
    results = []
    for amb in (None, whole.memory.score_peak / MIB * 0.7, least_of(graph) / MIB):
        plan = gg.compile(graph, amb=amb)
        plan.bind()
        plan.store.write("keys", keys)
        results.append(np.asarray(plan.run(**values)["ids"]))
        if amb is not None:
            assert plan.memory.score_peak <= amb * MIB < whole.memory.score_peak
            assert len(loops(plan)) == 1 and counts(plan)[0] > (1,)
    assert all(np.array_equal(ids, results[0]) for ids in results)


@pytest.mark.parametrize("place", ["null", "cuda:0:24GiB"])
@pytest.mark.parametrize("composed", [False, True])
def test_a_budget_holds_on_a_gpu(place: str, composed: bool) -> None:
    """In simpler ops the products of all heads count too; the kernel of CUDA holds none."""
    graph, amb = chosen(composed=composed), 1.5 if composed or place == "null" else 0.5
    whole = gg.compile(graph, backends=[place]).memory.score_peak
    cut = gg.compile(graph, backends=[place], amb=amb)
    assert cut.memory.score_peak <= amb * MIB < whole
    if place != "null":
        assert (whole > 4 * N_KV * TOKENS * HEADS) == composed


def test_a_router_is_no_indexer() -> None:
    """Its product has weights where an indexer has keys, even if a state made its activations."""
    x = gg.rms_norm(
        gg.get_rows(gg.state("x", ne=(64, 50)), gg.input("i", "i32", ne=(9,))), eps=1e-6
    )
    weights = gg.constant(np.ones((16, 64), np.float32), name="router")
    ids = gg.top_k(gg.sigmoid(gg.mul_mat(weights, x)), k=2)
    assert gg.compile({"ids": ids}).memory.score_peak == 0
