"""The names of a step's native kernels are those that its program calls; none is compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.native.program import Program
from pyggml.backends.step import LoopStep
from pyggml.runtime.plan import Plan


def plan_of(amb: float | None = None) -> Plan:
    rng = np.random.default_rng(0)
    w = gg.constant(rng.standard_normal((64, 64)), dtype="q8_0", name="w")
    x = gg.input("x", ne=(64, 32))
    q = gg.reshape(gg.mul_mat(w, gg.rms_norm(x, eps=1e-6)), ne=(64, 32, 1))
    k = gg.state("k", "f16", ne=(64, 256, 1))
    kq = gg.soft_max_ext(gg.mul_mat(k, q), scale=0.125)
    y = gg.mul_mat(gg.transpose(gg.state("v", "f16", ne=(64, 256, 1))), kq)
    return gg.compile({"y": y}, backends=["cpu"], amb=amb)


def test_names_are_those_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    add = Program.add

    def noted(self: Program, kernel: Native, *values: Any, **named: Any) -> None:
        names.append(kernel.name)
        add(self, kernel, *values, **named)

    plan = plan_of()
    before = plan.kernels()
    own = [name for kernels in before for name in kernels.names]
    with monkeypatch.context() as patch:
        patch.setattr(Program, "add", noted)
        plan.bind()
    native = [name for name in own if not name.startswith("numpy.")]
    assert native == names[names.index("rms_norm") :]  # repacking of the weight comes before
    assert plan.kernels() == before


def test_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Native) -> int:
        raise AssertionError(f"{self.name} was compiled")

    monkeypatch.setattr(Native, "ready", refuse)
    cut = plan_of(amb=0.6 * plan_of().memory.score_peak / 2**20)
    assert any(isinstance(step, LoopStep) for step in cut.steps)
    assert all(kernels.names for kernels in cut.kernels())
