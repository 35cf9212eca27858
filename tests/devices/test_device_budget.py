"""The attention memory budget over several devices."""

from __future__ import annotations

import re
import warnings

import numpy as np
from stacks import FEED, HALVES, ops, places, row, stack

import pyggml as gg

MIB = 2**20


def test_a_budget_holds_on_each_device() -> None:
    y = stack(8)
    plain = gg.compile({"y": y}, backends=["null:0"])
    budget = plain.memory.score_peak * 0.85
    plan = gg.compile({"y": y}, backends=["null:0", "null:1"], pins=HALVES, amb=budget / MIB)
    assert len(places(plan)) == 2
    loops = [sum(op == "loop" for op in ops(s)) for s in plan.splits]
    assert loops == [4, 4]
    for device in plan.memory.devices:
        assert 0 < device.score_peak <= budget
    got, want = plan.run(FEED)["y"], plain.run(FEED)["y"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_scores_are_counted_on_a_device_that_gets_its_input_from_another() -> None:
    plan = gg.compile({"y": stack(8)}, backends=["null:0", "null:1"], pins=HALVES)
    a, b = (row(plan, place) for place in ("null:0", "null:1"))
    assert a.score_peak == b.score_peak > 0
    assert a.score_peak_plain == b.score_peak_plain > 0


def test_the_peak_without_a_budget_is_reported_beside_the_one_with_it() -> None:
    places = {"backends": ["null:0", "null:1"], "pins": HALVES}
    plain = gg.compile({"y": stack(8)}, **places).memory.score_peak
    cut = gg.compile({"y": stack(8)}, amb=0.85 * plain / MIB, **places).memory
    assert cut.score_peak < cut.score_peak_plain == plain
    assert f"{plain / MIB:.4f}" in str(cut)


def test_a_budget_bounds_what_is_alive_together_behind_a_border() -> None:
    """Two attentions, each within the budget, whose scores are alive at once."""
    q = gg.label(gg.relu(gg.input("q", "f32", ne=(8, 16, 2))), "far")
    weights = []
    for i in range(2):
        k = gg.label(gg.state(f"k{i}", "f32", ne=(8, 32, 2)), "near")
        weights.append(gg.soft_max(gg.mul_mat(k, q)))
    v = gg.label(gg.state("v", "f32", ne=(32, 8, 2)), "near")
    mixed = gg.add(gg.mul_mat(v, weights[0]), gg.mul_mat(v, weights[1]))
    pins = {"^far$": "null:1", "^near$": "null:0"}
    peaks = [
        gg.compile({"y": mixed}, backends=["null:0", "null:1"], pins=p, amb=amb).memory
        for p in ({}, pins)
        for amb in (None, 5000 / MIB)
    ]
    assert [m.score_peak for m in peaks[:2]] == [m.score_peak for m in peaks[2:]]


def test_attention_that_is_spread_over_devices_stays_whole_with_a_warning() -> None:
    y = stack(2)
    pins = {"^kq-1$": "null:1"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = gg.compile({"y": y}, backends=["null:0"], pins=pins, amb=40_000 / MIB)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1 and re.search(r"null:0, null:1.*outside the budget.*pin", messages[0])
    assert sum(op == "loop" for s in plan.splits for op in ops(s)) == 1
    want = gg.compile({"y": y}).run(FEED)["y"]
    np.testing.assert_allclose(plan.run(FEED)["y"], want, rtol=1e-4, atol=1e-5)
