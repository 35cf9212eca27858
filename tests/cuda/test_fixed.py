"""Runs on the same arrays are those of `plan.run`, whatever happens to the plan in between."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda.whole import Whole
from pyggml.errors import DeviceError, GraphError
from pyggml.runtime.fixed import Fixed
from tests.cuda.conftest import Machine
from tests.interrupts import everywhere

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SHAPE = (4, 6)


class Runs:
    """A plan that also returns its two inputs, and its runs on arrays that stay the same. Its one
    kernel does nothing here.

    whole  how many of them were one call of the device
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        x, y = gg.input("x", ne=SHAPE[::-1]), gg.input("y", "i32", ne=(1,))
        outputs = {"x": x, "y": y, "z": gg.relu(x)}
        self.plan = gg.compile(outputs, backends=["cuda"])
        self.arrays = {"x": np.zeros(SHAPE, np.float32), "y": np.zeros(1, np.int32)}
        self.fixed = Fixed(self.plan, self.arrays)
        self.whole, self._value = 0, 0
        call = Whole.__call__

        def counted(whole: Whole, *arguments: Any) -> Any:
            self.whole += 1
            return call(whole, *arguments)

        patch.setattr(Whole, "__call__", counted)

    def check(self, why: str = "") -> int:
        """Run on new contents, and compare; whether it was one call."""
        before = self.whole
        self._value += 1
        self.arrays["x"][:] = self.arrays["y"][:] = self._value
        result = self.fixed.run()
        np.testing.assert_array_equal(result["x"], np.full(SHAPE, self._value), err_msg=why)
        assert result["y"].tolist() == [self._value], why
        return self.whole - before


@pytest.fixture
def runs(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Runs:
    machine("gpu")
    return Runs(monkeypatch)


def test_contents_are_those_of_each_run(runs: Runs) -> None:
    results = []
    for i in range(4):
        runs.arrays["x"][:] = i
        results.append(runs.fixed.run()["x"])
    assert [float(result[0, 0]) for result in results] == [0, 1, 2, 3]
    assert runs.check()


def test_a_larger_arena_is_taken_and_the_old_one_freed(runs: Runs) -> None:
    runs.check()
    assert runs.check()
    live = sys.modules["pycuda.driver"].DeviceAllocation.live  # type: ignore[attr-defined]
    large = gg.relu(gg.add(gg.input("z", ne=(1 << 20,)), gg.input("x", ne=(1,))))
    old = runs.plan.store.arenas["cuda:0"].buffer.ptr
    assert old in live
    gg.compile({"z": large}, backends=["cuda"], store=runs.plan.store).bind()
    assert old not in live
    assert runs.plan.execution is None
    runs.check()
    assert runs.check()


def test_it_comes_after_runs_that_were_submitted(runs: Runs) -> None:
    runs.check()
    x, y = np.full(SHAPE, -1, np.float32), np.array([-1], np.int32)
    run = runs.plan.submit(x=x, y=y)
    assert not runs.check()  # queued runs count as finished only after `plan.run`
    assert (run.result()["x"] == x).all()
    assert not runs.plan.store.shared.queued


def test_a_bound_input_is_not_overwritten(runs: Runs) -> None:
    runs.check()
    view = gg.compile({"v": gg.scale(gg.input("w", ne=SHAPE[::-1]), s=1.0)}, backends=["cuda"])
    runs.plan.bind(x=view.views(w=np.ones(SHAPE, np.float32))["v"])
    with pytest.raises(GraphError, match="input 'x' is bound to your array"):
        runs.fixed.run()
    runs.plan.bind(x=None)
    assert runs.check()


def test_after_an_error(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.check()
    driver: Any = sys.modules["pycuda.driver"]

    def fail(*_: Any) -> None:
        raise driver.LogicError("cuMemcpyHtoDAsync failed: invalid argument")

    with monkeypatch.context() as patch:
        patch.setattr(driver, "memcpy_htod_async", fail)
        with pytest.raises(DeviceError, match="uploading: cuMemcpy"):
            runs.fixed.run()
    assert not driver.Context.stack
    assert runs.check()


def test_after_an_interrupt_at_any_point(runs: Runs) -> None:
    runs.check()

    def begin() -> Callable[[], object]:
        return runs.fixed.run

    for where in everywhere(begin):
        assert runs.plan.store.lock.acquire(blocking=False), where
        runs.plan.store.lock.release()
        for _ in range(3):
            runs.check(where)
