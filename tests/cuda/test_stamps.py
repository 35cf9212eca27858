"""Times of steps inside graphs, on a machine whose clock and kernels are imitated."""

from __future__ import annotations

import random
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda import stamps
from tests.cuda.conftest import Machine

#: Milliseconds of a stamp, and those that a kernel saves if it follows a kernel.
STAMP, OVERLAP = 1e-3, 0.7e-3
X = np.ones((2, 8), np.float32)


class Clock:
    """Replays captured graphs: the k-th kernel of a run takes `times[k]` milliseconds.

    noise  the most that an interval is longer, at random
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.bindings: Any = sys.modules["cuda.bindings.driver"]
        self.times: list[float] = []
        self.noise, self.now, self.kernel, self.graphs = 0.0, 5.0, 0, 0
        self.random = random.Random(1)
        stream = SimpleNamespace(begin_capture=self._begin, end_capture=self._end)
        cupy = SimpleNamespace(cuda=SimpleNamespace(ExternalStream=lambda *_: stream))
        patch.setitem(sys.modules, "cupy", cupy)

    def _begin(self) -> None:
        self.bindings.CAPTURES.append([])

    def _end(self) -> Any:
        nodes = self.bindings.CAPTURES.pop()
        self.graphs += 1
        return SimpleNamespace(
            upload=lambda stream: None, launch=lambda stream: self._replay(nodes)
        )

    def _replay(self, nodes: list[Any]) -> None:
        before = self
        for node in nodes:
            if node is None:
                saved = OVERLAP if before is None else 0.0
                self.now += self.times[self.kernel % len(self.times)] - saved
                self.now += self.noise * self.random.random()
                self.kernel += 1
            elif not callable(node):
                self.now += STAMP
                node.time = self.now
            before = node


@pytest.fixture
def clock(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Clock:
    machine("gpu")
    backends.get("cuda").synchronize()  # imports the driver
    __import__("cuda.bindings.driver")
    return Clock(monkeypatch)


def chain(count: int) -> gg.Plan:
    """A plan of `count` steps, each with one kernel."""
    y = gg.input("x", ne=(8, 2))
    for i in range(count):
        y = gg.label(gg.relu(y) if i % 2 else gg.sqr(y), f"kq-{i // 2}")
    plan = gg.compile({"y": y}, backends=["cuda"], fuse=False)
    assert len(plan.steps) == count
    return plan


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 15, 16, 17, 32, 33, 50])
def test_the_cost_of_stamps_cancels(clock: Clock, count: int) -> None:
    """Each step takes what it adds to a run, where it overlaps its predecessor."""
    clock.times = [1e-3 * (1 + (7 * k) % 5) for k in range(count)]
    plan = chain(count)
    plan.bind()
    profile = plan.profile({"x": X}, 2)
    want = [t - (OVERLAP if k else 0.0) for k, t in enumerate(clock.times)]
    assert [row.seconds * 1e3 for row in profile.rows] == pytest.approx(want, abs=1e-9)
    assert profile.whole[0] == pytest.approx(profile.seconds)


def test_noise_is_averaged(clock: Clock) -> None:
    clock.times, clock.noise = [3e-3] * 40, 0.2e-3
    profile = chain(40).profile({"x": X}, 30)
    assert all(abs(row.seconds - 2.3e-6) < 0.4e-6 for row in profile.rows[1:])
    assert profile.seconds == pytest.approx(sum(profile.whole), rel=0.02)


def test_a_profile_captures_few_graphs_and_every_run_is_complete(clock: Clock) -> None:
    clock.times = [1e-3] * 100
    plan = chain(100)
    plan.profile({"x": X}, 3)
    assert clock.graphs == 1 + stamps.PERIOD + 3
    before = clock.kernel
    assert before % 100 == 0
    plan.profile({"x": X}, 3)
    assert clock.kernel - before == 100 * (1 + 4 + 3 * (stamps.PERIOD + 3))


def test_events_are_destroyed_with_the_profile(clock: Clock) -> None:
    clock.times = [1e-3] * 20
    chain(20).profile({"x": X}, 1)
    assert clock.bindings.EVENTS == []


def test_rows_of_a_profile(clock: Clock) -> None:
    clock.times = [1e-3] * 4
    plan = chain(4)
    before = plan.kernels()
    rows = plan.profile({"x": X}, 1).rows
    assert before == [row.kernels for row in rows] == plan.kernels()
    assert [row.kernels.names for row in rows] == [
        (f"unary<{f}, float, 4, unsigned>",) for f in ("Sqr", "Relu")
    ] * 2
    assert [row.layer for row in rows] == [0, 0, 1, 1] and {row.place for row in rows} == {"cuda:0"}
    assert all(row.launches == 1 and row.kernels.why == "" for row in rows)


def test_splits_on_the_host_are_timed_between_those_of_the_gpu(clock: Clock) -> None:
    """Each split of the GPU has a graph of its own."""
    y = gg.input("x", ne=(8, 2))
    for i in range(6):
        y = gg.label(gg.relu(y) if i % 2 else gg.sqr(y), f"step-{i}")
    pins = {"step-3": "numpy", "step-[45]": "cuda:0"}
    plan = gg.compile({"y": y}, backends=["cuda", "numpy"], pins=pins, fuse=False)
    assert [split.backend.place for split in plan.splits] == ["cuda:0", "numpy", "cuda:0"]
    clock.times = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3]
    rows = plan.profile({"x": X}, 2).rows
    assert [(r.op, r.place, r.split) for r in rows] == [
        ("sqr", "cuda:0", 0), ("relu", "cuda:0", 0), ("sqr", "cuda:0", 0),
        ("transfer", "numpy", 1), ("relu", "numpy", 1),
        ("transfer", "cuda:0", 2), ("sqr", "cuda:0", 2), ("relu", "cuda:0", 2),
    ]  # fmt: skip
    times = [r.seconds * 1e3 for r in rows if r.place == "cuda:0" and r.op != "transfer"]
    assert times == pytest.approx([1e-3, 1.3e-3, 2.3e-3, 4e-3, 4.3e-3], abs=1e-9)
    assert all(r.seconds > 0 for r in rows)


def test_debugging_times_step_by_step(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYGGML_CUDA_DEBUG", "1")
    profile = chain(4).profile({"x": X}, 1)
    assert clock.graphs == 0 and all(row.seconds > 0 for row in profile.rows)
