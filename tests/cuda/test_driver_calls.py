"""The driver calls of a run: one copy in, one copy out, one launch, one wait."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda.device import pinned, prepared
from pyggml.generate.session import Session
from pyggml.models.model import load
from pyggml.models.presets import TINY
from pyggml.models.synth import synth
from tests.cuda.conftest import Machine

X = np.arange(12, dtype=np.float32).reshape(2, 6)
#: The least that a run with inputs and outputs can do.
ONCE = {"copy in": 1, "launch": 1, "copy out": 1, "wait": 1}


class Calls:
    """Counts the calls that a run makes; those for events and contexts do not reach the GPU."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        driver: Any = sys.modules["pycuda.driver"]
        bindings: Any = sys.modules["cuda.bindings.driver"]
        self.order: list[str] = []
        self._capturing = False
        for owner, name, what in (
            (driver, "memcpy_htod_async", "copy in"),
            (driver, "memcpy_dtoh_async", "copy out"),
            (driver, "memcpy_dtod_async", "copy"),
            (driver.Stream, "synchronize", "wait"),
            (driver.Event, "synchronize", "wait"),
            (bindings, "cuLaunchKernelEx", "kernel"),
        ):
            patch.setattr(owner, name, self._counted(getattr(owner, name), what))
        stream = SimpleNamespace(begin_capture=self._begin, end_capture=self._end)
        cupy = SimpleNamespace(cuda=SimpleNamespace(ExternalStream=lambda *_: stream))
        patch.setitem(sys.modules, "cupy", cupy)

    def _counted(self, call: Callable[..., Any], what: str) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            if not self._capturing:
                self.order.append(what)
            return call(*arguments)

        return counted

    def _begin(self) -> None:
        self._capturing = True

    def _end(self) -> Any:
        self._capturing = False

        def launch(stream: object) -> None:
            self.order.append("launch")

        return SimpleNamespace(upload=lambda stream: None, launch=launch)

    def of(self, action: Callable[[], object]) -> dict[str, int]:
        self.order.clear()
        action()
        return dict(Counter(self.order))


@pytest.fixture
def calls(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Calls:
    machine("gpu")
    backends.get("cuda").synchronize()  # imports the driver
    __import__("cuda.bindings.driver")
    return Calls(monkeypatch)


@pytest.fixture
def session(calls: Calls, tmp_path: Path) -> Session:
    path = tmp_path / "tiny.gguf"
    synth(path, TINY, dtype="q8_0", seed=1)
    return load(path, backends=["cuda"]).session(2048, 4)


def test_a_decode_step(calls: Calls, session: Session) -> None:
    session.forward([1])
    session.forward([2])  # captures
    for _ in range(2 * pinned.RING // pinned.GRAIN):  # the ring of pinned memory goes round
        assert calls.of(lambda: session.forward([3])) == ONCE
        session.truncate(2)


def test_a_run_enters_its_context_once_and_neither_copies_nor_records_an_event(
    calls: Calls, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver: Any = sys.modules["pycuda.driver"]
    for owner, name in ((driver.Context, "push"), (driver.Event, "record")):
        monkeypatch.setattr(owner, name, calls._counted(getattr(owner, name), name))
    monkeypatch.setattr(prepared, "LEAST", 1)  # the logits stay in pinned memory
    for token in (1, 2):
        session.forward([token])
    for _ in range(3):
        assert calls.of(lambda: session.forward([3])) == {"push": 1, "launch": 1, "wait": 1}


def test_tokens_that_the_device_chooses(calls: Calls, session: Session) -> None:
    """The states hold the token, so nothing is copied in, and each wait is for an older step."""
    steps = session.generate([1], 50)
    for _ in range(5):
        next(steps)
    for _ in range(40):
        assert calls.of(lambda: next(steps)) == {"launch": 1, "copy out": 1, "wait": 1}
    assert len(list(steps)) == 5


def test_parts_of_a_prompt(calls: Calls, session: Session) -> None:
    session.forward([1] * 12)
    session.truncate(0)
    session.forward([1] * 12)
    session.truncate(0)
    assert calls.of(lambda: session.forward([1] * 12))["launch"] == 3
    first_wait = calls.order.index("wait")
    assert Counter(calls.order[:first_wait]) == {"copy in": 4, "launch": 3, "copy out": 1}


def two_inputs() -> gg.Plan:
    x, y = gg.input("x", ne=(6, 2)), gg.input("y", "i32", ne=(1,))
    rows = gg.get_rows(gg.scale(x, s=2.0), y)
    return gg.compile({"rows": rows, "x": x, "y": y}, backends=["cuda"])


def test_outputs_that_nobody_asks_for_are_not_copied(calls: Calls) -> None:
    plan, one = two_inputs(), np.array([1], np.int32)
    for _ in range(2):
        plan.run(x=X, y=one)
    assert calls.of(lambda: plan.run(x=X, y=one)) == {**ONCE, "copy out": 3}
    assert calls.of(lambda: plan.run({"x": X, "y": one}, ["rows"])) == ONCE
    without = {"copy in": 1, "launch": 1, "wait": 1}
    assert calls.of(lambda: plan.run({"x": X, "y": one}, [])) == without
    assert calls.of(lambda: plan.views(x=X, y=one)) == without


def test_inputs_side_by_side_arrive_where_they_belong(calls: Calls) -> None:
    """Kernels do nothing here, but inputs that are outputs come back."""
    plan = two_inputs()
    for i in range(5):
        result = plan.run({"y": [i], "x": X + i}, ["x", "y"])
        assert (result["x"] == X + i).all() and result["y"] == [i]


def test_each_run_that_was_submitted_returns_its_own_outputs(calls: Calls) -> None:
    """More of them than the ring has parts, and inputs that change at once."""
    plan = two_inputs().bind()
    x, runs = X.copy(), []
    n = pinned.RING // pinned.GRAIN
    for i in range(n):
        x[:] = X + i
        runs.append(plan.submit({"x": x, "y": [i]}, ["x", "y"]))
    order = np.random.default_rng(0).permutation(n)
    for i in order:
        result = runs[i].result()
        assert (result["x"] == X + i).all() and result["y"] == [i]


def test_a_run_that_fails_keeps_the_outputs_of_those_before_it(
    calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = two_inputs().bind()
    run = plan.submit({"x": X, "y": [7]}, ["x", "y"])
    (runner,) = plan.runners
    monkeypatch.setattr(type(runner), "run", lambda _: 1 / 0)
    with suppress(ZeroDivisionError):
        plan.run(x=-X, y=[8])
    assert (run.result()["x"] == X).all() and run.result()["y"] == [7]
