"""The places of nodes, weights and inputs: pins, meanings before other places, splits."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from types import FrameType
from typing import Any

import numpy as np
import pytest
from stacks import FEED, HALVES, TOKENS, WIDTH, copied, ops, places, row, same, stack, weight, where

import pyggml as gg
from pyggml import backends
from pyggml.node import Node


def denying(stack: ExitStack, index: int, *ops: str) -> None:
    device: Any = backends.get("null", index)
    stack.enter_context(device.denying(*ops))


# -- pins ---------------------------------------------------------------------------------------


def test_pins_are_searched_and_the_first_match_counts() -> None:
    x = gg.input("x", "f32", ne=(4, 2))
    w = weight("blk.3.ffn_up.weight", 4, 4)
    y = gg.label(gg.relu(gg.mul_mat(w, x)), "last-3")
    plan = gg.compile(
        {"y": y},
        backends=["null:0"],
        pins={"ffn_up": "null:1", "blk": "numpy", r"^last-\d$": "null:2"},
    )
    assert where(plan, "blk.3.ffn_up.weight") == "null:1"
    assert places(plan) == ["null:1", "null:2"]
    assert where(plan, "x") == "null:1"
    swapped = {"blk": "numpy", "ffn_up": "null:1"}
    assert places(gg.compile({"y": y}, backends=["null:0"], pins=swapped)) == ["numpy"]
    anchored = {"^ffn_up": "null:1"}
    with pytest.warns(UserWarning, match=r"the pin '\^ffn_up' to null:1 matches no label"):
        plan = gg.compile({"y": y}, backends=["null:0"], pins=anchored)
    assert places(plan) == ["null:0"]


def test_pins_of_inputs_and_states_attract() -> None:
    a = gg.relu(gg.input("a", "f32", ne=(4,)))
    b = gg.tanh(gg.state("b", "f32", ne=(4,)))
    plan = gg.compile({"a": a, "b": b}, backends=["null:0"], pins={"^a$": "null:1", "^b$": "numpy"})
    assert {place: row(plan, place).inputs for place in ("null:1", "numpy")} == {
        "null:1": 64,
        "numpy": 0,
    }
    assert row(plan, "numpy").states == 16
    assert sorted(places(plan)) == ["null:1", "numpy"]
    assert copied(plan) == []


def test_a_label_that_a_tensor_got_first_counts_too() -> None:
    y = gg.label(gg.label(gg.relu(gg.input("x", "f32", ne=(4,))), "old"), "new")
    for label in ("old", "new"):
        pins = {f"^{label}$": "null:1"}
        assert places(gg.compile({"y": y}, backends=["null:0"], pins=pins)) == ["null:1"]


def test_a_pinned_node_that_its_place_refuses_is_an_error_with_the_reason() -> None:
    y = gg.label(gg.relu(gg.input("x", "f32", ne=(4,))), "here")
    with ExitStack() as stack:
        denying(stack, 1, "relu")
        with pytest.raises(
            gg.UnsupportedOpError, match=r"here.*null:1: relu is on the deny list"
        ) as e:
            gg.compile({"y": y}, backends=["null:0", "numpy"], pins={"here": "null:1"})
    assert "pinned" in str(e.value) and "null:0:" not in str(e.value)
    assert "test_scheduler.py" in str(e.value)


def test_pins_that_are_none() -> None:
    y = gg.relu(gg.input("x", "f32", ne=(4,)))
    with pytest.raises(gg.DTypeError, match=r"'\('.*regular expression"):
        gg.compile({"y": y}, pins={"(": "numpy"})
    with pytest.raises(gg.UnknownNameError, match="nothere"):
        gg.compile({"y": y}, pins={"x": "nothere"})
    with pytest.raises(gg.DeviceError, match="null;1"):
        gg.compile({"y": y}, pins={"x": "null;1"})
    with pytest.raises(gg.DeviceError, match="numpy:1"):
        gg.compile({"y": y}, backends=["numpy:1"])


def test_a_pin_to_no_string_says_that_the_place_is_wrong() -> None:
    y = gg.relu(gg.input("x", "f32", ne=(4,)))
    with pytest.raises(gg.DTypeError, match=r"a place must be a string") as e:
        gg.compile({"y": y}, pins={"x": 3})
    assert "regular expression" not in str(e.value)


# -- meanings before other places ----------------------------------------------------------------


def gated() -> tuple[Node, dict[str, Any]]:
    up, gate = (weight(label, WIDTH, 24) for label in ("up", "gate"))
    x = gg.input("x", "f32", ne=(WIDTH, TOKENS))
    return gg.label(gg.fused_up_gate(up, gate, x), "ffn"), {"x": FEED["x"]}


def test_a_fused_op_is_expanded_on_its_device_before_others_are_tried() -> None:
    y, feed = gated()
    with ExitStack() as stack:
        denying(stack, 0, "fused_up_gate")
        plan = gg.compile({"y": y}, backends=["null:0", "numpy"])
        assert places(plan) == ["null:0"]
        assert sorted(ops(plan.splits[0])) == ["mul", "mul_mat", "mul_mat", "silu"]
        assert "1 x fused_up_gate in simpler ops on null:0: fused_up_gate is on the deny" in str(
            plan
        )
        want = gg.compile({"y": y}).run(feed)["y"]
        np.testing.assert_allclose(plan.run(feed)["y"], want, rtol=1e-5, atol=1e-5)

        denying(stack, 0, "fused_up_gate", "silu")
        plan = gg.compile({"y": y}, backends=["null:0", "numpy"])
        assert [(s.backend.place, ops(s)) for s in plan.splits] == [("numpy", ["fused_up_gate"])]
        assert "simpler" not in str(plan)
        same(plan.run(feed), {"y": want})


def test_a_meaning_is_scattered_where_no_place_runs_all_of_it() -> None:
    y, feed = gated()
    with ExitStack() as stack:
        denying(stack, 0, "fused_up_gate", "silu")
        denying(stack, 1, "fused_up_gate", "mul_mat")
        plan = gg.compile({"y": y}, backends=["null:0", "null:1"])
        runs = {op: s.backend.place for s in plan.splits for op in ops(s)}
        assert runs["mul_mat"] == "null:0" and runs["silu"] == "null:1"
        want = gg.compile({"y": y}).run(feed)["y"]
        np.testing.assert_allclose(plan.run(feed)["y"], want, rtol=1e-5, atol=1e-5)


def test_an_op_that_no_place_runs_is_an_error_that_lists_all_refusals() -> None:
    y, _ = gated()
    with ExitStack() as stack:
        denying(stack, 0, "fused_up_gate", "silu")
        denying(stack, 1, "fused_up_gate", "silu", "mul_mat")
        with pytest.raises(gg.UnsupportedOpError) as e:
            gg.compile({"y": y}, backends=["null:0", "null:1"])
    message = str(e.value)
    for reason in ("ffn", "null:0: silu is on", "null:1: silu is on", "test_scheduler.py"):
        assert reason in message, message


@gg.op
def half_of_squares(a: Node, *, times: int) -> gg.define.Spec:
    """a / 2, squared `times` + 1 times: the square of half_of_squares with `times` - 1."""
    return a.spec


@half_of_squares.means
def _(a: Node, *, times: int) -> Node:
    half = half_of_squares(a, times=times - 1) if times else gg.scale(a, s=0.5)
    return gg.sqr(half)


def test_meanings_nested_thousands_deep_are_scattered() -> None:
    x = gg.input("x", "f32", ne=(4,))

    def calls(n: int) -> int:
        """The questions whether a device runs a node."""
        y, count = half_of_squares(x, times=n), 0

        def counted(frame: FrameType, event: str, argument: object) -> None:
            nonlocal count
            count += event == "call" and frame.f_code.co_name == "supports"

        sys.setprofile(counted)
        try:
            plan = gg.compile({"y": y}, backends=["null:0", "null:1"])
        finally:
            sys.setprofile(None)
        assert len(plan.steps) == n + 3  # the scale, a copy and the squares
        return count

    with ExitStack() as stack:
        denying(stack, 0, "sqr")
        denying(stack, 1, "scale")
        assert calls(5000) < 11 * calls(500)
        denying(stack, 1, "sqr", "scale")
        y = gg.label(half_of_squares(x, times=5000), "deep")
        with pytest.raises(gg.UnsupportedOpError) as e:
            gg.compile({"y": y}, backends=["null:0", "null:1"])
    message = str(e.value)
    for reason in ("no place runs <deep", "simpler ops: sqr is on", "simpler ops: scale is on"):
        assert reason in message, message
    assert "part by part: no place runs <sqr" in message and len(message) < 1000, message


def test_a_failed_expansion_leaves_no_trace() -> None:
    """moe_up_gate is expanded in part on null:0 before its activation is refused there."""
    up, gate = (weight(label, WIDTH, 8, 4) for label in ("up", "gate"))
    b = gg.input("b", "f32", ne=(WIDTH, 1, TOKENS))
    y = gg.moe_up_gate(up, gate, b, gg.input("ids", "i32", ne=(2, TOKENS)))
    with ExitStack() as stack:
        denying(stack, 0, "moe_up_gate", "silu")
        plan = gg.compile({"y": y}, backends=["null:0", "numpy"])
    assert [ops(s) for s in plan.splits] == [["moe_up_gate"]]
    assert "simpler" not in str(plan)
    assert row(plan, "null:0").total == 0
    assert row(plan, "numpy").weights == up.spec.nbytes + gate.spec.nbytes


# -- splits -------------------------------------------------------------------------------------


def test_layers_on_two_devices_are_two_splits() -> None:
    y = stack(8)
    plan = gg.compile({"y": y}, backends=["null:0", "null:1"], pins=HALVES)
    assert places(plan) == ["null:0", "null:1"]
    stream, mask = TOKENS * WIDTH * 4, TOKENS * 32 * 2
    assert sorted(copied(plan)) == sorted([("null:1", stream), ("null:1", mask)])
    assert plan.splits[1].waits == (0,)
    a, b = (row(plan, place) for place in ("null:0", "null:1"))
    assert a.states == b.states == 4 * 2 * WIDTH * 32 * 4
    headers = 2 * 64  # of null's private layout
    assert b.weights - a.weights == 4 * (WIDTH + WIDTH * 40) + headers  # the output's
    alone = gg.compile({"y": y})
    for _ in range(2):
        same(plan.run(FEED), alone.run(FEED))


def test_a_shared_table_of_rope_factors_draws_no_layer_to_the_first_device() -> None:
    factors = gg.constant(np.linspace(1, 2, 4, dtype=np.float32), name="rope_freqs.weight")
    plan = gg.compile({"y": stack(8, factors=factors)}, backends=["null:0", "null:1"], pins=HALVES)
    assert places(plan) == ["null:0", "null:1"]


def test_experts_on_the_host_keep_what_lies_between_their_products() -> None:
    y = stack(3, n_experts=8)
    plan = gg.compile({"y": y}, backends=["null:0", "numpy"], pins={"_exps": "numpy"})
    assert places(plan) == ["null:0", *("numpy", "null:0") * 3]
    for i in range(3):
        assert where(plan, f"opened-{i}") == where(plan, f"hidden-{i}") == "numpy"
    assert row(plan, "numpy").score_peak == 0 < row(plan, "null:0").score_peak
    same(plan.run(FEED), gg.compile({"y": y}).run(FEED))


def test_experts_on_the_host_cost_three_copies_a_layer() -> None:
    """Activations and ids go to the host, and the experts' sum comes back."""
    plan = gg.compile(
        {"y": stack(3, n_experts=8)}, backends=["null:0", "numpy"], pins={"_exps": "numpy"}
    )
    assert len(copied(plan)) == 9
