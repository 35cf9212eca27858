"""Attentions that the budget does not cut, and graphs in which it finds nothing to count."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from attentions import Latent, Leaves, Scores, counted, run
from checks import MIB, Case, check_together, compiled, error, flat, loops

import pyggml as gg
from pyggml.backends.step import LoopStep
from pyggml.node import Node

# -- outputs inside ---------------------------------------------------------------------------


def inside() -> tuple[Leaves, dict[str, Node]]:
    at = Leaves()
    q, k = at.input("q", 8, 9, 6), at.input("k", 8, 61, 6)
    kq = gg.label(counted(gg.mul_mat(k, q)), "kq")
    soft = gg.label(counted(gg.soft_max_ext(gg.scale(kq, s=0.3))), "soft")
    y = gg.label(gg.mul_mat(at.input("v", 61, 8, 6), soft), "kqv")
    return at, {"kq": kq, "soft": soft, "y": y, "turned": gg.permute(kq, axes=(0, 2, 1, 3)),
                "copy": gg.reshape(soft, ne=(61 * 9, 6))}  # fmt: skip


@pytest.mark.parametrize("key", ["kq", "soft", "turned", "copy"])
def test_an_output_inside_exempts_its_attention(key: str) -> None:
    at, nodes = inside()
    expected = run(gg.compile({k: nodes[k] for k in ("y", key)}), at)
    with pytest.warns(UserWarning, match="kqv stays whole") as records:
        plan = gg.compile({"y": nodes["y"], key: nodes[key]}, amb=1e-9)
    assert len(records) == 1
    assert records[0].filename == __file__
    assert not loops(plan)
    out = run(plan, at)
    assert all(np.array_equal(out[k], expected[k]) for k in expected)


def test_observed_scores_are_exempt_and_other_attentions_are_not() -> None:
    at = Leaves()
    at.prefix = "a."
    first = Scores(6, 1, 9, 61).build(at)
    at.prefix = "b."
    q, k, v = at.input("q", 8, 9, 6), at.input("k", 8, 61, 6), at.input("v", 61, 8, 6)
    soft = gg.label(gg.soft_max_ext(gg.label(gg.mul_mat(k, q), "kq-1")), "soft-1")
    second = gg.sum_rows(flat(gg.mul_mat(v, soft)))
    outputs = {"y": gg.add(flat(first), second)}
    expected = run(gg.compile(outputs), at)["y"]
    with pytest.warns(UserWarning, match="kq-1 is an output"):
        plan = gg.compile(outputs, observe=["kq-*"], amb=10000 / MIB)
    assert len(loops(plan)) == 1
    out = run(plan, at)
    assert error(out["y"], expected) <= 1e-6
    assert out["kq-1"].shape == (6, 9, 61)
    whole = gg.compile({"second": second}).memory.score_peak
    kept = 6 * 9 * 61 * 4  # kq-1 is not reused
    # Reports count exempt attentions too.
    assert whole < plan.memory.score_peak <= whole + kept + 10000


def test_an_expanded_key_as_an_output_exempts_too() -> None:
    at = Leaves()
    y = Latent(4, 5, 97).build(at)
    k = y.src[1]
    with pytest.warns(UserWarning, match="out stays whole"):
        plan = gg.compile({"y": y, "k": k}, amb=1e-9)
    assert not loops(plan)


def test_an_attention_whose_result_is_an_output_is_cut() -> None:
    case = Case(Scores())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loops(compiled(case.outputs, case.need - 1))


# -- what the budget does not count -----------------------------------------------------------


def plain_flash() -> Node:
    q, k, v = (gg.input(n, "f32", ne=(16, t, 4)) for n, t in (("q", 9), ("k", 61), ("v", 61)))
    return gg.flash_attn_ext(q, k, v, scale=0.2)


def flash_on_a_cache() -> Node:
    """Views, permutes and writes of a state do not expand it."""
    cache = gg.state("cache", "q8_0", ne=(128, 61))
    ids = gg.input("ids", "i64", ne=(5,))
    cache = gg.set_rows(cache, gg.input("new", "f32", ne=(128, 5)), ids)
    heads = gg.permute(gg.reshape(cache, ne=(32, 4, 61)), axes=(0, 2, 1, 3))
    k = gg.view(heads, ne=(32, 61, 2))
    v = gg.view(heads, ne=(32, 61, 2), start=(0, 0, 2))
    return gg.flash_attn_ext(gg.input("q", "f32", ne=(32, 9, 4)), k, v, scale=0.2)


def fresh_keys() -> Node:
    """K and V of this run's tokens: they come from inputs, not from a state."""
    x = gg.input("x", "f32", ne=(32, 61))
    w = gg.constant(np.ones((64, 32), np.float32), name="w")
    k = gg.permute(gg.reshape(gg.mul_mat(w, x), ne=(16, 4, 61)), axes=(0, 2, 1, 3))
    return gg.flash_attn_ext(gg.input("q", "f32", ne=(16, 9, 4)), k, k, scale=0.2)


def router() -> Node:
    """A softmax that chooses experts, whose result goes into no product."""
    x = gg.input("x", "f32", ne=(32, 9))
    gate = gg.constant(np.ones((8, 32), np.float32), name="gate")
    experts = gg.constant(np.ones((8, 16, 32), np.float32), name="experts")
    p = gg.soft_max(gg.mul_mat(gate, x))
    ids = gg.top_k(p, k=2)
    w = gg.get_rows(gg.reshape(p, ne=(1, 8, 9)), ids)
    return gg.mul_multi_add(gg.mul_mat_id(experts, gg.reshape(x, ne=(32, 1, 9)), ids), w)


@pytest.mark.parametrize("build", [plain_flash, flash_on_a_cache, fresh_keys, router])
def test_graphs_without_scores_or_expansions_stay_as_they_are(build: object) -> None:
    y = build()  # type: ignore[operator]
    plain = gg.compile({"y": y})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = gg.compile({"y": y}, amb=1e-9)
    assert str(plan.graph) == str(plain.graph)
    assert plan.memory.score_peak == 0 == plain.memory.score_peak


def test_queries_whose_positions_are_a_state_do_not_count_as_keys() -> None:
    """In a recorded decode loop positions are a state; what they rotate is not its expansion."""
    at = Leaves()
    pos = at.state("pos", 9, dtype="i32", values=np.arange(9, dtype=np.int32))
    q = gg.rope_ext(gg.permute(at.input("q", 8, 9, 6), axes=(0, 2, 1, 3)), pos, n_dims=8)
    kq = counted(gg.mul_mat(at.input("k", 8, 61, 6), gg.permute(q, axes=(0, 2, 1, 3))))
    y = {"y": gg.mul_mat(at.input("v", 61, 8, 6), counted(gg.soft_max_ext(kq)))}
    check_together(y, at)


def test_a_softmax_on_the_left_of_the_product_is_cut_too() -> None:
    q, k = gg.input("q", "f32", ne=(64, 300, 6)), gg.input("k", "f32", ne=(64, 1000, 2))
    v = gg.input("v", "f32", ne=(1000, 32, 6))
    y = gg.mul_mat(gg.soft_max_ext(gg.mul_mat(k, q), scale=0.1), v)  # [300, 32, 6]
    whole = gg.compile({"y": y})
    rng = np.random.default_rng(0)
    values = {name: rng.standard_normal(x.shape, np.float32) for name, x in whole.inputs.items()}
    expected = whole.run(values)["y"]
    for share, fills in ((2, 1), (9, 2)):
        amb = whole.memory.score_peak / share / MIB
        plan = gg.compile({"y": y}, amb=amb)
        (loop,) = (step.loop for step in plan.steps if isinstance(step, LoopStep))
        assert len(loop.fill) == fills and plan.memory.score_peak <= amb * MIB
        difference = plan.run(values)["y"] - expected
        assert np.linalg.norm(difference) <= 1e-6 * np.linalg.norm(expected)
