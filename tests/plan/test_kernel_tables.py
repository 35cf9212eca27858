"""Kernel tables, and a second set of kernels on the host's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends, ops
from pyggml.backends.host import HostBackend
from pyggml.backends.numpy.backend import NumpyBackend
from pyggml.backends.step import Step
from pyggml.backends.table import Kernel, KernelTable
from pyggml.errors import UnknownNameError

X = gg.input("x", ne=(4, 3))


def fill(out: Any, *sources: Any, **attrs: Any) -> None:
    out[...] = 0


def table(**fields: Any) -> KernelTable[Kernel]:
    kernels = KernelTable(Kernel, {"f32"})
    kernels.kernel(ops.add, **fields)(fill)
    return kernels


def test_a_row_says_what_the_planner_must_know() -> None:
    kernels = table(inplace=("a", "b"), scratch=lambda node: node.ne[0], numeric="f16")
    step = kernels.step(gg.add(X, X), Step)
    assert (step.scratch, step.inplace, step.reads) == (4, (X, X), (X, X))
    assert kernels.numeric(step.node) == "f16" and kernels[ops.add].run is fill
    assert table().step(gg.add(X, X), Step).inplace == ()
    assert table(numeric=lambda node: node.dtype.name).numeric(gg.add(X, X)) == "f32"


def test_operands_that_were_left_out_are_not_taken_over() -> None:
    kernels = KernelTable(Kernel, {"f32"})
    kernels.kernel(ops.soft_max_ext, inplace=("a", "mask"))(fill)
    assert kernels.step(gg.soft_max_ext(X), Step).inplace == (X,)


def test_inplace_names_operands() -> None:
    with pytest.raises(UnknownNameError, match="add has no operand 'c'; its operands are: a, b"):
        table(inplace=("c",))


def test_refusals_in_their_order() -> None:
    y = gg.add(X, X)
    half = gg.cast(X, dtype="f16")
    assert table().refusal(y) is None
    assert table().refusal(gg.sub(X, X)) == "no kernel for sub"
    assert table().refusal(gg.add(half, half)) == "add does not take f16"
    assert table(types=None).refusal(gg.add(half, half)) is None
    assert table(refuses=lambda node: "never").refusal(y) == "never"
    picky = KernelTable(Kernel, {"f32"}, refuses=lambda node: "none of ours")
    picky.kernel(ops.add, refuses=lambda node: "never")(fill)
    assert picky.refusal(y) == "none of ours"


def test_a_second_host_backend_is_a_name_and_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shares memory with NumPy: nothing is copied, and NumPy runs the other ops."""
    kernels = KernelTable(Kernel, {"f32"})

    @kernels.kernel(ops.sqr, inplace=("a",))
    def sqr(out: Any, a: Any) -> None:
        np.multiply(a, a, out=out)
        out += 1000  # shows which kernel ran

    class Other(HostBackend):
        name = "other"

    Other.kernels = kernels
    known = {"other": Other(), "numpy": NumpyBackend()}
    monkeypatch.setattr(backends, "get", lambda name, index=0: known[name])
    plan = gg.compile({"y": gg.sqrt(gg.sqr(X))}, backends=["other", "numpy"])
    assert [step.node.op.name for step in plan.steps] == ["sqr", "sqrt"]
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_allclose(plan.run(x=values)["y"], np.sqrt(values**2 + 1000), rtol=1e-6)
