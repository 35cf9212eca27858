"""Arrays of callers that fail or move, and copies of failed runs, on fake GPUs."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda.device import pinned
from tests.cuda.allocations import ALLOCATIONS, fail_allocation
from tests.cuda.conftest import Machine
from tests.cuda.foreign import Capsule, CuPy, Interface

X = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture(autouse=True)
def _two_gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("gpus")
    monkeypatch.setitem(sys.modules, "cupy", CuPy())  # type: ignore[arg-type]


def slot() -> gg.Node:
    return gg.input("x", ne=(6, 4))


def copies(plan: gg.Plan) -> list[gg.Node]:
    return [node for node in plan.graph.nodes if node.op.name == "transfer"]


def test_a_state_is_zero_before_another_gpu_reads_it() -> None:
    there = gg.label(gg.cont(gg.transpose(gg.state("s", ne=(6, 4)))), "there")
    pins = {"^s$": "cuda:0", "there": "cuda:1"}
    plan = gg.compile({"y": there}, backends=["cuda:0", "cuda:1"], pins=pins).bind()
    assert plan._execution is not None
    plan._execution.run()
    (copy,) = copies(plan)
    assert not backends.get("cuda", 1).download(plan.addresses[copy], copy.spec).any()


def test_a_failed_bind_binds_nothing() -> None:
    y = gg.relu(gg.input("z", ne=(6, 4)))
    plan = gg.compile({"x": slot(), "y": y}, backends=["cuda"])
    with fail_allocation(1), pytest.raises(gg.OutOfMemoryError):
        plan.bind(x=Interface(X))
    np.testing.assert_array_equal(plan.run(x=X, z=X)["x"], X)


class Closing(Capsule):
    """An array that cannot be exported once `closed` is set."""

    closed = False

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        if self.closed:
            raise BufferError("it requires grad")
        return super().__dlpack__(stream=stream)


def test_an_array_that_can_no_longer_be_exported_is_named() -> None:
    array = Closing(X)
    plan = gg.compile({"x": slot()}, backends=["cuda"]).bind(x=array)
    array.closed = True
    with pytest.raises(gg.DTypeError, match=r"input .x.: its library .* requires grad"):
        plan.run()


def test_an_array_whose_memory_moved_is_refused() -> None:
    array = Capsule(X)
    plan = gg.compile({"x": slot()}, backends=["cuda"]).bind(x=array)
    plan.run()
    array.values = Capsule(X + 1).values
    with pytest.raises(gg.GraphError, match=r"input .x.: .* has moved .* bind it again"):
        plan.run()
    np.testing.assert_array_equal(plan.bind(x=array).run()["x"], X + 1)


def test_arrays_are_exported_in_the_context_of_the_gpu() -> None:
    import pycuda.driver

    depths = []

    class Watched(Capsule):
        def __dlpack__(self, *, stream: int | None = None) -> Any:
            depths.append(len(pycuda.driver.Context.stack))
            return super().__dlpack__(stream=stream)

    gg.compile({"x": slot()}, backends=["cuda"]).bind(x=Watched(X)).run()
    assert len(depths) > 1 and all(depths)


def test_copies_of_a_failed_run_do_not_arrive_later() -> None:
    """The exception keeps the frames of the run alive while other copies reuse the ring."""
    s, r = gg.state("s", ne=(6, 4)), gg.state("r", ne=(6, 4))
    pins = {"^[sr]$": "cuda", "there": "numpy"}
    y = gg.label(gg.add(s, r), "there")
    plan = gg.compile({"y": y}, backends=["cuda", "numpy"], pins=pins).bind()
    plan.store.write("s", X)
    plan.store.write("r", X)
    device: Any = backends.get("cuda")
    real, calls = device.send, 0

    def send(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(*args)

    device.send = send
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            plan.run()
    finally:
        del device.send
    for copy in copies(plan):
        plan.addresses[copy].buffer[:] = 0
    other = device.alloc(256)
    with device.context:
        for _ in range(pinned.RING // pinned.GRAIN + 2):
            device.staging.upload(other.ptr, np.zeros(256, np.uint8))
    assert caught.value is not None
    assert not any(plan.addresses[copy].buffer.any() for copy in copies(plan))


def test_checking_ids_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYGGML_CUDA_DEBUG", "1")
    table = gg.constant(np.ones((8, 64), np.float32), name="table")
    y = gg.get_rows(table, gg.input("ids", "i32", ne=(4,)))
    plan = gg.compile({"y": y}, backends=["cuda"]).bind()
    before = ALLOCATIONS.count
    plan.run(ids=np.arange(4))
    assert ALLOCATIONS.count == before
