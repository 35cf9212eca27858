"""Small tensors that cross between the host and a GPU in its graphs."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda.argument import pack
from pyggml.backends.cuda.device.parts import Parts
from pyggml.backends.cuda.launch import Launch
from pyggml.backends.cuda.relay import FILE, MOST, Crossings, KernelCrossing
from pyggml.errors import DeviceError
from pyggml.transfer import origin
from tests.cuda.conftest import Machine
from tests.cuda.emulated import Memory, starter
from tests.interrupts import everywhere

X = np.arange(12, dtype=np.float32).reshape(3, 4)
IDS = np.array([2, 0], np.int32)


def test_the_kernel(tmp_path: Path) -> None:
    """Whole vectors, remainders, fewer bytes than a vector; nothing beyond them is written."""
    sizes = (8192, 24, 4, 50, 16)
    pairs = [(Memory(n), Memory(n + 16)) for n in sizes]
    for k, (source, target) in enumerate(pairs):
        source.data[:] = np.arange(len(source.data)) * (k + 3) % 251
        target.data[:] = 7
    list_ = [
        KernelCrossing(to=target.ptr, source=source.ptr, nbytes=len(source.data))
        for source, target in pairs
    ]
    spare = [list_[0]] * (MOST - len(list_))
    args = pack([Crossings(list=(*list_, *spare))])
    launch = Launch(FILE, "relay", (len(sizes), 1, 1), (256, 1, 1), args)
    starter(tmp_path, [launch])(launch)
    for source, target in pairs:
        assert np.array_equal(target.data[:-16], source.data)
        assert (target.data[-16:] == 7).all()


@pytest.fixture
def gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A GPU whose kernels do nothing except this one; its graphs can be replayed."""
    machine("gpu")
    device: Any = backends.get("cuda")
    device.synchronize()  # imports the driver
    bindings: Any = __import__("cuda.bindings.driver").bindings.driver

    def end() -> Any:
        nodes = bindings.CAPTURES.pop()

        def launch(_: object) -> None:
            for node in filter(callable, nodes):
                device.context.stream.queue.add(node)

        return SimpleNamespace(upload=lambda stream: None, launch=launch)

    stream = SimpleNamespace(begin_capture=lambda: bindings.CAPTURES.append([]), end_capture=end)
    cupy = SimpleNamespace(cuda=SimpleNamespace(ExternalStream=lambda *_: stream))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return device


def graph() -> gg.Plan:
    """The host reads what is on the GPU, which reads the result."""
    x, ids = gg.input("x", "f32", ne=(4, 3)), gg.input("ids", "i32", ne=(2,))
    rows = gg.label(gg.get_rows(gg.label(gg.tanh(x), "gpu-0"), ids), "host")
    y = gg.label(gg.silu(rows), "gpu-1")
    pins = {"^host": "numpy", "^gpu": "cuda:0"}
    return gg.compile({"y": y}, backends=["cuda", "numpy"], pins=pins)


def crossing(plan: gg.Plan, to_host: bool) -> Any:
    """The GPU's memory of what crosses between the host and the GPU, as an array."""
    plan.bind()
    assert plan._execution is not None
    (node,) = {
        step.node
        for split in plan.splits
        for step in split.copies
        if (split.backend.device == "host") == to_host
    }
    at = plan._execution.at[origin(node) if to_host else node]
    memory = (ctypes.c_float * node.spec.elements).from_address(at.buffer.ptr + at.offset)
    return np.frombuffer(memory, np.float32).reshape(node.spec.shape)


def run(plan: gg.Plan, turn: int) -> None:
    """Run it as if the GPU had computed X + turn."""
    crossing(plan, True)[...] = X + turn
    plan.run({"x": X, "ids": IDS}, [])
    assert np.array_equal(crossing(plan, False), (X + turn)[IDS])


def test_runs_carry_them(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run starts each kernel, later ones are graphs; no tensor has a copy of its own."""
    plan = graph().bind()

    def refuse(*_: object) -> Any:
        raise AssertionError("a copy was queued by itself")

    monkeypatch.setattr(type(gpu), "send", refuse)
    monkeypatch.setattr(type(gpu), "fetch", refuse)
    for turn in range(4):
        run(plan, turn)


def test_the_memory_is_free_again_with_the_plan(gpu: Any) -> None:
    plan = graph()
    run(plan, 0)
    free = gpu.staging.mail.free
    assert free.count(0) == 2  # a grain for each tensor
    plan.release()
    del plan
    assert free.count(0) == 0


def test_without_room_each_tensor_has_a_copy(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parts, "part", lambda *_: None)
    plan = graph()
    for turn in range(3):
        run(plan, turn)


def test_what_is_read_late_is_not_overwritten(gpu: Any) -> None:
    """The host waits for nothing else before it sends the next run's rows."""
    x = gg.input("x", "f32", ne=(4, 3))
    y = gg.label(gg.silu(gg.label(gg.sqr(x), "host")), "gpu")
    pins = {"host": "numpy", "gpu": "cuda:0"}
    plan = gg.compile({"y": y}, backends=["cuda", "numpy"], pins=pins)
    plan.run({"x": X}, [])
    here = crossing(plan, False)
    read: list[np.ndarray] = []
    for turn in (1, 2):
        plan.submit({"x": X + turn}, [])
        gpu.context.stream.queue.add(lambda: read.append(here.copy()))
    gpu.synchronize()
    assert [array.tolist() for array in read] == [((X + turn) ** 2).tolist() for turn in (1, 2)]


def test_a_process_that_fails_ends_the_wait(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another plan's work, which waits for other processes, may be in the queue."""
    plan = graph()
    run(plan, 0)

    def look() -> None:
        raise DeviceError("rank 1: out of memory")

    monkeypatch.setattr(gpu.context.driver.Event, "query", lambda _: False)
    monkeypatch.setattr(gpu.context, "peers", SimpleNamespace(look=look))
    with pytest.raises(DeviceError, match="rank 1: out of memory"):
        plan.run({"x": X, "ids": IDS}, [])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_leaves_the_next_run_alone(gpu: Any) -> None:
    plan, turns = graph(), iter(range(10**6))
    run(plan, next(turns))
    run(plan, next(turns))

    def begin() -> Any:
        crossing(plan, True)[...] = X + next(turns)
        return lambda: plan.run({"x": X, "ids": IDS}, [])

    for _ in everywhere(begin, 3):
        run(plan, next(turns))
