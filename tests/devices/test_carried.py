"""Copies of small tensors between the host and a device as part of the device's runs."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.null import NullDevice
from pyggml.runtime.execution import Execution
from tests.devices.stacks import FEED, WIDTH, same, stack
from tests.devices.test_overlap import PINS, X, layers

EXPERTS = {"_exps|opened|hidden": "numpy"}


@pytest.fixture
def device() -> Iterator[NullDevice]:
    """A device that carries all tensors of these plans."""
    device = backends.get("null", 0)
    assert isinstance(device, NullDevice)
    device.carries = 1 << 20
    yield device
    device.carries, device.queue.pace = 0, None


def compiled(outputs: dict[str, gg.Node], pins: dict[str, str]) -> gg.Plan:
    return gg.compile(outputs, backends=["null:0", "numpy"], pins=pins)


def refuse(*_: object) -> Any:
    raise AssertionError("a copy was queued by itself")


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_values(device: NullDevice, monkeypatch: pytest.MonkeyPatch, seed: int | None) -> None:
    plan = compiled({"y": layers(6)}, PINS).bind()
    monkeypatch.setattr(device, "send", refuse)
    monkeypatch.setattr(device, "fetch", refuse)
    monkeypatch.setattr(Execution, "_copy", refuse)  # the run is a list of calls
    device.queue.pace = None if seed is None else Random(seed)
    queued = []
    for turn in range(3):
        want = gg.compile({"y": layers(6)}).run(x=X + turn)["y"]
        assert np.array_equal(plan.run(x=X + turn)["y"], want)
        queued.append((plan.submit(x=X + turn), want))
    assert all(np.array_equal(run.result()["y"], want) for run, want in queued)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_layers_with_experts_and_states(device: NullDevice, seed: int | None) -> None:
    device.queue.pace = None if seed is None else Random(seed)
    plan = compiled({"y": stack(3, n_experts=4)}, EXPERTS)
    want = gg.compile({"y": stack(3, n_experts=4)})
    for n in (1, 3):
        same(plan.repeat(n, FEED), want.repeat(n, FEED))
    same(plan.run(FEED), want.run(FEED))


def test_large_tensors_have_copies_of_their_own(
    device: NullDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.carries = X.nbytes - 1
    plan = compiled({"y": layers(1)}, PINS).bind()
    want = gg.compile({"y": layers(1)}).run(x=X)["y"]
    assert np.array_equal(plan.run(x=X)["y"], want)
    monkeypatch.setattr(device, "send", refuse)
    with pytest.raises(AssertionError, match="by itself"):
        plan.run(x=X)


def test_a_profile_times_the_copies_alone(device: NullDevice) -> None:
    plan = compiled({"y": layers(2)}, PINS)
    rows = plan.profile({"x": X}, 1).rows
    assert len(rows) == len(plan.steps)
    assert sum(row.op == "transfer" for row in rows) == 4


def test_an_error_on_the_host_leaves_the_next_run_alone(device: NullDevice) -> None:
    """What the device sent for the run that failed never arrives."""
    x, ids = gg.input("x", "f32", ne=(WIDTH, 3)), gg.input("ids", "i32", ne=(2,))
    rows = gg.label(gg.get_rows(gg.tanh(x), ids), "host rows")
    y = gg.silu(gg.add(rows, gg.get_rows(gg.sqr(x), ids)))
    plan, want = compiled({"y": y}, PINS), gg.compile({"y": y})
    with pytest.raises(gg.IdError):
        plan.run(x=X, ids=np.array([0, 3], np.int32))
    feed = {"x": X + 1, "ids": np.array([2, 1], np.int32)}
    same(plan.run(feed), want.run(feed))
