"""Attentions that store their scores, under every budget."""

from __future__ import annotations

import pytest
from attentions import Leaves, Scores, counted, run
from checks import Case, compiled, counts, error, least_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tracing import measured_peak

import pyggml as gg

PRIMES = (2, 3, 17, 31, 61, 97)


@st.composite
def scores(draw: st.DrawFn) -> Scores:
    heads, ratio = draw(
        st.sampled_from(
            [(1, 1), (7, 1), (7, 7), (13, 1), (13, 13), (6, 2), (6, 3), (12, 3), (10, 5), (10, 2),
             (15, 5), (4, 4), (12, 1)]
        )
    )  # fmt: skip
    streams = draw(st.sampled_from([1, 1, 1, 2, 4]))
    form = draw(st.sampled_from(["plain", "scale", "add", "cont", "cap", "window", "decode"]))
    if form == "decode":
        ratio = heads
    divisors = [d for d in range(1, heads + 1) if heads % d == 0]
    mask = draw(
        st.none()
        | st.tuples(
            st.sampled_from([1, heads, *divisors]), st.sampled_from(sorted({1, min(2, streams)}))
        )
    )
    return Scores(
        heads,
        ratio,
        draw(st.integers(1, 40)),
        draw(st.sampled_from(PRIMES)),
        streams,
        mask,
        draw(st.sampled_from(["f16", "f32"])),
        draw(st.sampled_from([0, 3])),
        draw(st.booleans()),
        draw(st.sampled_from([0.0, 8.0])) if mask else 0.0,
        form,
        draw(st.sampled_from(["f32", "f16", "q8_0", "cast"])),
        draw(st.sampled_from(["input", "rows", "f32", "q8_0"])),
        draw(st.sampled_from([d for d in (1, 2, 4) if streams % d == 0])),
    )


@settings(max_examples=60)
@given(scores(), st.integers(0, 99))
def test_any_attention_under_any_budget(what: Scores, seed: int) -> None:
    Case(what, seed).check_all()


@pytest.mark.parametrize("ratio", [1, 8, 128])
def test_128_heads(ratio: int) -> None:
    case = Case(Scores(128, ratio, 3, 61, mask=(128, 1), sinks=True, max_bias=8.0))
    case.check_all()


@pytest.mark.parametrize(
    ("what", "axes"),
    [
        (Scores(12, 1, 9, 97, mask=(4, 1), sinks=True, max_bias=4.0), 1),
        (Scores(13, 13, 9, 97, form="decode"), 1),
        (Scores(12, 3, 9, 97, key="cast", value="f32"), 1),
        (Scores(12, 3, 9, 97, value="q8_0", mask=(1, 1)), 1),
        (Scores(7, 1, 40, 97, mask=(7, 1), max_bias=8.0, sinks=True), 2),
        (Scores(1, 1, 40, 97, mask=(1, 1), sinks=True), 1),
        (Scores(3, 1, 9, 61, streams=4, mask=(3, 2), max_bias=8.0), 2),
        (Scores(3, 1, 40, 61, streams=2, mask=(1, 2)), 3),
        (Scores(6, 2, 9, 61, streams=4, stream_ratio=2), 3),
    ],
)  # fmt: skip
def test_every_dimension_is_cut(what: Scores, axes: int) -> None:
    """Three pieces of the first dimension, and as many dimensions as expected for the least."""
    case = Case(what)
    least = low = least_of(case.outputs)
    high = case.need
    while high - low > 1:  # the largest budget that takes three pieces
        middle = (low + high) // 2
        many = counts(compiled(case.outputs, middle))[0][0] >= 3
        low, high = (middle, high) if many else (low, middle)
    assert counts(case.check(low))[0][0] >= 3
    finest = case.check(least)
    assert len(counts(finest)[0]) >= axes
    assert all(count > 1 for count in counts(finest)[0])


@pytest.mark.parametrize(("heads", "ratio"), [(6, 2), (6, 3), (12, 4)])
def test_a_view_of_heads_stays_with_its_keys(heads: int, ratio: int) -> None:
    """Scores of some heads, which start at the first head of a group of K or inside a group."""
    at = Leaves()
    q, k = at.input("q", 8, 9, heads), at.input("k", 8, 37, heads // ratio)
    v, results = at.input("v", 37, 8), []
    for start in (0, 1):
        kq = counted(gg.scale(counted(gg.mul_mat(k, q)), s=0.1 + start))
        seen = gg.view(kq, ne=(37, 9, heads - 2), start=(0, 0, start))
        results.append(gg.mul_mat(v, counted(gg.soft_max_ext(seen))))
    y = {"y": gg.add(*results)}
    expected = run(gg.compile(y), at)["y"]
    need, least = gg.compile(y).memory.score_peak, least_of(y)
    for amb in range(least, need, (need - least) // 9):
        plan = compiled(y, amb)
        peak, out = measured_peak(plan, at)
        assert peak == plan.memory.score_peak <= amb
        assert error(out["y"], expected) <= 1e-6
