"""Profiles: times of the right steps, what they cost, sums, reasons, ceilings and traces."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from examples.own_op import cumsum
from pyggml import backends
from pyggml.backends.base import Kernels
from pyggml.backends.numpy.table import KERNELS
from pyggml.backends.step import Step
from pyggml.backends.timing import Fastest
from pyggml.errors import IdError, UnknownNameError
from pyggml.node import Node
from pyggml.runtime.ceilings import Ceiling, ceiling
from pyggml.runtime.layers import collapsed
from pyggml.runtime.profile import Phases, Profile, Timing
from pyggml.runtime.report import main_op

X = np.ones((4, 8), np.float32)
PLACES = ["numpy", "null:0", "cpu"]
#: A sleep that no step takes by chance.
NAP = 0.2


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        pytest.importorskip("numba", reason="needs the extra 'cpu'")
    return str(request.param)


def layers() -> Node:
    """Two layers of two steps each, and a last step."""
    h = gg.input("x", ne=(8, 4))
    for il in range(2):
        w = gg.constant(np.eye(8, dtype=np.float32), name=f"blk.{il}.w.weight")
        h = gg.label(gg.relu(gg.mul_mat(w, h)), f"l_out-{il}")
    return gg.label(gg.soft_max(h), "result")


def test_the_slow_step_is_the_one_that_sleeps(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cumsum has no native kernel, so the cpu backend calls NumPy's too."""
    row = KERNELS[cumsum]

    def slow(*args: Any, **kwargs: Any) -> None:
        time.sleep(NAP)
        row.run(*args, **kwargs)

    monkeypatch.setitem(KERNELS, cumsum, replace(row, run=slow))
    x = gg.input("x", ne=(8, 4))
    y = cumsum(gg.relu(gg.sqr(x)))
    profile = gg.compile({"y": y}, backends=[place]).profile({"x": X}, 2)
    assert [r.op for r in profile.rows] == ["sqr", "relu", "cumsum"]
    assert [r.seconds > NAP for r in profile.rows] == [False, False, True]
    assert profile.phases.seconds > NAP
    if place == "null:0":  # its queue runs in the wait
        assert profile.whole == (0.0,) and "alone" not in profile.head()
    else:
        assert NAP < profile.whole[0] <= profile.phases.issue


def test_the_steps_alone_take_no_longer_than_a_run(place: str) -> None:
    """They are timed in the same undivided runs, so this holds on a busy machine, too."""
    plan = gg.compile({"y": layers()}, backends=[place, "numpy"], pins={"blk.1": "numpy"})
    for _ in range(5):
        profile = plan.profile({"x": X}, 1)
        assert sum(profile.whole) <= profile.phases.issue


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([[3.0, 3.0], [7.0, 0.1], [0.1, 8.0]], [3.0, 3.0]),
        ([[3.0, 3.0], [7.0, 0.1], [0.1, 8.0], [2.0, 3.0], [5.0, 4.0]], [2.0, 3.0]),
        ([[9.0, 0.0], [2.0, 3.0], [0.0, 9.0], [3.0, 3.0]] * 2, [2.0, 3.0]),
        ([[9.0, 0.0], [2.0, 3.0], [3.0, 3.0], [9.0, 9.0]] + [[9.0, 9.0]] * 4, [2.5, 3.0]),
    ],
)
def test_times_are_those_of_the_fastest_runs(
    runs: list[list[float]], expected: list[float]
) -> None:
    """Not the shortest of each step: a late reading makes one step long and the next one short."""
    times = iter(runs)
    watch = Fastest(lambda: lambda: next(times))
    for _ in runs:
        watch.run(0)
        watch.read()
    assert watch.seconds() == expected and watch.whole() == 0.0


def test_native_kernels_are_timed_between_each_other() -> None:
    pytest.importorskip("numba", reason="needs the extra 'cpu'")
    rng = np.random.default_rng(0)
    w = gg.constant(rng.standard_normal((1024, 1024)), name="w")
    x = gg.input("x", ne=(1024, 4096))  # few pauses of a thread are as long as this product
    y = gg.relu(gg.mul_mat(w, gg.sqr(x)))
    profile = gg.compile({"y": y}, backends=["cpu"]).profile({"x": np.ones((4096, 1024))}, 10)
    first, product, last = profile.rows
    assert product.seconds > max(first.seconds, last.seconds) > 0
    assert product.kernels.names and product.kernels.why == ""


def test_a_kernel_that_numpy_runs_has_a_reason() -> None:
    pytest.importorskip("numba", reason="needs the extra 'cpu'")
    y = cumsum(gg.relu(gg.input("x", ne=(8, 4))))
    profile = gg.compile({"y": y}, backends=["cpu"]).profile(x=X)
    assert [r.kernels.why for r in profile.rows] == ["", "no kernel for cumsum"]
    assert [(why, len(rows)) for why, rows in profile.slow_paths()] == [("no kernel for cumsum", 1)]
    assert "not the fast kernel: 1 step of cumsum: no kernel for cumsum" in str(profile)


def test_an_id_past_the_end_is_an_error_in_a_profile_too(place: str) -> None:
    y = gg.get_rows(gg.input("x", ne=(8, 4)), gg.input("ids", "i32", ne=(2,)))
    plan = gg.compile({"y": y}, backends=[place])
    with pytest.raises(IdError, match="id 4 is past the end"):
        plan.profile(x=X, ids=[0, 4])
    assert len(plan.profile(x=X, ids=[0, 3]).rows) == 1


def test_every_run_of_a_profile_is_complete(place: str) -> None:
    """A state that counts the runs has counted whole ones."""
    s, one = gg.state("s", ne=(4,)), gg.constant(np.ones(4, np.float32), name="one")
    plan = gg.compile({}, updates=[gg.cpy(gg.add(s, one), s)], backends=[place])
    plan.profile({}, 3)
    assert np.array_equal(plan.store.read("s"), np.full(4, 1 + 4 + 3))


def test_a_step_of_several_nodes_goes_by_the_op_of_most_work() -> None:
    w, x = gg.constant(np.eye(8, dtype=np.float32), name="w"), gg.input("x", ne=(8, 4))
    product = gg.mul_mat(w, x)
    total = product + x
    assert main_op(Step(total, (product, total), (w, x))) == "mul_mat"
    assert main_op(Step(total, (total,), (product, x))) == "add"


def test_rows_and_sums() -> None:
    profile = gg.compile({"y": layers()}, backends=["numpy"]).profile({"x": X}, 2)
    assert [row.label for row in profile.rows] == [
        "mul_mat(blk.0.w.weight)", "l_out-0", "mul_mat(blk.1.w.weight)", "l_out-1", "result",
    ]  # fmt: skip
    assert [row.layer for row in profile.rows] == [0, 0, 1, 1, None]
    assert all(__file__ in row.line for row in profile.rows)
    assert profile.rows[0].spec == "f32 [8, 4]" and profile.rows[0].flops == 2 * 8 * 8 * 4
    assert {s.name: s.steps for s in profile.by("label")} == {
        "mul_mat(blk.*.w.weight)": 2, "l_out-*": 2, "result": 1,
    }  # fmt: skip
    assert [(s.name, s.steps) for s in profile.by("layer")] == [("0", 2), ("1", 2), ("", 1)]
    assert {s.name for s in profile.by("op")} == {"mul_mat", "relu", "soft_max_ext"}
    assert [s.name for s in profile.by("place")] == ["numpy"] and profile.launches == 5
    for what in ("op", "label", "layer", "kernel", "place"):
        sums = profile.by(what)
        assert sum(s.seconds for s in sums) == pytest.approx(profile.seconds)
        assert sum(s.nbytes for s in sums) == sum(row.nbytes for row in profile.rows)
    with pytest.raises(UnknownNameError, match="must be one of op, label, layer"):
        profile.by("size")


@pytest.mark.parametrize(
    "label, short",
    [
        ("kq-12", "kq-*"),
        ("blk.3.attn_q.weight", "blk.*.attn_q.weight"),
        ("mul_mat(blk.3.attn_q.weight)", "mul_mat(blk.*.attn_q.weight)"),
        ("cache_k_l30", "cache_k_l*"),
        ("set_rows(cache_k_l30)", "set_rows(cache_k_l*)"),
        ("q4_0", "q4_0"),
        ("result_output", "result_output"),
    ],
)
def test_layers_in_labels(label: str, short: str) -> None:
    assert collapsed(label) == short


def test_why_a_step_is_on_another_device() -> None:
    null = backends.get("null")
    with null.denying("soft_max_ext"):  # type: ignore[attr-defined]
        plan = gg.compile({"y": gg.soft_max(gg.relu(gg.input("x", ne=(8, 4))))},
                          backends=["null:0", "numpy"])  # fmt: skip
        rows = plan.profile(x=X).rows
    assert [(r.op, r.place) for r in rows] == [
        ("relu", "null:0"), ("transfer", "numpy"), ("soft_max_ext", "numpy"),
    ]  # fmt: skip
    assert rows[2].kernels.why == "not on null:0: soft_max_ext is on the deny list"


def test_kernels_of_loops_are_named_once() -> None:
    assert str(Kernels(("a", "b", "a", "b"))) == "a + b" and str(Kernels(())) == ""


def timing(**changes: Any) -> Timing:
    row = Timing(
        "y = relu(x)", "relu", "y", None, "f32 [8, 4]", "numpy", 0, "", Kernels(("relu",)),
        seconds=2e-6, flops=100.0, nbytes=4000.0,
    )  # fmt: skip
    return replace(row, **changes)


def test_shares_of_ceilings() -> None:
    rows = timing(), timing(flops=16e6), timing(place="cuda:0"), timing(seconds=0.0)
    profile = Profile(rows, Phases(0, 1e-6, 0), ceilings={"numpy": Ceiling(4e9, 10e12)})
    assert [profile.share(row) for row in rows] == [0.5, 0.8, None, None]
    assert "     50%" in str(profile) and "     80%" in str(profile)


def test_ceilings_are_measured() -> None:
    measured = ceiling("numpy")
    assert measured is not None
    assert 1e8 < measured.copy < 1e13 and 1e8 < measured.product < 1e15
    null = backends.get("null")
    null.limit = 1 << 20  # type: ignore[attr-defined]
    try:
        assert ceiling("null:0") is None
    finally:
        null.limit = None  # type: ignore[attr-defined]
