"""Flash attention over keys and values that are expanded from a latent cache.

BLAS may sum a product of a smaller block in another order. In f32 the difference is a few 1e-6; a
result rounded to f16 may differ in its last bit, which is not an error of the loop. So tests use
random values with f32 expansions, and whole numbers, whose sums are exact in any order, with f16.
"""

from __future__ import annotations

import numpy as np
import pytest
from attentions import Latent, Leaves, counted, run
from checks import Case, compiled, counts, error, least_of, loops
from hypothesis import given, settings
from hypothesis import strategies as st
from tracing import measured_peak

import pyggml as gg


@st.composite
def latents(draw: st.DrawFn) -> Latent:
    heads = draw(st.sampled_from([1, 2, 3, 4, 6, 7, 10, 12, 13]))
    n_kv = draw(st.sampled_from([2, 31, 97, 128, 211]))
    type = draw(st.sampled_from(["f32", "f16"]))
    mask = draw(st.sampled_from(["", "random", "causal"]))
    return Latent(
        heads,
        draw(st.integers(1, min(40, n_kv))),
        n_kv,
        draw(st.sampled_from(["f32", "f16", "q8_0"])),
        type,
        split=draw(st.booleans()),
        exact=type == "f16",
        sinks=draw(st.booleans()),
        mask=mask,
        heads_mask=draw(st.sampled_from([d for d in range(1, heads + 1) if heads % d == 0])),
        max_bias=draw(st.sampled_from([0.0, 8.0])) if mask else 0.0,
        kv_len=draw(st.sampled_from([0, 1, n_kv // 2, n_kv])),
        lse=draw(st.booleans()),
        ratio=draw(st.sampled_from([d for d in (1, 2, 3, 5, heads) if heads % d == 0])),
    )


@settings(max_examples=40)
@given(latents(), st.integers(0, 99))
def test_any_expansion_under_any_budget(what: Latent, seed: int) -> None:
    Case(what, seed).check_all()


FULL = dict(sinks=True, mask="random", max_bias=8.0)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize("type", ["f32", "f16"])
def test_groups_of_heads_then_blocks_of_keys(cache: str, type: str, split: bool) -> None:
    """A larger budget cuts heads, the least cuts keys. kv_len and sinks keep their meaning."""
    what = Latent(
        7, 9, 499, cache, type, split, type == "f16", heads_mask=7, kv_len=300, **FULL
    )  # fmt: skip
    case = Case(what)
    least = least_of(case.outputs)
    fills = set()
    for part in (0.95, 0.6, 0.4, 0.2, 0.1, 0.05, 0.02, 0):
        plan = case.check(least + int((case.need - least) * part))
        (loop,) = loops(plan)
        assert loop.dims[-1].count > 1
        fills.add(loop.fill)
    assert (1,) in fills
    assert any(fill[-1] == "kv" for fill in fills)


def test_heads_and_keys_are_cut_at_once() -> None:
    """Every block applies both shifts of a node: that of its first head and of its first key."""
    case = Case(Latent(7, 9, 256, nope=32, rope=32, kv_len=100, heads_mask=7, **FULL))
    plan = case.check(least_of(case.outputs))
    (loop,) = loops(plan)
    assert loop.fill == (1, "kv")
    assert counts(plan) == [(7, 8)]


@pytest.mark.parametrize("n_kv", [33, 64, 97, 131])
def test_blocks_are_no_smaller_than_32_keys(n_kv: int) -> None:
    case = Case(Latent(1, 3, n_kv, cache="f16", sinks=True))
    (loop,) = loops(case.check(least_of(case.outputs)))
    assert loop.fill[-1] == "kv"
    assert loop.dims[-1].step == 32
    assert loop.dims[-1].count == -(-n_kv // 32)


@pytest.mark.parametrize("heads", [2, 7])
def test_the_scratch_of_heads_that_share_one_expansion_counts(heads: int) -> None:
    """K and V of one head are computed before the loop, the attention that reads them inside."""
    case = Case(Latent(heads, 9, 31, ratio=heads))
    plan = case.check(least_of(case.outputs))
    assert loops(plan)[0].fill == (1,)


def test_keys_in_blocks_of_a_block_type() -> None:
    """Heads next to each other in a row of q8_0 can only be cut where they are read."""
    at, heads, n_kv = Leaves(), 6, 97
    cache = at.state("cache", 32, n_kv)
    sides = []
    for label in ("w_k", "w_v"):
        wide = counted(gg.mul_mat(gg.constant(at.normal((32, 64 * heads)), name=label), cache))
        packed = counted(gg.cast(wide, dtype="q8_0"))
        sides.append(gg.permute(gg.reshape(packed, ne=(64, heads, n_kv)), axes=(0, 2, 1, 3)))
    y = {"y": gg.flash_attn_ext(at.input("q", 64, 9, heads), *sides, scale=0.01)}
    expected = run(gg.compile(y), at)["y"]
    need, fills = gg.compile(y).memory.score_peak, set()
    for amb in range(least_of(y), need, need // 20):
        plan = compiled(y, amb)
        peak, out = measured_peak(plan, at)
        assert peak == plan.memory.score_peak <= amb
        assert error(out["y"], expected) <= 1e-6
        fills.add(loops(plan)[0].fill)
    assert (1,) in fills


def test_a_dead_row_stays_dead() -> None:
    """A row whose keys are hidden in every block gives 0, and -inf as its log-sum-exp."""
    case = Case(Latent(2, 3, 97, mask="random", lse=True))
    assert (case.expected[0, :, -1] == -np.inf).all()
    case.check(least_of(case.outputs))


def test_sinks_count_once() -> None:
    """Sinks in each of 64 blocks would make the weights of keys clearly smaller."""
    case = Case(Latent(2, 3, 2048, sinks=True))
    plan = case.check(least_of(case.outputs))
    assert counts(plan)[0][-1] == 64
