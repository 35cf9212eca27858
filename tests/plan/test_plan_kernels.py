"""`plan.kernels()`: before and after binding, and with a reason for each slow path."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as gg
from examples.own_op import cumsum
from pyggml import backends
from pyggml.backends.base import Kernels
from pyggml.backends.step import LoopStep
from pyggml.runtime.plan import Plan

PLACES = [["numpy"], ["cpu"], ["null:0"], ["null:0", "numpy"], ["null:0", "cpu"]]


@pytest.fixture(params=PLACES, ids="+".join)
def places(request: pytest.FixtureRequest) -> list[str]:
    if "cpu" in request.param:
        pytest.importorskip("numba", reason="needs the extra 'cpu'")
    return list(request.param)


def test_they_are_the_same_before_and_after_binding(places: list[str]) -> None:
    w = gg.constant(np.ones((64, 64)), dtype="q8_0", name="w")
    x = gg.input("x", ne=(64, 4))
    y = gg.relu(cumsum(gg.soft_max(gg.mul_mat(w, x))))
    denied = ["soft_max_ext"] if len(places) == 2 else []
    with backends.get("null").denying(*denied):  # type: ignore[attr-defined]
        plan = gg.compile({"y": y}, backends=places)
        before = plan.kernels()
        profile = plan.profile({"x": np.ones((4, 64))}, 1)
        assert before == plan.kernels() == [row.kernels for row in profile.rows]
    assert len(before) == len(plan.steps) and all(kernels.names for kernels in before)
    assert [k for k in before if k.names == ("copy",)] == [Kernels(("copy",))] * (
        2 if len(places) == 2 else 0
    )


def test_slow_paths_are_known_before_binding() -> None:
    pytest.importorskip("numba", reason="needs the extra 'cpu'")
    y = cumsum(gg.relu(gg.input("x", ne=(8, 4))))
    plan = gg.compile({"y": y}, backends=["cpu"])
    assert [kernels.why for kernels in plan.kernels()] == ["", "no kernel for cumsum"]
    assert "not the fast kernel: no kernel for cumsum" in plan._repr_html_()
    assert "no kernel for cumsum" in plan.profile(x=np.ones((4, 8)))._repr_html_()


def loop() -> Plan:
    k = gg.state("cache_k", "f16", ne=(64, 256, 2))
    p = gg.soft_max_ext(gg.mul_mat(k, gg.input("q", ne=(64, 64, 2))), scale=0.125)
    out = gg.mul_mat(gg.transpose(gg.state("cache_v", "f16", ne=(64, 256, 2))), p)
    return gg.compile({"out": out}, amb=0.1, backends=["cpu"])


def test_a_bound_loop_has_the_kernels_of_all_pieces() -> None:
    pytest.importorskip("numba", reason="needs the extra 'cpu'")
    plan = loop()
    [index] = [i for i, step in enumerate(plan.steps) if isinstance(step, LoopStep)]
    before = plan.kernels()[index]
    plan.bind()
    after = plan.kernels()[index]
    assert set(before.names) == set(after.names) and len(before.names) < len(after.names)
    assert before.why == after.why
