"""Attention to chosen rows, cut by the rows of its caches: the same rows as in the whole graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyggml as gg
from pyggml.errors import GraphError
from pyggml.generate.plans import KV_STEP
from pyggml.models.model import load
from pyggml.models.presets import preset
from pyggml.models.synth import synth
from pyggml.passes.divisions import STEP
from tests.shard.test_sharded import places

D, HEADS = 32, 2


def choice(rows: int, n_tokens: int, k: int) -> tuple[dict[str, gg.Node], gg.Node]:
    """The rows of a cache that an indexer chooses, and the attention to them."""
    index, kv = (gg.state(name, "f32", ne=(D, rows)) for name in ("index", "kv"))
    q = gg.input("q", ne=(D, HEADS, n_tokens))
    mask = gg.input("mask", "f16", ne=(rows, n_tokens))
    scores = gg.lightning_indexer(q, index, gg.input("w", ne=(HEADS, n_tokens)), mask)
    ids = gg.top_k(scores, k=k)
    queries = gg.permute(q, axes=(0, 2, 1, 3))
    y = gg.flash_attn_ext(queries, kv, kv, mask, ids=ids, scale=0.2)
    return {"ids": ids, "y": y}, scores


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(1, 3), st.data())
def test_the_rows_of_the_whole_graph(n: int, each: int, n_tokens: int, data: Any) -> None:
    """Few different scores, hidden rows and NaN: the order of equal ones counts."""
    rows = n * each
    k = data.draw(st.integers(1, rows))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    outputs, _ = choice(rows, n_tokens, k)
    values = {
        "q": rng.integers(0, 2, (n_tokens, HEADS, D)).astype("f4"),
        "w": rng.integers(-1, 2, (n_tokens, HEADS)).astype("f4"),
        "mask": np.where(rng.random((n_tokens, rows)) < 0.3, -np.inf, 0).astype("f2"),
    }
    keys = rng.integers(0, 2, (rows, D)).astype("f4") * (rng.random((rows, 1)) < 0.5)
    keys[rng.random(rows) < 0.1] = np.nan
    states = {"index": keys, "kv": rng.standard_normal((rows, D), np.float32)}

    def run(plan: gg.Plan) -> dict[str, Any]:
        plan.bind()
        for name, array in states.items():
            plan.store.write(name, array)
        return plan.run(values)

    whole = run(gg.compile(outputs))
    plan = gg.compile(outputs, backends=places(n), shard={"sequence": n})
    parts = run(plan)
    np.testing.assert_array_equal(parts["ids"], whole["ids"])
    np.testing.assert_allclose(parts["y"], whole["y"], rtol=1e-5, atol=1e-6)
    sizes = [s.node.ne[0] for s in plan.steps if s.node.op.name == "lightning_indexer"]
    assert sizes == [each] * n
    assert [row.states for row in plan.memory.devices] == [2 * 4 * D * each] * n


def test_few_bytes_are_sent() -> None:
    """Candidates and partial attentions, but no scores."""
    outputs, scores = choice(1024, 4, 8)
    plan = gg.compile({"y": outputs["y"]}, backends=places(2), shard={"sequence": 2})
    copies = sum(step.nbytes for split in plan.splits for step in split.copies)
    assert 0 < copies < scores.spec.nbytes / 4


def test_rows_that_cannot_take_turns() -> None:
    outputs, _ = choice(9, 1, 4)
    with pytest.raises(GraphError, match="reads 9 rows, not the same number for 2 devices"):
        gg.compile(outputs, backends=places(2), shard={"sequence": 2})


def test_steps_are_those_of_sessions() -> None:
    assert STEP == KV_STEP


# -- models -------------------------------------------------------------------------------------


def results(path: Path, on: list[str], n_ctx: int, **options: Any) -> tuple[Any, int]:
    """Logits of a prompt in batches and of single tokens, and the bytes of caches on the first
    device."""
    types = dict.fromkeys(("cache_k", "cache_v", "cache_i"), "f32")
    tokens = [(31 * i * i + 7 * i) % 500 for i in range(n_ctx * 3 // 4)]
    with load(path, backends=on, **types, **options) as model:
        session = model.session(n_ctx=n_ctx, n_batch=n_ctx // 4)
        rows = [session.forward(tokens[:-1]), session.forward(tokens[-1:])]
        return np.concatenate(rows), session.memory().devices[0].states


@pytest.mark.parametrize(
    ("name", "n", "n_ctx"),
    [
        ("tiny-deepseek32", 4, 64),
        ("tiny-glm-dsa", 2, 64),
        ("tiny-deepseek4", 2, 256),
    ],
)
def test_models(name: str, n: int, n_ctx: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synth(path, preset(name))
    whole, states = results(path, ["numpy"], n_ctx)
    parts, part = results(path, places(n), n_ctx, shard={"sequence": n})
    assert np.linalg.norm(parts - whole) < 3e-6 * np.linalg.norm(whole)
    if name == "tiny-deepseek4":  # the rings of its compressors are on every device
        assert states / n < part < states
    else:
        assert part == states / n


def test_heavy_compression_is_not_divided_over_many(tmp_path: Path) -> None:
    """A step of 256 positions has two rows of a compressor that takes 128, so four devices have
    them whole, with all lengths; the other layers are divided."""
    path = tmp_path / "model.gguf"
    synth(path, preset("tiny-deepseek4"))
    with load(path, backends=places(4), shard={"sequence": 4}) as model:
        session = model.session(n_ctx=512, n_batch=1)
        states = [
            {n.attrs["name"]: n.ne[1] for n in plan.graph.nodes if n.op.name == "state"}
            for plan in (session.plan(1, 256, 1).bind(), session.plan(1, 512, 1).bind())
        ]
    assert states[0] == states[1]
    assert [states[0][f"cache_{name}@0"] for name in ("comp_l1", "comp_l2")] == [512 // 4 // 4, 4]
