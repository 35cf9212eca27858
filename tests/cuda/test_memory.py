"""`plan.memory` of a GPU counts everything that is allocated, and nothing else."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda.device import cublas, memory
from pyggml.backends.cuda.device.pinned import PINNED
from pyggml.backends.cuda.launch import WORKSPACE, Gemm
from pyggml.backends.step import Address, LoopStep
from pyggml.dtypes import dtype
from pyggml.ops.leaf import state_op
from pyggml.parity.case import build
from pyggml.parity.cases import cases
from pyggml.runtime.plan import Plan
from pyggml.spec import Spec
from tests.cuda.allocations import ALLOCATIONS, fail_allocation
from tests.cuda.conftest import Machine
from tests.cuda.test_recording import steps_of

MIB = 2**20


def product(name: str = "f16", columns: int = 40) -> gg.Node:
    w = gg.constant(np.ones((64, 256), np.float32), dtype=name, name=f"w_{name}")
    return gg.mul_mat(w, gg.input("x", ne=(256, columns)))


def attention() -> gg.Node:
    q = gg.input("q", ne=(64, 40, 4))
    k, v = (gg.input(n, "f16", ne=ne) for n, ne in (("k", (64, 96, 4)), ("v", (96, 32, 4))))
    return gg.mul_mat(v, gg.soft_max_ext(gg.mul_mat(k, q), scale=0.125))


def plan_of(node: gg.Node, place: str = "cuda", **options: Any) -> Plan:
    return gg.compile({"y": node}, backends=[place], **options)


# -- the table ----------------------------------------------------------------------------------


def test_the_cases_that_call_cublas_declare_its_workspace_and_no_others_do() -> None:
    """Otherwise the table would lack the workspace of cuBLAS, or show one that nothing uses."""
    device, calling = backends.get("cuda"), 0
    for case in cases():
        if case.op not in ("mul_mat", "fused_up_gate", "mul_mat_id", "moe_up_gate"):
            continue
        node = build(case, values=False).node
        if device.supports(node) is not None:
            continue
        for step, records in steps_of(node):
            calls = any(isinstance(record, Gemm) for record in records)
            assert step.workspace == (WORKSPACE if calls else 0), case
            calling += calls
    assert calling > 20


@pytest.mark.parametrize(
    ("name", "columns", "workspace"),
    [("f16", 40, WORKSPACE), ("f32", 40, 0), ("f16", 1, 0), ("q8_0", 40, 0)],
)
def test_the_workspace_has_its_own_column(name: str, columns: int, workspace: int) -> None:
    memory = plan_of(product(name, columns)).memory
    (row,) = memory.devices
    assert row.workspace == memory.workspace == workspace
    parts = (row.weights, row.states, row.inputs, row.compute, row.workspace)
    assert row.total == memory.total == sum(parts)
    head, line = (text.split("|") for text in str(memory).splitlines()[:2])
    at = [word.strip() for word in head].index("workspace")
    assert float(line[at]) == workspace / MIB


def test_all_products_share_one_workspace() -> None:
    x = gg.input("x", ne=(64, 40))
    for i in range(3):
        w = gg.constant(np.ones((64, 64), np.float32), dtype="f16", name=f"w{i}")
        x = gg.mul_mat(w, x)
    assert plan_of(x).memory.workspace == WORKSPACE


def test_a_described_device_must_have_room_for_the_workspace() -> None:
    plan = plan_of(product(), "cuda:0:8MiB")
    assert plan.memory.total - WORKSPACE < 8 * MIB < plan.memory.total
    assert "cuda:0 (assumed 8MiB): does NOT fit" in str(plan.memory)
    assert "8MiB): fits" in str(plan_of(product(columns=1), "cuda:0:8MiB").memory)


def test_the_attention_budget_does_not_count_the_workspace() -> None:
    """It does not grow with the attention, and cutting does not make it smaller."""
    whole = plan_of(attention())
    assert whole.memory.workspace == WORKSPACE and whole.memory.score_peak < MIB
    tight = plan_of(attention(), amb=0.05)
    assert [isinstance(step, LoopStep) for step in tight.steps] == [True]
    assert tight.memory.workspace == WORKSPACE and tight.memory.score_peak <= 0.05 * MIB


def test_pinned_memory_of_the_host_is_a_line_below_the_table() -> None:
    line = f"Copies to and from cuda:0 use another {PINNED / MIB:.2f} MiB of pinned host memory."
    plan = gg.compile({"y": product()}, backends=["cuda:0:24GiB", "numpy"])
    assert line in str(plan.memory).splitlines()
    assert [row.staging for row in plan.memory.devices] == [PINNED]
    assert "pinned" not in str(plan_of(product(), "numpy").memory)
    y = {"y": gg.label(product(), "elsewhere")}
    idle = gg.compile(y, backends=["cuda", "numpy"], pins={"elsewhere|^w|^x": "numpy"})
    assert [row.device for row in idle.memory.devices] == ["cuda:0", "numpy"]
    assert "pinned" not in str(idle.memory)


@pytest.mark.parametrize("place", ("numpy", "null:0"))
def test_other_backends_have_no_workspace(place: str) -> None:
    memory = plan_of(product(), place).memory
    assert memory.workspace == 0 and all(row.staging == 0 for row in memory.devices)


# -- allocations on a fake GPU ------------------------------------------------------------------


@pytest.fixture
def gpu(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine("gpu")
    monkeypatch.setattr(cublas, "_library", lambda: None)  # CuPy is not installed


def allocated(start: tuple[int, int]) -> tuple[int, int]:
    """Blocks and bytes allocated since `start`."""
    gc.collect()
    return ALLOCATIONS.blocks - start[0], ALLOCATIONS.nbytes - start[1]


def test_a_plan_allocates_what_its_table_says(gpu: None) -> None:
    start = allocated((0, 0))
    plan = plan_of(product()).bind()
    # a weight, an input, an arena, the workspace; and the ring
    assert allocated(start) == (5, plan.memory.total + plan.memory.devices[0].staging)
    again = plan_of(product(columns=17)).bind()  # with its own store
    together = plan.memory.total + again.memory.total - WORKSPACE  # they share it
    assert allocated(start)[1] == together + PINNED
    del plan
    assert allocated(start)[1] == again.memory.total + PINNED
    del again
    assert allocated(start) == (1, PINNED)  # kept for the next plan


def test_binding_allocates_all_that_a_run_needs(gpu: None) -> None:
    plan = plan_of(gg.relu(gg.input("x", ne=(256, 40)))).bind()
    count = ALLOCATIONS.count
    plan.run(x=np.ones((40, 256)))
    assert ALLOCATIONS.count == count


def test_loading_weights_allocates_nothing_else(gpu: None) -> None:
    count = ALLOCATIONS.count
    plan = plan_of(product("q8_0")).bind()
    assert ALLOCATIONS.count - count == 4  # a weight, an input, an arena; and the ring
    assert plan.memory.devices[0].weights > 0


# -- copies ---------------------------------------------------------------------------------------


def test_rows_far_apart_are_copied_one_by_one(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory between them is neither read nor written."""
    machine("gpu")
    device: Any = backends.get("cuda")
    spec, step = Spec.of(dtype("f16"), (40, 3, 2)), 20 << 20
    at = Address(device.alloc(6 * step), 64, (2, step, 3 * step, 6 * step))
    values = np.random.default_rng(0).standard_normal((2, 3, 40)).astype(np.float16)
    copied: list[int] = []
    upload, download = device.staging.upload, device.staging.download

    def up(ptr: int, data: Any) -> None:
        copied.append(len(data))
        upload(ptr, data)

    def down(data: Any, ptr: int) -> None:
        copied.append(len(data))
        download(data, ptr)

    monkeypatch.setattr(device.staging, "upload", up)
    monkeypatch.setattr(device.staging, "download", down)
    device.upload(at, spec, values)
    np.testing.assert_array_equal(device.download(at, spec), values)
    assert copied == [80] * 12
    row = Address(at.buffer, 64 + 4 * step, (2, 80, 80, 80))
    np.testing.assert_array_equal(device.download(row, Spec.of(dtype("f16"), (40,))), values[1, 1])


# -- large blocks -----------------------------------------------------------------------------


def cached(n: int) -> gg.Node:
    """A product whose column is added to a state of odd sizes: n weights and n states."""
    y = gg.input("x", ne=(256, 1))
    for i in range(n):
        w = gg.constant(np.ones((256, 256), np.float32), dtype="q8_0", name=f"w{i}")
        y = gg.add(gg.mul_mat(w, y), gg.view(gg.state(f"s{i}", ne=(259,)), ne=(256,)))
    return y


def test_weights_are_parts_of_one_block_and_states_of_another(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a size on that tests otherwise do not reach."""
    monkeypatch.setattr(memory, "ADJACENT", 2 * 1036)
    start = allocated((0, 0))
    plan = plan_of(cached(3)).bind()
    padding = 3 * (1280 - 1036)  # a state takes a multiple of 256 bytes
    staging = plan.memory.devices[0].staging
    # the weights, the states, an input, an arena; and the ring
    assert allocated(start) == (5, plan.memory.total + padding + staging)
    starts = sorted(at.buffer.ptr for node, at in plan.addresses.items() if node.op is state_op)
    assert [b - a for a, b in pairwise(starts)] == [1280, 1280]
    assert all(ptr % 256 == 0 for ptr in starts)
    del plan
    assert allocated(start) == (1, PINNED)


def test_sessions_share_the_block_of_weights_and_not_that_of_states(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ADJACENT", 2 * 1036)
    store = gg.Store()
    first = plan_of(cached(3), store=store).bind()
    start = allocated((0, 0))
    second = plan_of(cached(3), store=gg.Store(like=store)).bind()
    assert allocated(start) == (2, 3 * 1280 + second.memory.inputs)
    del first, store
    assert allocated(start)[0] == 0  # its states and its input are gone, the weights are not
    assert second.memory.weights > 0 and "bound" in repr(second)


def test_a_block_of_weights_may_not_fit(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ADJACENT", 2 * 1036)
    plan = plan_of(cached(3))
    start = allocated((0, 0))
    with fail_allocation(1), pytest.raises(gg.OutOfMemoryError, match="the plan needs:\ndevice"):
        plan.bind()
    assert allocated(start)[0] <= 1
    plan.bind()
    del plan
    assert allocated(start)[0] <= 1
