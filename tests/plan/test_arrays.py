"""Inputs bound to the caller's arrays, repeated runs, and the progress of uploads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.errors import DTypeError, GraphError, PyggmlError, ShapeError, UnknownNameError
from tests.plan.graphs import greedy, greedy_ids

X = np.arange(8, dtype=np.float32)


def doubled(**options: Any) -> gg.Plan:
    x, z = gg.input("x", ne=(8,)), gg.input("z", ne=(8,))
    return gg.compile({"y": gg.add(gg.scale(x, s=2.0), z), "x": x}, **options)


# -- bound inputs --------------------------------------------------------------------------------


def test_a_bound_input_is_read_where_it_is() -> None:
    plan, array = doubled(), X.copy()
    plan.bind(x=array)
    np.testing.assert_array_equal(plan.run(z=np.ones(8))["y"], 2 * X + 1)
    array[:] = 7  # no copy was made, so the next run sees it
    got = plan.views(z=np.zeros(8))
    np.testing.assert_array_equal(got["y"], 14)
    assert np.shares_memory(got["x"], array)
    assert not any(
        key == "x" for key, *_ in plan.store._leaves.inputs
    )  # and there is no unused slot
    np.testing.assert_array_equal(array, 7)


def test_an_input_is_bound_to_another_array_and_given_back() -> None:
    plan = doubled().bind(x=X)
    plan.run(z=np.zeros(8))
    execution = plan._execution
    assert plan.bind(x=X)._execution is execution  # the same address: nothing is rebuilt
    other = X + 1
    plan.bind(x=other)
    assert plan._execution is not execution
    np.testing.assert_array_equal(plan.run(z=np.zeros(8))["y"], 2 * other)
    plan.bind(x=None)
    np.testing.assert_array_equal(plan.run(x=X - 1, z=np.zeros(8))["y"], 2 * X - 2)


def test_a_bound_array_stays_when_the_store_s_arena_moves() -> None:
    store, array = gg.Store(), X.copy()
    plan = doubled(store=store).bind(x=array)
    large = gg.input("w", ne=(100_000,))
    gg.compile({"y": gg.add(gg.exp(large), gg.log(large))}, store=store).bind()
    np.testing.assert_array_equal(plan.run(z=np.zeros(8))["y"], 2 * X)
    array += 1
    np.testing.assert_array_equal(plan.run(z=np.zeros(8))["y"], 2 * X + 2)


def test_one_array_serves_two_plans_and_one_plan_s_output_another_s_input() -> None:
    first, second = doubled(), doubled()  # each with its own store
    y = first.views(x=X, z=X)["y"]
    second.bind(x=y)
    np.testing.assert_array_equal(second.run(z=np.zeros(8))["y"], 6 * X)


@pytest.mark.parametrize(
    "given, error, text",
    [
        (X.astype("f8"), DTypeError, "input 'x': expected f32.*array of float64.*pass float32"),
        (X.astype(">f4"), DTypeError, ">f4"), (X > 1, DTypeError, "bool"),
        (X[:4], ShapeError, r"NumPy shape \(8,\), got NumPy shape \(4,\)"),
        (np.repeat(X, 2)[::2], ShapeError, "other strides"), (X[::-1], ShapeError, "strides"),
        (np.frombuffer(bytes(33), np.float32, 8, 1), ShapeError, "multiple of 4 bytes"),
        (X.tolist(), DTypeError, "'x': bind needs an array in the memory of numpy, got a list"),
        (np.ma.masked_array(X), DTypeError, "got a numpy.ma"),
        (np.array([None] * 8), DTypeError, "object"),
    ],
)  # fmt: skip
def test_arrays_that_cannot_be_bound(given: Any, error: type[Exception], text: str) -> None:
    plan = doubled()
    with pytest.raises(error, match=f"(?s){text}") as caught:
        plan.bind(x=given, z=X)
    assert isinstance(caught.value, PyggmlError)
    np.testing.assert_array_equal(plan.run(x=X, z=X)["y"], 3 * X)  # neither of the two is bound


def test_raw_rows_can_be_bound() -> None:
    for dtype, raw in (("bf16", np.uint16), ("q8_0", np.uint8)):
        x = gg.input("x", dtype, ne=(64, 2))
        plan = gg.compile({"y": gg.cast(x, dtype="f32")})
        array = gg.compile({"x": x}).views(x=np.ones((2, 64)))["x"].copy()
        assert array.dtype == raw
        np.testing.assert_allclose(plan.bind(x=array).run()["y"], 1, rtol=1e-2)


def test_a_part_of_the_arena_is_not_bound() -> None:
    plan = doubled()
    y = plan.views(x=X, z=X)["y"]
    with pytest.raises(GraphError, match=r"input 'x'.*part of the store's arena"):
        plan.bind(x=y)
    plan.bind(x=y.copy())


def test_names_that_bind_and_run_refuse() -> None:
    plan = doubled().bind(x=X)
    with pytest.raises(UnknownNameError, match="no input 'q'; its inputs are: x, z"):
        plan.bind(q=X)
    with pytest.raises(GraphError, match=r"'x' is bound to your array.*bind\(x=None\)"):
        plan.run(x=X, z=X)
    with pytest.raises(GraphError, match="missing inputs: z"):
        plan.run()
    with pytest.raises(GraphError, match="'x' is both in the dict and a keyword"):
        plan.bind({"x": X}, x=X)
    with pytest.raises(DTypeError, match=r"bind\(arrays, progress\):.*is not a function"):
        plan.bind({}, X)  # type: ignore[arg-type]


def test_options_do_not_take_the_names_of_inputs() -> None:
    names = ("copy", "repeat", "progress", "inputs", "arrays", "n", "runs", "self")
    nodes = {name: gg.input(name, ne=(8,)) for name in names}
    outputs = {name: gg.scale(node, s=2.0) for name, node in nodes.items()}
    plan, feed = gg.compile(outputs), {name: X + i for i, name in enumerate(names)}
    for got in (plan.run(**feed), plan.repeat(2, **feed), plan.views(**feed)):
        for name in names:
            np.testing.assert_array_equal(got[name], 2 * feed[name])
    assert plan.time(**feed) > 0 and plan.time({}, 1, **feed) > 0
    assert len(plan.profile({}, 1, **feed).rows) == len(names)
    plan.bind(**feed)
    np.testing.assert_array_equal(plan.run()["progress"], 2 * feed["progress"])


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda p: p.run(x=X, z=X, copy=False), r"run\(copy=False\) is now views\(\)"),
        (lambda p: p.run(x=X, z=X, repeat=3), r"run\(repeat=n\) is now repeat\(n\)"),
        (lambda p: p.profile(x=X, z=X, repeat=3), r"profile\(repeat=n\) is profile\(inputs, n\)"),
        (lambda p: p.bind(progress=print), r"bind\(progress=f\) is now bind\(arrays, f\)"),
    ],
)
def test_old_options_name_what_stands_in_their_place(call: Any, text: str) -> None:
    with pytest.raises(UnknownNameError, match=text):
        call(doubled())


# -- runs without a host in between --------------------------------------------------------------


@pytest.mark.parametrize("places", [["numpy"], ["null:0"], ["null:0", "numpy"]])
def test_many_steps_in_one_run_are_many_runs_of_one(places: list[str]) -> None:
    pins = {"embd": "numpy", "state": "null:0"} if len(places) > 1 else {}
    plans = [gg.compile(greedy(), backends=places, pins=pins) for _ in range(2)]
    for plan in plans:
        plan.bind().store.write("token", [3])
    single = [int(plans[0].run()["token"][0]) for _ in range(12)]
    assert len(set(single)) > 4 and single == greedy_ids(3, 12)
    assert int(plans[1].repeat(5)["token"][0]) == single[4]
    assert int(plans[1].repeat(7)["token"][0]) == single[11]
    for name in ("ids", "token", "pos"):
        np.testing.assert_array_equal(*(plan.store.read(name) for plan in plans), name)
    assert plans[1].store.read("ids")[:12, 0].tolist() == single
    assert plans[1].store.read("pos").tolist() == [12]


def test_inputs_are_given_once_for_all_repeats() -> None:
    x, s = gg.input("x", ne=(2,)), gg.state("s", ne=(2,))
    total = gg.cpy(gg.add(s, x), s)
    plan = gg.compile({"y": gg.scale(x, s=2.0)}, updates=[total])
    np.testing.assert_array_equal(plan.repeat(5, x=[1, 2])["y"], [2, 4])
    np.testing.assert_array_equal(plan.store.read("s"), [5, 10])
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(DTypeError, match="repeat"):
            plan.repeat(wrong, x=[1, 2])  # type: ignore[arg-type]


# -- progress ------------------------------------------------------------------------------------


def test_progress_of_weights_that_go_to_a_device() -> None:
    w = [gg.constant(np.ones((8 * (i + 1), 8), np.float32), name=f"w{i}") for i in range(3)]
    y = gg.add(gg.relu(w[1]), gg.relu(w[0]))
    store, seen = gg.Store(), []
    first = gg.compile({"y": y}, backends=["null:0"], store=store)
    first.bind({}, lambda done, total: seen.append((done, total)))
    total = first.memory.weights
    assert [b for _, b in seen] == [total] * 2 and seen[-1][0] == total > seen[0][0] > 0
    seen.clear()
    more = gg.compile({"y": y, "z": gg.relu(w[2])}, backends=["null:0"], store=store)
    more.bind({}, lambda done, total: seen.append((done, total)))
    assert seen == [
        (more.memory.weights - total,) * 2
    ]  # weights in the store are not uploaded again
    seen.clear()
    gg.compile({"y": y}).bind({}, lambda *both: seen.append(both))
    assert not seen  # the host reads its weights in place

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    again = gg.Store()
    with pytest.raises(KeyboardInterrupt):
        gg.compile({"y": y}, backends=["null:0"], store=again).bind({}, stop)
    assert not again._leaves.weights and not again.arenas
