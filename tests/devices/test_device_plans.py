"""Plans on several devices: outputs, inputs, tables, profiles and shared stores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from stacks import FEED, TOKENS, WIDTH, copied, places, row, same, stack, weight, where

import pyggml as gg
from pyggml import backends
from pyggml.node import Node
from pyggml.transfer import transfer

ALL = ["null:0", "null:1", "numpy"]
LAYERS = {r"blk\.0\.": "null:0", r"blk\.1\.": "null:1", r"blk\.2\.|output": "numpy"}


# -- outputs and inputs -------------------------------------------------------------------------


def outputs() -> dict[str, Node]:
    """Every kind of output: leaves, views of them, results of each device and views of those."""
    x, w = gg.input("x", "f32", ne=(WIDTH, TOKENS)), weight("w", WIDTH, WIDTH)
    a = gg.label(gg.mul_mat(w, x), "on 0")
    b = gg.label(gg.relu(a), "on 1")
    private = weight("private", WIDTH, WIDTH)
    return {
        "private": private,  # stored in the device's private layout
        "product": gg.label(gg.mul_mat(private, x), "on 1"),
        "x": x,
        "w": w,
        "part of x": gg.view(x, ne=(3, 2), start=(1, 1)),
        "part of w": gg.view(w, ne=(3, 2), start=(1, 1)),
        "half": gg.constant(np.arange(6.0).reshape(2, 3), dtype="bf16"),
        "a": a,
        "turned a": gg.transpose(a),
        "part of b": gg.view(b, ne=(2, 2), start=(1, 0), step=(4, 2)),
        "c": gg.label(gg.tanh(gg.transpose(b)), "on host"),
    }


PINS = {"^on 0$": "null:0", "^on 1$": "null:1", "^on host$": "numpy"}


@pytest.mark.parametrize("order", [ALL, ALL[::-1]])
def test_outputs_may_be_anything_anywhere(order: list[str]) -> None:
    plan = gg.compile(outputs(), backends=order, pins=PINS)
    assert set(places(plan)) == set(ALL)
    want = gg.compile(outputs()).run(x=FEED["x"])
    same(plan.run(x=FEED["x"]), want)
    views = plan.views(x=FEED["x"])
    raw = views.pop("half")  # bf16 as it is stored
    there = {key for key, view in views.items() if not isinstance(view, np.ndarray)}
    assert there == {key for key in views if plan.place_of(plan.graph.outputs[key]) != "numpy"} - {
        "w", "private", "half"
    }  # fmt: skip
    assert np.asarray(raw).dtype == np.uint16
    for key, array in views.items():
        np.testing.assert_array_equal(array, want[key])


def test_graphs_of_leaves_alone() -> None:
    outputs = {"x": gg.input("x", "f32", ne=(4,)), "c": weight("c", 4), "s": gg.state("s", ne=(2,))}
    plan = gg.compile(outputs, backends=["null:0", "null:1"], pins={"^s$": "null:1"})
    got = plan.run(x=[1, 2, 3, 4])
    np.testing.assert_array_equal(got["x"], [1, 2, 3, 4])
    np.testing.assert_array_equal(got["s"], [0, 0])
    same({"c": got["c"]}, gg.compile({"c": outputs["c"]}).run())
    assert plan.splits == () and where(plan, "s") == "null:1"
    assert plan.profile(x=[1, 2, 3, 4]).rows == ()


def test_an_input_that_two_devices_read_is_given_to_both() -> None:
    x = gg.input("x", "f32", ne=(8,))
    outputs = {
        "a": gg.label(gg.relu(x), "on 0"),
        "b": gg.label(gg.tanh(x), "on 1"),
        "c": gg.silu(x),
    }
    with pytest.warns(UserWarning, match=r"the pin '\^on host\$' to numpy matches no label"):
        plan = gg.compile(outputs, backends=["numpy"], pins=PINS)
    assert copied(plan) == []
    assert [row(plan, place).inputs for place in ALL] == [64, 64, 32]
    for values in (np.arange(8.0), -np.arange(8.0)):
        same(plan.run(x=values), gg.compile(outputs).run(x=values))


def test_an_input_that_no_step_of_its_device_reads_leaves_nothing_in_the_queue() -> None:
    device: Any = backends.get("null", 1)
    outputs = {"y": gg.label(gg.relu(gg.input("x", "f32", ne=(8,))), "on host")}
    pins = {"^x$": "null:1", "^on host$": "numpy"}
    plan = gg.compile(outputs, backends=["numpy"], pins=pins)
    for value in range(3):
        np.testing.assert_array_equal(plan.run(x=[value] * 8)["y"], [value] * 8)
    waiting = len(device.queue)
    device.synchronize()
    assert waiting == 0


# -- tables -------------------------------------------------------------------------------------


def test_the_memory_table_has_a_row_for_each_device_and_sums() -> None:
    plan = gg.compile({"y": stack(3)}, backends=ALL, pins=LAYERS)
    rows = plan.memory.devices
    assert [r.device for r in rows] == ALL
    for what in ("weights", "states", "inputs", "compute", "total"):
        assert getattr(plan.memory, what) == sum(getattr(r, what) for r in rows) > 0
    assert plan.memory.score_peak == max(r.score_peak for r in rows)
    assert all(r.total == r.weights + r.states + r.inputs + r.compute for r in rows)
    assert all(r.compute >= max(r.live) for r in rows)
    lines = str(plan.memory).splitlines()
    assert [line.split("|")[0].strip() for line in lines[:5]] == ["device", *ALL, "all"]
    plan.bind()
    assert {d: a.nbytes for d, a in plan.store.arenas.items()} == {
        {"numpy": "host"}.get(r.device, r.device): r.compute for r in rows
    }


def test_a_device_takes_what_its_row_says() -> None:
    device: Any = backends.get("null", 6)
    plan = gg.compile({"y": stack(1)}, backends=["null:6", "numpy"])
    before = device.allocated
    plan.bind()
    assert device.allocated - before == row(plan, "null:6").total


def test_a_described_device_says_whether_the_plan_fits() -> None:
    y = {"y": stack(1)}
    need = row(gg.compile(y, backends=["null:0"]), "null:0").total
    for kib, verdict in (
        (1, "does NOT fit"),
        (need // 1024, "does NOT fit"),
        (need // 1024 + 1, "fits"),
    ):
        plan = gg.compile(y, backends=[f"null:0:{kib}KiB", "numpy"])
        (line,) = [text for text in str(plan.memory).splitlines() if "assumed" in text]
        assert line.startswith(f"null:0 (assumed {kib}KiB): {verdict}")
        for call in (plan.bind, lambda plan=plan: plan.run(FEED)):
            with pytest.raises(gg.DeviceError, match=rf"null:0:{kib}KiB.*for planning only"):
                call()
        assert plan.store.arenas == {}
    pinned = gg.compile(y, backends=["numpy"], pins={r"blk\.0": "null:0:1KiB"})
    assert "null:0 (assumed" in str(pinned.memory)


def test_a_profile_times_the_steps_of_all_devices() -> None:
    plan = gg.compile({"y": stack(3)}, backends=ALL, pins=LAYERS)
    profile = plan.profile(FEED, 2)
    assert len(profile.rows) == len(plan.steps)
    assert [r.op for r in profile.rows] == [s.node.op.name for s in plan.steps]
    assert all(r.seconds > 0 for r in profile.rows)
    copies = [r for r in profile.rows if r.op == "transfer"]
    assert len(copies) == len(copied(plan)) == sum(s.node.op is transfer for s in plan.steps) > 0
    plan.store.clear()
    same(plan.run(FEED), gg.compile({"y": stack(3)}).run(FEED))


def test_what_a_fused_op_computes_inside_cannot_be_observed() -> None:
    up, gate = (gg.constant(np.ones((4, 8), np.float32), name=k) for k in ("up", "gate"))
    x = gg.input("x", "f32", ne=(8, 2))
    y = gg.label(gg.fused_up_gate(up, gate, x), "ffn_hidden-0")
    with pytest.raises(
        gg.UnknownNameError, match=r"ffn_up-\*.*the labels are: up, gate, x, ffn_hidden-\*"
    ):
        gg.compile({"y": y}, backends=ALL, observe=["ffn_up-*"])
    seen = gg.compile({"out": gg.relu(y)}, backends=ALL, observe=["ffn_hidden-*"])
    assert seen.run(x=np.ones((2, 8)))["ffn_hidden-0"].shape == (2, 4)
