"""Arrays in a device's memory as inputs and outputs, and repeated runs on several devices."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml import backends
from pyggml.backends.step import Address
from tests.devices.stacks import FEED, HALVES, paces, same, stack

X = np.arange(8, dtype=np.float32)


@pytest.fixture(params=[None, 0, 1], ids=["late", "pace0", "pace1"])
def paced(request: Any) -> Iterator[None]:
    """The queues of two devices run as late as possible, or at random moments."""
    with paces(request.param):
        yield


def on(place: str, values: np.ndarray) -> Any:
    """These values in the memory of a device, in a separate store."""
    x = gg.input("x", ne=values.shape[::-1])
    return gg.compile({"x": x}, backends=[place]).views(x=values)["x"]


def doubled(place: str = "null:0", **options: Any) -> gg.Plan:
    return gg.compile({"y": gg.scale(gg.input("x", ne=(8,)), s=2.0)}, backends=[place], **options)


def test_outputs_stay_on_their_device_and_go_into_the_next_plan() -> None:
    first, second = doubled(), doubled()
    y = first.views(x=X)["y"]
    assert not isinstance(y, np.ndarray)
    np.testing.assert_array_equal(np.asarray(y), 2 * X)
    assert np.asarray(y, np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="without a copy"):
        np.array(y, copy=False)
    np.testing.assert_array_equal(second.run(x=y)["y"], 4 * X)  # a copy within the device
    second.bind(x=y)
    np.testing.assert_array_equal(second.run()["y"], 4 * X)
    first.run(x=X + 1)
    np.testing.assert_array_equal(second.run()["y"], 4 * X + 4)  # nothing was copied


def test_a_view_is_read_under_the_lock_of_its_device() -> None:
    """Reading the array runs the device's queue, which another thread may be filling."""
    y, device = doubled().views(x=X)["y"], backends.get("null", 0)
    read: list[np.ndarray] = []
    reader = threading.Thread(target=lambda: read.append(np.asarray(y)))
    with device.lock:
        reader.start()
        reader.join(timeout=0.2)
        assert not read
    reader.join()
    np.testing.assert_array_equal(read[0], 2 * X)


def test_views_of_each_other_s_devices_do_not_block_two_threads() -> None:
    """Two plans read arrays on each other's device, before each takes its own locks."""
    plans = [doubled("null:0"), doubled("null:1")]
    views = [on("null:1", X), on("null:0", X)]
    done = []

    def work(i: int) -> None:
        for _ in range(200):
            np.testing.assert_array_equal(plans[i].run(x=views[i])["y"], 2 * X)
        done.append(i)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert sorted(done) == [0, 1]


def test_where_an_array_is_matters() -> None:
    plan, there = doubled("null:0"), on("null:1", X)
    with pytest.raises(
        gg.DTypeError, match=r"'x': bind needs an array in the memory of null:0.*pass it to run"
    ):
        plan.bind(x=there)
    with pytest.raises(gg.DTypeError, match=r"got a numpy.ndarray"):
        plan.bind(x=X)
    np.testing.assert_array_equal(plan.run(x=there)["y"], 2 * X)  # by way of the host
    with pytest.raises(gg.ShapeError, match=r"input 'x': expected.*got NumPy shape \(2,\)"):
        plan.run(x=on("null:0", X[:2]))
    every_other = gg.view(gg.input("x", ne=(16,)), ne=(8,), step=(2,))
    wide = gg.compile({"y": every_other}, backends=["null:0"]).views(x=np.arange(16))
    with pytest.raises(gg.ShapeError, match="other strides"):
        plan.run(x=wide["y"])
    ids = gg.compile({"y": gg.cont(gg.input("x", "i32", ne=(8,)))}, backends=["null:0"])
    with pytest.raises(gg.DTypeError, match=r"expected i32.*array of float32.*pass int32"):
        ids.run(x=on("null:0", X))
    y = plan.views(x=X)["y"]
    with pytest.raises(gg.GraphError, match="part of the store's arena"):
        plan.bind(x=y)


@pytest.mark.parametrize("home", ["null:0", "null:1", "numpy"])
def test_an_input_of_several_devices_comes_from_the_one_that_has_it(home: str, paced: None) -> None:
    x = gg.input("x", "f32", ne=(8,))
    outputs = {
        "a": gg.label(gg.relu(x), "on 0"),
        "b": gg.label(gg.scale(x, s=-1.0), "on 1"),
        "c": gg.sqr(x),
    }
    pins = {"^on 0$": "null:0", "^on 1$": "null:1"}
    plan = gg.compile(outputs, backends=["numpy"], pins=pins)
    array = X.copy() if home == "numpy" else on(home, X)
    want = {"a": X, "b": -X, "c": X * X}
    same(plan.run(x=array), want)
    plan.bind(x=array)
    slots = {device for *_, device in plan.store._leaves.inputs}
    for turn in range(3):
        values = X + turn
        if home == "numpy":
            array[:] = values
        else:  # as the library that owns the array would write it
            backends.get("null", int(home[-1])).upload(array.at, array.spec, values)
        same(plan.run(), {"a": values, "b": -values, "c": values * values})
    assert {device for *_, device in plan.store._leaves.inputs} == slots


def test_the_device_waits_for_whoever_still_writes_an_array() -> None:
    """Every run calls the `ready` of an array before it reads the array."""
    device: Any = backends.get("null", 0)
    plan, x, calls = doubled(), on("null:0", X), []
    given = type(device).given

    def late(array: Any) -> Any:
        def ready() -> None:
            calls.append(1)
            device.upload(x.at, x.spec, X + len(calls))

        shared = given(device, array)
        return None if shared is None else replace(shared, ready=ready)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "given", late, raising=False)
        np.testing.assert_array_equal(plan.run(x=x)["y"], 2 * (X + 1))
        plan.bind(x=x)
    for turn in (2, 3):
        np.testing.assert_array_equal(plan.run()["y"], 2 * (X + turn))


# -- copies to the host --------------------------------------------------------------------------


def test_a_copy_to_the_host_lands_when_it_is_waited_for(paced: None) -> None:
    device: Any = backends.get("null", 0)
    there, target = on("null:0", X), np.zeros(8, np.float32)
    arrival = device.send(there.at, Address(target.view(np.uint8), 0, there.at.nb), there.spec)
    later: list[int] = []
    device.queue.add(lambda: later.append(1))
    assert not target.any()
    arrival.wait()
    np.testing.assert_array_equal(target, X)
    assert device.queue.pace is not None or not later  # later work was not waited for
    device.synchronize()


# -- runs in a row -------------------------------------------------------------------------------


@pytest.mark.parametrize("n_experts", [0, 4])
def test_repeats_over_devices_are_the_runs_of_one(n_experts: int, paced: None) -> None:
    """Each run reads states of the one before, and devices read each other's memory late."""
    pins = {"exps": "numpy", **HALVES} if n_experts else HALVES
    h, counter = stack(8, n_experts), gg.state("counter", "f32", ne=(40, 5))
    outputs = {"y": gg.cpy(gg.add(counter, gg.tanh(h)), counter)}
    plain = gg.compile(outputs)
    plan = gg.compile(outputs, backends=["null:0", "null:1", "numpy"], pins=pins)
    for count in (1, 4, 3):
        for _ in range(count):
            want = plain.run(FEED)
        same(plan.repeat(count, FEED), want)


def test_a_run_does_not_overtake_the_copies_of_the_one_before() -> None:
    """The last step on one device reads memory that the first step of the next run overwrites."""
    s = gg.state("s", "f32", ne=(4,))
    first = gg.label(gg.exp(s), "on 0")
    grown = gg.cpy(
        gg.add(s, gg.constant(np.ones(4, np.float32), name="one")), gg.label(s, "on 0 s")
    )
    total = gg.state("total", "f32", ne=(4,))
    summed = gg.cpy(gg.label(gg.add(total, gg.label(gg.cont(first), "on 1")), "on 1 sum"), total)
    pins = {"^on 0": "null:0", "^on 1": "null:1", "^total$": "null:1"}
    plan = gg.compile({}, updates=[grown, summed], backends=["null:0", "null:1"], pins=pins)
    plan.repeat(6)
    want = np.exp(np.arange(6, dtype=np.float32)).sum()
    np.testing.assert_allclose(plan.store.read("total"), want, rtol=1e-5)


@pytest.mark.parametrize("place", ("numpy", "null:0"))
def test_an_input_is_not_bound_to_a_state_of_its_store(place: str) -> None:
    """The planner does not know such an alias: a write of the state would change the input."""
    store, s = gg.Store(), gg.state("s", ne=(8,))
    seen = gg.compile({"s": s}, backends=[place], store=store).views()["s"]
    written = gg.cpy(gg.scale(s, s=10.0), s)
    y = gg.add(gg.input("x", ne=(8,)), written)
    plan = gg.compile({"y": y}, backends=[place], store=store)
    with pytest.raises(gg.GraphError, match=r"input 'x': .* part of the state 's'"):
        plan.bind(x=seen)


def test_threads_with_a_store_each_share_a_device() -> None:
    def compiled(seed: int) -> gg.Plan:
        rng = np.random.default_rng(seed)
        w = gg.constant(rng.standard_normal((64, 64)).astype("f4"), name="w")
        y = gg.input("x", ne=(64, 64))
        for _ in range(6):
            y = gg.rms_norm(gg.mul_mat(w, y), eps=1e-6)
        return gg.compile({"y": y}, backends=["null:0"])

    plans, x = [compiled(i) for i in range(2)], np.ones((64, 64), np.float32)
    expected, wrong = [plan.run(x=x)["y"] for plan in plans], list[str]()

    def work(plan: gg.Plan, want: NDArray[Any]) -> None:
        for _ in range(40):
            try:
                same = np.array_equal(plan.run(x=x)["y"], want)
            except Exception as error:
                wrong.append(repr(error))
            else:
                wrong.extend([] if same else ["other numbers"])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work, args=pair) for pair in zip(plans, expected)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
