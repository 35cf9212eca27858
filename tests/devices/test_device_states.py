"""States that several devices read and write, and memory that a device still copies."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from stacks import copied, ops, paces, places, row, where

import pyggml as gg
from pyggml import backends
from pyggml.node import Node

ALL = ["null:0", "null:1", "numpy"]
ROWS = np.arange(400, dtype=np.float32).reshape(100, 4)


@pytest.fixture(params=[None, 0, 1, 2, 3], autouse=True)
def pace(request: Any) -> Iterator[None]:
    """The queues run as late as possible, or at random moments."""
    with paces(request.param):
        yield


# -- memory that others still copy from ---------------------------------------------------------


@pytest.mark.parametrize("a, b, c", list(permutations(ALL)))
def test_memory_is_not_used_again_while_another_device_copies_from_it(
    a: str, b: str, c: str
) -> None:
    """`a` computes a tensor that `b` and `c` read. Then it waits for `c` alone and writes a second
    tensor into the same memory."""
    x = gg.input("x", "f32", ne=(64,))
    first = gg.label(gg.relu(x), "a first")
    late = gg.label(gg.tanh(first), "b late")
    soon = gg.label(gg.scale(first, s=2.0), "c soon")
    second = gg.label(gg.scale(soon, s=-3.0), "a second")
    y = gg.label(gg.add(late, second), "b y")
    pins = {"^a ": a, "^b ": b, "^c ": c}
    plan = gg.compile({"y": y}, backends=ALL, pins=pins)
    assert places(plan) == [a, b, c, a, b]
    values = np.linspace(-1, 3, 64, dtype=np.float32)
    want = gg.compile({"y": y}).run(x=values)["y"]
    for _ in range(2):
        np.testing.assert_array_equal(plan.run(x=values)["y"], want)
    at = {gg.labels(n)[0]: at for n, at in plan.addresses.items() if gg.labels(n)}
    assert at["a first"].offset == at["a second"].offset  # else the test shows nothing


def test_an_old_handle_is_read_on_another_device_before_the_write() -> None:
    state = gg.state("s", "f32", ne=(4, 100))
    old = gg.label(gg.relu(gg.view(state, ne=(4, 3))), "there")
    new = gg.cpy(gg.input("x", "f32", ne=(4, 100)), state)
    plan = gg.compile(
        {"old": old},
        updates=[new],
        backends=["numpy", "null:0"],
        pins={"^there$": "null:0", "^s$": "numpy"},
    ).bind()
    plan.store.write("s", ROWS)
    np.testing.assert_array_equal(plan.run(x=ROWS + 1)["old"], ROWS[:3])
    np.testing.assert_array_equal(plan.run(x=ROWS + 2)["old"], ROWS[:3] + 1)
    np.testing.assert_array_equal(plan.store.read("s"), ROWS + 2)


def test_a_write_that_could_go_first_waits_for_a_late_reader_of_the_old_handle() -> None:
    """The host has the write ready while the reader still waits for a third device."""
    here = gg.label(gg.relu(gg.input("x", "f32", ne=(4, 100))), "host")
    far = gg.label(gg.scale(here, s=10.0), "far")
    state = gg.state("s", "f32", ne=(4, 100))
    old = gg.label(gg.add(far, state), "reader")
    pins = {"^host$|^s$": "numpy", "^far$": "null:1", "^reader$": "null:0"}
    plan = gg.compile(
        {"old": old}, updates=[gg.cpy(here, state)], backends=["numpy"], pins=pins
    ).bind()
    assert places(plan) == ["numpy", "null:1", "null:0", "numpy"]
    plan.store.write("s", ROWS)
    np.testing.assert_array_equal(plan.run(x=ROWS)["old"], 11 * ROWS)
    np.testing.assert_array_equal(plan.run(x=ROWS + 1)["old"], 10 * (ROWS + 1) + ROWS)
    np.testing.assert_array_equal(plan.store.read("s"), ROWS + 1)


# -- rows ---------------------------------------------------------------------------------------


def read_there(read: Node, want: np.ndarray, nbytes: int, kind: str = "f32") -> None:
    """Check that `read` of the state "s" on null:0 is right and copies `nbytes`."""
    out = gg.label(gg.cont(read), "there")
    pins = {"^there$": "null:0", "^s$": "numpy"}
    plan = gg.compile({"y": out}, backends=["null:0", "numpy"], pins=pins).bind()
    plan.store.write("s", ROWS if kind == "f32" else np.repeat(ROWS, 8, axis=1) / 8)
    np.testing.assert_array_equal(plan.run()["y"], want)
    assert copied(plan) == [("null:0", nbytes)]
    assert row(plan, "null:0").states == 0
    assert row(plan, "null:0").compute < nbytes + out.spec.nbytes + 128


def test_only_the_rows_that_views_read_are_copied() -> None:
    s = gg.state("s", "f32", ne=(4, 100))
    read_there(gg.view(s, ne=(4, 3)), ROWS[:3], 3 * 16)
    read_there(gg.view(s, ne=(2, 3), start=(1, 2)), ROWS[2:5, 1:3], 3 * 16)
    read_there(gg.view(s, ne=(4, 3), start=(0, 1), step=(1, 4)), ROWS[1:10:4], 9 * 16)
    inner = gg.view(gg.view(s, ne=(4, 9)), ne=(4, 2), start=(0, 3))  # the outer view counts
    read_there(inner, ROWS[3:5], 9 * 16)
    read_there(gg.permute(gg.view(s, ne=(4, 3)), axes=(1, 0, 2, 3)), ROWS[:3].T, 3 * 16)
    flat = gg.view(gg.reshape(s, ne=(400,)), ne=(8,))  # no view of the state itself: all of it
    read_there(flat, ROWS[:2].reshape(-1), 1600)


def test_rows_of_block_types_and_of_three_dimensions() -> None:
    q = gg.state("s", "q8_0", ne=(32, 100))
    out = gg.label(gg.cast(gg.view(q, ne=(32, 5)), dtype="f32"), "there")
    pins = {"^there$": "null:0", "^s$": "numpy"}
    plan = gg.compile({"y": out}, backends=["null:0", "numpy"], pins=pins).bind()
    plan.store.write("s", np.repeat(ROWS, 8, axis=1))
    np.testing.assert_array_equal(plan.run()["y"], plan.store.read("s")[:5])
    assert copied(plan) == [("null:0", 5 * 34)]

    three = gg.state("t", "f32", ne=(4, 10, 10))
    out = gg.label(gg.cont(gg.view(three, ne=(4, 2, 3), start=(0, 1, 1))), "there")
    pins = {"^there$": "null:0", "^t$": "numpy"}
    plan = gg.compile({"y": out}, backends=["null:0", "numpy"], pins=pins).bind()
    plan.store.write("t", ROWS.reshape(10, 10, 4))
    np.testing.assert_array_equal(plan.run()["y"], ROWS.reshape(10, 10, 4)[1:4, 1:3])
    assert copied(plan) == [("null:0", 3 * 160)]


def test_only_the_last_rows_of_a_result_are_copied() -> None:
    x = gg.input("x", "f32", ne=(4, 100))
    result = gg.label(gg.relu(x), "here")
    last = gg.label(gg.scale(gg.view(result, ne=(4, 1), start=(0, 99)), s=2.0), "there 1")
    part = gg.view(result, ne=(3, 2), start=(1, 97))
    wide = gg.label(gg.cont(gg.permute(part, axes=(1, 0, 2, 3))), "there 2")
    pins = {"^there": "null:0", "^here": "numpy"}
    plan = gg.compile({"last": last, "wide": wide}, backends=["null:0", "numpy"], pins=pins)
    got = plan.run(x=ROWS)
    np.testing.assert_array_equal(got["last"], 2 * ROWS[99:])
    np.testing.assert_array_equal(got["wide"], ROWS[97:99, 1:].T)
    assert copied(plan) == [("null:0", 3 * 16)]


def test_two_readers_share_one_copy_of_the_rows_of_both() -> None:
    s = gg.state("s", "f32", ne=(4, 100))
    few = gg.label(gg.relu(gg.view(s, ne=(4, 2))), "there 1")
    more = gg.label(gg.tanh(gg.view(s, ne=(4, 2), start=(0, 5))), "there 2")
    pins = {"^there": "null:0", "^s$": "numpy"}
    plan = gg.compile({"a": few, "b": more}, backends=["null:0", "numpy"], pins=pins).bind()
    plan.store.write("s", ROWS)
    got = plan.run()
    np.testing.assert_array_equal(got["a"], ROWS[:2])
    np.testing.assert_array_equal(got["b"], np.tanh(ROWS[5:7]))
    assert copied(plan) == [("null:0", 7 * 16)]


def test_rows_of_what_a_write_returned_and_of_a_whole() -> None:
    """`set_rows` and `cpy` into a part run where the state is; both handles are read elsewhere."""
    x, ids = gg.input("x", "f32", ne=(4, 2)), gg.input("ids", "i32", ne=(2,))
    state = gg.state("s", "f32", ne=(4, 100))
    there = gg.label(gg.scale(x, s=-1.0), "there x")
    first = gg.set_rows(state, there, ids)
    seen = gg.label(gg.cont(gg.view(first, ne=(4, 6))), "there first")
    second = gg.cpy(there, gg.view(first, ne=(4, 2), start=(0, 50)))
    part = gg.label(gg.relu(second), "there part")
    after = gg.label(gg.cont(gg.view(gg.state_of(second), ne=(4, 52))), "there whole")
    outputs = {"first": seen, "part": part, "whole": after}
    plan = gg.compile(
        outputs, backends=["null:1", "numpy"], pins={"^there": "null:1", "^s$": "numpy"}
    ).bind()
    plan.store.write("s", ROWS)
    values = np.array([[-1, 2, -3, 4], [5, -6, 7, -8]], np.float32)
    got = plan.run(x=values, ids=[4, 1])
    want = ROWS.copy()
    want[[4, 1]] = -values
    np.testing.assert_array_equal(got["first"], want[:6])
    want[50:52] = -values
    np.testing.assert_array_equal(got["part"], np.maximum(-values, 0))
    np.testing.assert_array_equal(got["whole"], want[:52])
    np.testing.assert_array_equal(plan.store.read("s"), want)
    wrote = {s.backend.place for s in plan.splits if {"set_rows", "cpy"} & set(ops(s))}
    assert wrote == {"numpy"}
    assert sorted(copied(plan)) == sorted(
        [("null:1", 6 * 16), ("null:1", 52 * 16), ("null:1", 32), ("numpy", 32)]
    )


# -- where a state is ---------------------------------------------------------------------------


def test_a_state_is_with_its_first_user_if_all_writes_run_there() -> None:
    x = gg.label(gg.relu(gg.input("x", "f32", ne=(4, 100))), "made")
    plan = gg.compile(
        {"y": gg.cpy(x, gg.state("s", "f32", ne=(4, 100)))},
        backends=["null:0", "null:1"],
        pins={"^made$": "null:1"},
    )
    assert where(plan, "s") == "null:1"
    assert places(plan) == ["null:1"]
    device: Any = backends.get("null", 1)
    with device.denying("cpy"):
        plan = gg.compile(
            {"y": gg.cpy(x, gg.state("s", "f32", ne=(4, 100)))},
            backends=["null:0", "null:1"],
            pins={"^made$": "null:1"},
        )
    assert where(plan, "s") == "null:0"
    np.testing.assert_array_equal(plan.run(x=ROWS)["y"], ROWS)


def test_an_output_may_look_at_a_state_of_another_device() -> None:
    s = gg.state("s", "f32", ne=(4, 100))
    x = gg.input("x", "f32", ne=(4, 2))
    new = gg.cpy(x, gg.view(s, ne=(4, 2), start=(0, 7)))
    outputs = {
        "old": gg.view(s, ne=(2, 2), start=(1, 6)),  # kept by a copy before the write
        "new": gg.view(gg.state_of(new), ne=(2, 2), start=(1, 6)),
        "other": gg.label(gg.relu(x), "elsewhere"),
    }
    plan = gg.compile(outputs, backends=ALL, pins={"^s$": "null:1", "^elsewhere$": "numpy"}).bind()
    plan.store.write("s", ROWS)
    got = plan.run(x=-np.ones((2, 4)))
    np.testing.assert_array_equal(got["old"], ROWS[6:8, 1:3])
    np.testing.assert_array_equal(got["new"], [[25, 26], [-1, -1]])
    np.testing.assert_array_equal(got["other"], np.zeros((2, 4)))
