"""Ctrl-C at every point of copies through pinned memory: no part of the ring and no cell is reused
while a copy reads it, and no copy writes to a wrong place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda.device import pinned, prepared
from tests.cuda.conftest import Machine
from tests.interrupts import everywhere

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

X = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU whose ring has only four parts, and few cells, so that they are soon reused."""
    machine("gpu")
    monkeypatch.setattr(pinned, "RING", 4096)
    monkeypatch.setattr(pinned, "PART", 1024)
    monkeypatch.setattr(pinned, "GRAIN", 256)
    monkeypatch.setattr(pinned, "CELLS", 3)
    return backends.get("cuda")


def test_parts_of_the_ring_in_use_are_not_reused(gpu: Any) -> None:
    sizes = (900, 3000, 100)
    buffers = [gpu.alloc(size) for size in sizes]
    staging = gpu.staging
    turns = iter(range(1, 10**6))
    arrays: list[np.ndarray] = []

    def begin() -> Callable[[], object]:
        gpu.synchronize()
        arrays[:] = [np.full(size, next(turns) % 251, np.uint8) for size in sizes]

        def copies() -> None:
            with gpu.context:
                for buffer, values in zip(buffers, arrays):
                    staging.upload(buffer.ptr, values)
                for buffer, values in zip(buffers, arrays):
                    result = np.zeros_like(values)
                    staging.download(result, buffer.ptr)
                    np.testing.assert_array_equal(result, values)

        return copies

    for where in everywhere(begin, 3):
        with gpu.context:  # later copies, without a wait, go once round the ring
            after = [np.full(size, next(turns) % 251, np.uint8) for size in sizes]
            for buffer, values in zip(buffers, after):
                staging.upload(buffer.ptr, values)
            for buffer, values in zip(buffers, after):
                result = np.zeros_like(values)
                staging.download(result, buffer.ptr)
                np.testing.assert_array_equal(result, values, err_msg=where)


def test_a_state_on_a_gpu_is_the_old_one_or_the_new_one(gpu: Any) -> None:
    s = gg.state("s", ne=(6, 4))
    store = gg.compile({"s": s}, backends=["cuda"]).bind().store

    def begin() -> Callable[[], object]:
        store.write("s", X)
        return lambda: (store.read("s"), store.write("s", -X))

    for where in everywhere(begin):
        state = store.read("s")
        assert (state == X).all() or (state == -X).all(), where


def test_a_plan_on_a_gpu_is_bound_or_not(gpu: Any) -> None:
    w = gg.constant(X, name="w")
    plans: list[gg.Plan] = []

    def begin() -> Callable[[], object]:
        plans[:] = [
            gg.compile({"w": gg.scale(w, s=1.0), "x": gg.input("x", ne=(6, 4))}, backends=["cuda"])
        ]
        return plans[0].bind

    for where in everywhere(begin, 5):
        np.testing.assert_array_equal(plans[0].run(x=X)["x"], X, err_msg=where)


def test_small_uploads_that_nobody_waits_for(gpu: Any) -> None:
    """Runs that are queued, some of them after an interrupt, each with the array it was given."""
    plan = gg.compile({"x": gg.input("x", ne=(6, 4))}, backends=["cuda"]).bind()
    turns, queued = iter(range(10**6)), list[tuple[float, Any]]()

    def submit() -> None:
        value = float(next(turns))
        queued.append((value, plan.submit(x=np.full((4, 6), value, np.float32))))

    def begin() -> Callable[[], object]:
        queued.clear()
        submit()
        return submit

    for where in everywhere(begin, 3):
        for _ in range(2 * pinned.CELLS):
            submit()
        for value, run in queued:
            np.testing.assert_array_equal(run.result()["x"], np.full((4, 6), value), err_msg=where)


@pytest.mark.parametrize("least", [1, 1 << 20], ids=["stays pinned", "is copied"])
def test_a_run_returns_what_it_was_given(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, least: int
) -> None:
    """Also after a run that was interrupted, and earlier results are as they were."""
    monkeypatch.setattr(prepared, "LEAST", least)
    x = gg.input("x", ne=(6, 4))
    plan = gg.compile({"x": x, "y": gg.relu(x)}, backends=["cuda"])
    before = plan.run(x=X)["x"]

    def begin() -> Callable[[], object]:
        return lambda: plan.run(x=-X)

    for where in everywhere(begin):
        for value in range(pinned.CELLS + 1):
            array = np.full((4, 6), value, np.float32)
            np.testing.assert_array_equal(plan.run(x=array)["x"], array, err_msg=where)
        np.testing.assert_array_equal(before, X, err_msg=where)
