"""While the host works on a result, the device that sent it goes on."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from tests.devices.stacks import WIDTH, ops, places, weight

PINS = {"^host": "numpy"}
X = np.random.default_rng(0).standard_normal((3, WIDTH)).astype("f4")


def layers(n: int) -> gg.Node:
    """Routed experts on the host (`host-i`) beside shared ones on the device, both of one norm.

    The shared part is built first, so only the planner can put it after what the host needs.
    """
    h = gg.input("x", "f32", ne=(WIDTH, 3))
    for i in range(n):
        w = [weight(f"{name}-{i}", WIDTH, WIDTH) for name in ("norm", "shared", "gate")]
        norm = gg.mul_mat(w[0], gg.rms_norm(h, eps=1e-5))
        shared = gg.mul_mat(w[1], gg.tanh(norm))
        routed = gg.label(gg.silu(gg.mul_mat(w[2], norm)), f"host-{i}")
        h = gg.add(gg.add(shared, norm), routed)
    return gg.mul_mat(weight("output", WIDTH, WIDTH), h)


def compiled(n: int) -> gg.Plan:
    return gg.compile({"y": layers(n)}, backends=["null:0", "numpy"], pins=PINS)


def test_a_result_leaves_for_the_host_before_what_the_host_does_not_need() -> None:
    plan = compiled(2)
    device, host = "null:0", "numpy"
    assert places(plan) == [device, device, host, device, device, host, device]
    send = plan.splits[1]
    assert send.backend.place == host and len(send.copies) == 1 and not send.steps
    assert ops(plan.splits[0]) == ["rms_norm", "mul_mat", "mul_mat"]
    assert ops(plan.splits[2]) == ["tanh", "mul_mat", "add"]


def test_the_device_has_work_while_the_host_computes() -> None:
    """The work is in its queue, and the host has not waited for it."""
    plan, queue = compiled(1).bind(), backends.get("null", 0).queue
    runner = plan.runners[3]
    assert plan.splits[3].backend.place == "numpy"
    waiting: list[int] = []
    run = runner.run
    runner.run = lambda: (waiting.append(len(queue)), run())  # type: ignore[method-assign]
    plan.run(x=X)
    assert waiting == [3], "the steps of split 2"


@pytest.mark.parametrize("seed", [None, 0, 1, 2, 3])
def test_values(seed: int | None) -> None:
    queue = backends.get("null", 0).queue
    queue.pace = None if seed is None else Random(seed)
    try:
        plan = compiled(6)
        for turn in range(3):
            x = X + turn
            want = gg.compile({"y": layers(6)}).run(x=x)["y"]
            assert np.array_equal(plan.run(x=x)["y"], want)
    finally:
        queue.pace = None


def test_results_that_a_stage_of_the_host_reads_leave_together() -> None:
    x = gg.input("x", "f32", ne=(WIDTH, 3))
    w = [weight(name, WIDTH, WIDTH) for name in ("first", "second", "other", "output")]
    first, second, other = (gg.mul_mat(each, x) for each in w[:3])
    early = gg.label(gg.silu(first), "host early")  # `late` needs a second result
    late = gg.label(gg.mul(early, second), "host late")
    y = gg.mul_mat(w[3], gg.add(other, late))
    plan = gg.compile({"y": y}, backends=["null:0", "numpy"], pins=PINS)
    assert [len(split.copies) for split in plan.splits if split.backend.place == "numpy"] == [2, 0]
    assert np.array_equal(plan.run(x=X)["y"], gg.compile({"y": y}).run(x=X)["y"])


def test_what_follows_from_weights_alone_comes_when_it_is_read() -> None:
    """A device that waits for the host does not compute it for all layers, and hold it all."""

    def turned(n: int) -> gg.Node:
        h = gg.input("x", "f32", ne=(WIDTH, 3))
        for i in range(n):
            w = weight(f"w-{i}", WIDTH, WIDTH)  # read twice, so the transpose is no weight
            h = gg.mul_mat(gg.cont(gg.transpose(w)), gg.mul_mat(w, h))
            h = gg.label(gg.silu(h), f"host-{i}")
        return h

    def plan(n: int) -> gg.Plan:
        return gg.compile({"y": turned(n)}, backends=["null:0", "numpy"], pins=PINS)

    plans = {n: plan(n) for n in (2, 8)}
    steps = [name for split in plans[8].splits for name in ops(split) if name in ("cont", "silu")]
    assert steps == ["cont", "silu"] * 8
    compute = {n: each.memory.devices[0].compute for n, each in plans.items()}
    assert compute[2] == compute[8] > 0
    whole = gg.compile({"y": turned(8)}, backends=["numpy"]).run(x=X)["y"]
    np.testing.assert_allclose(plans[8].run(x=X)["y"], whole, rtol=1e-4)
