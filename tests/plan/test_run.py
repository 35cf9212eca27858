"""Arrays for runs, options of compile, observe, profile, and the text of a plan."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.errors import (
    DeviceError,
    DTypeError,
    GraphError,
    PyggmlError,
    ShapeError,
    UnknownNameError,
)

X = np.arange(32, dtype=np.float32).reshape(4, 8)


def plan_of(dtype: str = "f32", ne: tuple[int, ...] = (8, 4)) -> gg.Plan:
    return gg.compile({"y": gg.cont(gg.input("x", dtype, ne=ne))})


def unaligned(array: np.ndarray) -> np.ndarray:
    raw = bytearray(array.nbytes + 1)
    copy = np.frombuffer(raw, array.dtype, offset=1, count=array.size).reshape(array.shape)
    copy[...] = array
    return copy


@pytest.mark.parametrize(
    "given",
    [
        X, X.astype(">f4"), X.astype(np.float64), X.astype(np.float16), X.astype(np.int64),
        X.astype(np.uint8), X.tolist(), np.asfortranarray(X), X[::-1, ::-1][::-1, ::-1],
        np.repeat(X, 2, axis=1)[:, ::2], unaligned(X), memoryview(X),
    ],
)  # fmt: skip
def test_accepted_arrays(given: Any) -> None:
    for array in (given, np.broadcast_to(np.float32(3), (4, 8))):
        np.testing.assert_array_equal(plan_of().run(x=array)["y"], np.asarray(array, np.float32))


def test_read_only_arrays_are_accepted_and_not_changed() -> None:
    array = X.copy()
    array.flags.writeable = False
    np.testing.assert_array_equal(plan_of().run(x=array)["y"], X)


@pytest.mark.parametrize(
    "given, error, text",
    [
        (X.T, ShapeError, r"expected f32 \[8, 4\], NumPy shape \(4, 8\), got NumPy shape \(8, 4\)"),
        (X[None], ShapeError, "NumPy shape"), (3.0, ShapeError, r"NumPy shape \(\)"),
        (X.astype(complex), DTypeError, "complex128"), (X > 1, DTypeError, "bool"),
        (X.astype(object), DTypeError, "object"), ("abc", DTypeError, "<U3"),
        (None, DTypeError, "object"), (np.ma.masked_array(X), DTypeError, "float32"),
        (np.zeros((4, 8), [("a", "f4")]), DTypeError, "f4"),
        ([[1], [1, 2]], DTypeError, "cannot convert it"),
        (X.astype("datetime64[s]"), DTypeError, "datetime64"),
    ],
)  # fmt: skip
def test_rejected_arrays(given: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"input 'x'.*{text}") as caught:
        plan_of().run(x=given)
    assert isinstance(caught.value, PyggmlError)


def test_integers() -> None:
    plan = plan_of("i32", (4,))
    np.testing.assert_array_equal(plan.run(x=np.array([1, 2, 3, 4], ">i8"))["y"], [1, 2, 3, 4])
    with pytest.raises(DTypeError, match="pass whole numbers"):
        plan.run(x=np.ones(4))
    for wrong in ([2**31, 0, 0, 0], [-(2**31) - 1, 0, 0, 0]):
        with pytest.raises(DTypeError, match="do not fit in i32"):
            plan.run(x=np.array(wrong))
    with pytest.raises(DTypeError, match="do not fit in i64"):
        plan_of("i64", (1,)).run(x=np.array([2**63], np.uint64))


def test_block_types_take_floats_and_raw_rows() -> None:
    plan = plan_of("q8_0", (64, 2))
    values = np.random.default_rng(0).standard_normal((2, 64))
    decoded = plan.run(x=values)["y"]
    assert decoded.dtype == np.float32 and np.abs(decoded - values).max() < 0.02
    view = plan.views(x=values)["y"]
    assert (view.shape, view.dtype) == ((2, 68), np.uint8) and not view.flags.writeable
    raw = view.copy()
    np.testing.assert_array_equal(plan.views(x=raw)["y"], raw)
    with pytest.raises(ShapeError, match=r"NumPy shape \(2, 68\)"):
        plan.run(x=raw[:, :34])


def test_names_of_inputs() -> None:
    plan = plan_of()
    with pytest.raises(UnknownNameError, match="no input 'z'; its inputs are: x") as error:
        plan.run(x=X, z=X)
    assert isinstance(error.value, KeyError)
    with pytest.raises(GraphError, match=r"missing inputs: x \(f32 \[8, 4\]\)"):
        plan.run()
    with pytest.raises(GraphError, match="'x' is both in the dict and a keyword"):
        plan.run({"x": X}, x=X)
    with pytest.raises(DTypeError, match="inputs must be a dict or keywords, not ndarray"):
        plan.run(X)  # type: ignore[arg-type]
    odd = gg.compile({"y": gg.cont(gg.input("copy", ne=(1,))), "z": gg.input("self", ne=(1,))})
    assert odd.run({"copy": [1.0], "self": [2.0]})["y"] == 1


def test_values_like_any_other() -> None:
    wild = np.array([np.nan, np.inf, -np.inf, 1e-40, -0.0, 0.0, 3e38, -1.0], np.float32)
    x = gg.input("x", ne=(8,))
    with warnings.catch_warnings(), np.errstate(all="raise"):
        warnings.simplefilter("error")
        got = gg.compile({"log": gg.log(x), "exp": gg.exp(x), "div": gg.div(x, x)}).run(x=wild)
    assert got["log"][5] == -np.inf and got["exp"][1] == np.inf and np.isnan(got["div"][5])
    assert np.isnan(got["log"][[0, 2, 7]]).all()


# -- compile -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"backends": "numpy"}, DTypeError, "list of places"),
        ({"backends": []}, DTypeError, "list of places"),
        ({"backends": [5]}, DTypeError, "a place must be a string"),
        ({"backends": ["tpu"]}, UnknownNameError, "no backend 'tpu'; there are:.*numpy"),
        ({"backends": ["numpy::"]}, DeviceError, "NAME"),
        ({"backends": ["numpy:0:1.2.3GiB"]}, DeviceError, "NAME"),
        ({"backends": ["numpy", "numpy:1"]}, DeviceError, "one host"),
        ({"pins": {"(": "numpy"}}, DTypeError, "not a regular expression"),
        ({"pins": ["a"]}, DTypeError, "pins= must be a dict"),
        ({"amb": 0}, ShapeError, "above 0"), ({"amb": -1}, ShapeError, "above 0"),
        ({"amb": float("nan")}, ShapeError, "above 0"), ({"amb": "1"}, ShapeError, "above 0"),
        ({"amb": True}, ShapeError, "above 0"), ({"amb": float("inf")}, ShapeError, "above 0"),
        ({"observe": "x"}, DTypeError, "list of label patterns"),
        ({"observe": ["kq*"]}, UnknownNameError, "matches no label; the labels are: x, act"),
        ({"updates": gg.input("u", ne=(1,))}, DTypeError, "updates a list of handles"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options: Any, error: type[Exception], text: str) -> None:
    y = gg.label(gg.relu(gg.input("x", ne=(4,))), "act")
    with pytest.raises(error, match=text):
        gg.compile({"y": y}, **options)


def test_observe() -> None:
    x = gg.input("x", ne=(4,))
    inner = gg.label(gg.scale(x, s=2.0), "inner-3")
    plan = gg.compile({"y": gg.relu(inner)}, observe=["inner-*", "x"])
    got = plan.run(x=-np.ones(4))
    assert set(got) == {"y", "inner-3", "x"} and (got["inner-3"] == -2).all()
    named = gg.label(gg.sqr(inner), "out")
    with pytest.raises(GraphError, match="and another output are both named 'out'"):
        gg.compile({"out": gg.relu(named)}, observe=["out"])


def test_a_plan_in_words() -> None:
    w = gg.constant(np.zeros((2, 8), np.float32), name="w")
    x, s = gg.input("x", ne=(8, 4)), gg.state("s", "f16", ne=(2, 4))
    product = gg.label(gg.mul_mat(w, x), "product")
    plan = gg.compile({"y": gg.relu(product)}, updates=[gg.cpy(product, s)])
    memory = plan.memory
    assert (memory.weights, memory.states, memory.inputs) == (64, 16, 128)
    assert memory.total == 64 + 16 + 128 + memory.compute
    assert "weights | states" in str(memory) and "attention budget: none" in str(memory)
    assert str(plan).startswith("1 split, 3 steps\n")
    assert "split 0 on numpy: 0 copies, 3 steps" in str(plan)
    assert "\nsplit 0 on numpy: 0 copies, 1 step\n" in str(gg.compile({"y": gg.relu(x)}))
    assert "  product = mul_mat(w, x)" in str(plan) and "  relu(product)" in str(plan)
    assert repr(plan) == "<plan of y: 3 steps on numpy, not bound>"
    assert repr(memory) == f"<memory: {memory.total / 2**20:.4f} MiB on numpy>"
    assert repr(plan.store) == "<store: 0 weights, 0 states, arenas: none>"
    profile = plan.profile({}, 2, x=np.zeros((4, 8)))
    assert [row.op for row in profile.rows] == ["mul_mat", "cpy", "relu"]
    assert [row.text for row in profile.rows][::2] == ["product = mul_mat(w, x)", "relu(product)"]
    assert repr(profile).startswith("<profile: 3 steps, ") and "mul_mat(w, x)" in str(profile)
    assert repr(plan).endswith("numpy, bound>")
    assert repr(plan.store).startswith("<store: 1 weight, 1 state, arenas: ")
    assert "GFLOP/s" in str(profile) and profile.seconds > 0
    with pytest.raises(DTypeError, match="whole number of at least 1"):
        plan.profile({}, 0, x=np.zeros((4, 8)))


def test_the_same_plan_gives_the_same_bits() -> None:
    x = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
    node = gg.input("x", ne=(96, 64))
    plan = gg.compile({"y": gg.soft_max(gg.mul_mat(gg.rms_norm(node, eps=1e-6), node))})
    assert plan.run(x=x)["y"].tobytes() == plan.run(x=x)["y"].tobytes()
