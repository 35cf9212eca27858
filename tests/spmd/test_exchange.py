"""Several ranks compute, bit for bit, what one process with all devices does."""

from __future__ import annotations

import gc
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import pyggml as gg
from pyggml import backends
from pyggml.errors import DeviceError, GraphError
from pyggml.runtime import ceilings
from pyggml.runtime.leaves import Leaves, Need
from tests.shard.graphs import Layers, cuts, layers
from tests.spmd.threads import every, ranks_of, results

EXAMPLES = settings(
    max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def plans(
    graph: Layers, cut: tuple[dict[str, Any], int], place: str, pinned: bool, budget: bool
) -> tuple[gg.Plan, gg.Plan, list[gg.Plan]]:
    """Two plans of one process with all devices, each with a store of its own, and those of one
    process for each device. All have the same text.

    pinned  some nodes are on a device that only rank 0 has
    """
    chosen, n = cut
    places = [f"{place}:{i}" for i in range(n)]
    pins = {r"down|wo": "null:7"} if pinned else None

    def plan(store: gg.Store, amb: float | None = None) -> gg.Plan:
        return gg.compile(
            graph.outputs, updates=graph.updates, backends=places, shard=chosen, pins=pins,
            store=store, amb=amb,
        )  # fmt: skip

    try:
        one = plan(gg.Store())
        peak = one.memory.score_peak / 2**20
        amb = peak * 0.9 + 1e-3 if budget and peak else None
        one = plan(gg.Store(), amb)
    except GraphError as error:
        assume("shard=" not in str(error))
        raise
    except gg.BudgetError:
        assume(False)
    parts = [plan(gg.Store(ranks=ranks), amb) for ranks in ranks_of(n)]
    assert {str(part) for part in parts} == {str(one)}
    return one, plan(gg.Store(), amb), parts


@EXAMPLES
@given(
    layers(),
    cuts(),
    st.sampled_from(["null", "numpy"]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_random_layers(
    graph: Layers,
    cut: tuple[dict[str, Any], int],
    place: str,
    pinned: bool,
    budget: bool,
    seed: int,
) -> None:
    """Caches, experts, unequal shares, stages, budgets; pins to devices that only rank 0 has, and
    queues that run late or ahead."""
    n = cut[1]
    one, _, parts = plans(graph, cut, place, pinned, budget)
    assert one.memory == parts[0].memory
    for i in (*range(n), 7):
        backends.get("null", i).queue.pace = random.Random(seed + i) if seed % 2 else None
    try:
        wanted = contents(one, graph.used)
        for found in every([lambda part=part: contents(part, graph.used) for part in parts]):
            same(found, wanted)
        for rank, part in enumerate(parts):  # what is allocated is what was planned
            block = part.store.ranks.block
            assert len(block) == messages_of(one, backends.get(place, rank).place)
    finally:
        for i in (*range(n), 7):
            backends.get("null", i).queue.pace = None


def messages_of(plan: gg.Plan, place: str) -> int:
    """The planned bytes of host memory for the messages of a device; 0 if it has nothing to do."""
    rows = {row.device: row.messages for row in plan.memory.devices}
    return rows.get(place, 0)


def test_host_memory_of_messages() -> None:
    """A part of 64 x 3 numbers leaves null:1, and arrives at null:0."""
    plans, inputs = parts_of(2)
    assert [row.messages for row in plans[0].memory.devices] == [64 * 3 * 4] * 2
    text = str(plans[0].memory)
    assert "In a process of its own, messages of null:1 pass through another 0.0007 MiB" in text
    every([lambda plan=plan: plan.run(inputs) for plan in plans])
    ranks = [plan.store.ranks for plan in plans]
    assert [len(each.block) for each in ranks if each is not None] == [768] * 2
    blocks = [each.block for each in ranks if each is not None]
    every([lambda plan=plan: plan.release() for plan in plans])
    every([lambda plan=plan: plan.run(inputs) for plan in plans])
    assert all(each.block is block for each, block in zip(ranks, blocks) if each is not None)
    plans, _ = parts_of(2, "numpy")  # sent and received in place
    assert [row.messages for row in plans[0].memory.devices] == [0, 0]


def contents(plan: gg.Plan, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """The outputs of three runs, of which one is submitted, and all states after them."""
    runs = [plan.run(inputs), plan.submit(inputs).result(), plan.repeat(2, inputs)]
    names = dict.fromkeys(str(key).split("@")[0] for key in plan.store.homes)
    states = {name: plan.store.read(name, raw=True) for name in names}
    return {f"{k} of {i}": v for i, run in enumerate(runs) for k, v in run.items()} | states


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def feed_forward() -> tuple[dict[str, gg.Node], dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    x = gg.input("x", ne=(64, 3))
    up, gate = (
        gg.constant(rng.standard_normal((96, 64), np.float32), name=name) for name in ("up", "gate")
    )
    down = gg.constant(rng.standard_normal((64, 96), np.float32), name="down")
    y = gg.mul_mat(down, gg.fused_up_gate(up, gate, x))
    return {"y": y}, {"x": rng.standard_normal((3, 64), np.float32)}


def parts_of(n: int, place: str = "null") -> tuple[list[gg.Plan], dict[str, np.ndarray]]:
    outputs, inputs = feed_forward()
    places = [f"{place}:{i}" for i in range(n)]
    plans = [
        gg.compile(outputs, backends=places, shard={"rows": n}, store=gg.Store(ranks=ranks))
        for ranks in ranks_of(n)
    ]
    return plans, inputs


def test_a_rank_has_only_its_own_memory() -> None:
    plans, _ = parts_of(2)
    gc.collect()  # memory of earlier tests
    devices = [backends.get("null", i) for i in range(2)]
    before = [device.allocated for device in devices]
    every([lambda plan=plan: plan.bind() for plan in plans])
    rows = [row.total for row in plans[0].memory.devices]
    assert [device.allocated - b for device, b in zip(devices, before)] == rows
    assert [list(plan.store.arenas) for plan in plans] == [["null:0"], ["null:1"]]


def test_states_have_one_order_on_all_ranks() -> None:
    """So that ranks that read all of them, as `contents` does, read the same ones in turn."""
    devices = [backends.get("null", i) for i in range(2)]
    states = [gg.state(name, ne=(8,)) for name in "cadb"]
    orders = [
        list(Leaves().with_needs([
            Need(state, devices[i % 2], owner=None if i % 2 == rank else i % 2)
            for i, state in enumerate(states)
        ], None).states)
        for rank in range(2)
    ]  # fmt: skip
    assert orders[0] == orders[1] and len(orders[0]) == 4


@pytest.mark.parametrize("n", [1, 3])
def test_another_number_of_devices(n: int) -> None:
    outputs, _ = feed_forward()
    places = ["null:0", "null:1"]
    ranks = ranks_of(n)[0]
    with pytest.raises(DeviceError, match=f"^{n} process(es)? .*2 devices.*mpiexec -n 2"):
        gg.compile(outputs, backends=places, shard={"rows": 2}, store=gg.Store(ranks=ranks))


def test_a_graph_that_is_not_sharded() -> None:
    outputs, inputs = feed_forward()
    with pytest.raises(DeviceError, match="2 processes run, but the graph is not sharded"):
        gg.compile(outputs, backends=["null:0"], store=gg.Store(ranks=ranks_of(2)[0]))
    alone = gg.compile(outputs, store=gg.Store(ranks=ranks_of(1)[0]))
    same(alone.run(inputs), gg.compile(outputs).run(inputs))


def test_outputs_in_place_are_of_one_rank() -> None:
    plans, inputs = parts_of(2)
    first, second = results([lambda plan=plan: plan.views(inputs) for plan in plans])
    assert list(first) == ["y"]
    assert isinstance(second, DeviceError) and "'y' is on null:0, in another process" in str(second)


def test_a_profile_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank measures its own steps, and all have the times of all."""
    monkeypatch.setattr(ceilings, "ceiling", lambda place: ceilings.Ceiling(float(place[-1]), 1.0))
    plans, inputs = parts_of(2)
    profiles = every([lambda plan=plan: plan.profile(inputs, 2) for plan in plans])
    for plan, profile in zip(plans, profiles):
        assert len(profile.rows) == len(plan.steps) and len(profile.whole) == len(plan.splits)
        assert all(row.seconds > 0 for row in profile.rows)
        assert {row.place for row in profile.rows} == {"null:0", "null:1"}
    assert profiles[0].rows == profiles[1].rows
    found = every(
        [
            lambda plan=plan, p=p: p.with_ceilings(plan.store.ranks).ceilings
            for plan, p in zip(plans, profiles)
        ]
    )
    assert found[0] == found[1] == {f"null:{i}": ceilings.Ceiling(i, 1.0) for i in range(2)}


def test_an_error_in_a_profile_reaches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    plans, inputs = parts_of(2)
    every([lambda plan=plan: plan.bind() for plan in plans])

    def fail() -> None:
        raise ValueError("broken")

    monkeypatch.setattr(plans[1]._execution.runners[1], "run", fail)
    found = results([lambda plan=plan: plan.profile(inputs) for plan in plans])
    assert {str(error) for error in found} == {"rank 1: ValueError: broken", "broken"}


def test_an_error_in_a_run_reaches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    plans, inputs = parts_of(3)
    every([lambda plan=plan: plan.bind() for plan in plans])

    def fail() -> None:
        raise ValueError("broken")

    monkeypatch.setattr(plans[1]._execution.runners[1], "run", fail)
    found = results([lambda plan=plan: plan.run(inputs) for plan in plans])
    assert [type(error).__name__ for error in found] == ["PeerError", "ValueError", "PeerError"]
    assert str(found[0]) == str(found[2]) == "rank 1: ValueError: broken"
    again = results([lambda plan=plan: plan.run(inputs) for plan in plans])
    assert all(str(error) == "rank 1: ValueError: broken" for error in again)


def test_memory_that_runs_out_on_a_rank() -> None:
    """All get the error, and then it works: nothing was sent."""
    plans, inputs = parts_of(2)
    device = backends.get("null", 1)
    device.limit = device.allocated + 1000
    try:
        found = results([lambda plan=plan: plan.run(inputs) for plan in plans])
    finally:
        device.limit = None
    assert isinstance(found[1], gg.OutOfMemoryError)
    assert str(found[0]).startswith("rank 1: null:1 cannot allocate")
    every([lambda plan=plan: plan.run(inputs) for plan in plans])


def test_another_plan_on_a_rank() -> None:
    plans, inputs = parts_of(2)
    outputs, _ = feed_forward()
    more = outputs | {"z": gg.relu(outputs["y"])}
    plans[1] = gg.compile(
        more, backends=["null:0", "null:1"], shard={"rows": 2}, store=plans[1].store
    )
    for error in results([lambda plan=plan: plan.run(inputs) for plan in plans]):
        assert "rank 1 has another plan than rank 0: " in str(error)
