"""Collectives that devices take together: the graphs, the order of steps, and the results."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import pyggml as gg
from pyggml import backends
from pyggml.backends.null.meeting import MEETINGS
from pyggml.joint import by_turn, joint, joint_gather, joint_reduce
from pyggml.node import Node
from pyggml.passes.order import order
from pyggml.passes.stages import Shard
from pyggml.passes.work import Work
from pyggml.runtime.predict import Rates
from tests.shard.graphs import Layers, cuts, layers
from tests.shard.test_sharded import close, run
from tests.spmd.test_exchange import contents, plans, same
from tests.spmd.threads import every

EXAMPLES = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    phases=[Phase.generate],
)
DEVICES = [backends.get("null", i) for i in (*range(8), 7)]


@pytest.fixture(autouse=True)
def joining(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PYGGML_VERIFY", "1")
    MEETINGS.forget()
    for device in DEVICES:
        monkeypatch.setattr(device, "joining", True)
    yield
    MEETINGS.forget()


def in_one_order(plan: gg.Plan) -> None:
    """Every device comes to its joint steps in the order of turns, and so do those that it meets:
    no device waits for another one that waits for it."""
    seen: dict[str, list[int]] = {}
    for split in plan.splits:
        for step in split.steps:
            if step.node.op.joint:
                seen.setdefault(split.backend.device, []).append(step.node.attrs["turn"])
    for turns in seen.values():
        assert turns == sorted(set(turns))
    for turn, nodes in by_turn(plan.graph.nodes).items():
        places = nodes[0].attrs["places"]
        assert sorted(plan.place_of(node) for node in nodes) == sorted(places)
        assert all(turn in seen[place] for place in places)


def test_a_gather_of_one_row_keeps_its_rank() -> None:
    """Its parts are put one after another in memory, as an array of rank 1."""
    w = gg.constant(np.ones((320, 64), np.float32))
    graph = {"y": gg.mul_mat(w, gg.input("x", ne=(64, 1)))}
    plan = gg.compile(graph, backends=[f"null:{i}" for i in range(4)], shard={"rows": 4})
    in_one_order(plan)
    assert any(node.op is joint_gather for node in plan.graph.nodes)
    assert plan.run({"x": np.ones((1, 64), np.float32)})["y"].shape == (1, 320)


@EXAMPLES
@given(layers(), cuts(), st.integers(0, 2**32), st.booleans(), st.booleans())
def test_random_layers(
    graph: Layers, cut: tuple[dict[str, Any], int], seed: int, pinned: bool, budget: bool
) -> None:
    """The whole graph's results, in one process and, with the same bits, in several."""
    one, again, parts = plans(graph, cut, "null", pinned, budget)
    in_one_order(one)
    whole = gg.compile(graph.outputs, updates=graph.updates)
    for i, device in enumerate(DEVICES):
        device.queue.pace = random.Random(seed + i) if seed % 2 else None
    try:
        for part, other in zip(run(again, graph.used), run(whole, graph.used)):
            close(part, other)
        wanted = contents(one, graph.used)
        for device in DEVICES:  # in threads, a queue that runs ahead would wait where a GPU goes on
            device.queue.pace = None
        MEETINGS.forget()
        for found in every([lambda part=part: contents(part, graph.used) for part in parts]):
            same(found, wanted)
    finally:
        for device in DEVICES:
            device.queue.pace = None


def test_devices_that_name_their_steps_in_other_orders() -> None:
    """null:1 reads the second sum first; it comes to both in the order of null:0."""
    homes: dict[Node, Any] = {}
    results = []
    for index, device in enumerate(DEVICES[:2]):
        sums = []
        for turn in range(2):
            part = gg.relu(gg.input(f"{turn}.{index}", ne=(4,)))
            attrs = {"places": ("null:0", "null:1"), "index": index, "turn": turn}
            sums.append(joint(joint_reduce, part, **attrs))
            homes |= dict.fromkeys((part, part["a"], sums[-1]), device)
        results.append(gg.sub(*(sums if index == 0 else sums[::-1])))
        homes[results[-1]] = device
    graph = gg.Graph({"y0": results[0], "y1": results[1]})
    shard = Shard({"rows": 2}, (1.0, 1.0), (1.0,), tuple(DEVICES[:2]))
    work = order(Work(graph, tuple(DEVICES[:2]), shard=shard, homes=homes))
    for device in DEVICES[:2]:
        mine = [n for n in work.order if n.op.joint and work.home(n) is device]
        assert [node.attrs["turn"] for node in mine] == [0, 1]


def test_a_device_that_comes_in_another_order_is_found() -> None:
    """The stand-in for a library does not forgive what NCCL would wait for."""
    x = gg.input("x", ne=(64, 3))
    y = gg.mul_mat(gg.constant(np.ones((64, 64), "f4"), name="a"), x)
    y = gg.mul_mat(gg.constant(np.ones((64, 64), "f4"), name="b"), y)
    plan = gg.compile({"y": y}, backends=["null:0", "null:1"], shard={"rows": 2}).bind()
    first, _ = plan.runners
    first.run()
    with pytest.raises(gg.DeviceError, match="does not come to joint step"):
        MEETINGS.patience, before = 0.1, MEETINGS.patience
        try:
            DEVICES[0].synchronize()
        finally:
            MEETINGS.patience = before


@pytest.mark.parametrize("denied", ["relu", "add"])
def test_an_op_of_the_host_between(denied: str) -> None:
    """The host reads a sum when all devices have come to it."""
    rng = np.random.default_rng(0)
    y = gg.input("x", ne=(64, 3))
    for layer in range(3):
        w = [gg.constant(rng.random((64, 64), "f4") / 8, name=f"{layer}.{i}") for i in range(2)]
        y = gg.add(y, gg.relu(gg.mul_mat(w[1], gg.silu(gg.mul_mat(w[0], y)))))
    graph, inputs = {"y": y}, {"x": rng.standard_normal((3, 64), np.float32)}
    with DEVICES[0].denying(denied), DEVICES[1].denying(denied):
        places = ["null:0", "null:1", "numpy"]
        plan = gg.compile(graph, backends=places, shard={"rows": 2})
    assert any(step.node.op.joint for split in plan.splits for step in split.steps)
    assert any(split.backend.device == "host" and split.steps for split in plan.splits)
    wanted = gg.compile(graph).run(inputs)["y"]
    for _ in range(2):
        np.testing.assert_allclose(plan.run(inputs)["y"], wanted, rtol=1e-4)


def test_what_a_joint_step_needs_is_freed() -> None:
    """The stand-in keeps no parts of steps that all devices have taken."""
    x = gg.input("x", ne=(64, 3))
    y = gg.mul_mat(gg.constant(np.ones((64, 64), "f4"), name="a"), x)
    y = gg.mul_mat(gg.constant(np.ones((64, 64), "f4"), name="b"), y)
    plan = gg.compile({"y": y}, backends=["null:0", "null:1"], shard={"rows": 2})
    for _ in range(3):
        plan.run({"x": np.ones((3, 64), "f4")})
    assert not MEETINGS._open


def test_predictions_wait_for_all_devices() -> None:
    """A device that has more to do before a joint step is one that all wait for."""
    x = gg.input("x", ne=(4096, 512))
    w = [gg.constant(np.zeros((4096, 4096), "f4"), name=name) for name in "ab"]
    y = gg.mul_mat(w[1], gg.relu(gg.mul_mat(w[0], x)))
    plan = gg.compile({"y": y}, backends=["null:0", "null:1"], shard={"rows": (3, 1)})
    found = plan.predict()
    joint_seconds = found.between
    nbytes = 4096 * 512 * 4
    rates = Rates()
    assert joint_seconds == pytest.approx(rates.latency + nbytes / rates.link)
    assert found.total == pytest.approx(max(found.busy.values()) + joint_seconds)
    assert min(found.busy.values()) < 0.5 * max(found.busy.values())
