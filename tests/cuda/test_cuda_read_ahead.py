"""Weights of the host that a GPU reads ahead, on a fake GPU whose streams run late."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from benchmarks.gpu_bench import random_blocks
from pyggml import backends
from pyggml.backends.cuda.device.registered import Registry
from pyggml.backends.cuda.runner import CudaRunner
from pyggml.backends.step import LoadStep
from pyggml.parity.tolerance import nmse
from pyggml.runtime.plan import Plan
from tests.cuda.conftest import Machine
from tests.cuda.working import Kernels, working_gpu
from tests.interrupts import everywhere

K, M, EXPERTS, USED, TOKENS = 64, 32, 4, 2, 16


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Any:
    if backends.on_host() != "cpu":
        pytest.skip("needs the extra 'cpu' and AVX2")
    return working_gpu(machine, monkeypatch, kernels)


def experts(n_layer: int, n_tokens: int = TOKENS) -> dict[str, gg.Node]:
    """Layers with experts of q4_0. All have the same ids, which are an input."""
    rng = np.random.default_rng(1)

    def weight(name: str, m: int, k: int) -> gg.Node:
        rows = rng.standard_normal((EXPERTS, m, k), np.float32) * np.float32(0.3)
        return gg.constant(rows, dtype="q4_0", name=name)

    ids = gg.input("ids", "i32", ne=(USED, n_tokens))
    h = gg.input("x", "f32", ne=(K, n_tokens))
    for i in range(n_layer):
        up, gate = (weight(f"blk.{i}.{name}_exps", M, K) for name in ("up", "gate"))
        down = weight(f"blk.{i}.down_exps", K, M)
        y = gg.moe_up_gate(up, gate, gg.reshape(h, ne=(K, 1, n_tokens)), ids)
        h = gg.add(h, gg.multi_add(gg.mul_mat_id(down, y, ids)))
    return {"y": h}


def planned(n_layer: int = 3, **options: Any) -> Plan:
    return gg.compile(experts(n_layer), backends=["cuda", "cpu"], pins={"exps": "cpu"}, **options)


def feed(seed: int, experts: int = EXPERTS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((TOKENS, K), np.float32),
        "ids": rng.integers(-1, experts, (TOKENS, USED)).astype(np.int32),
    }


def loads(plan: Plan) -> list[LoadStep]:
    return [step for step in plan.steps if isinstance(step, LoadStep)]


def check(plan: Plan, plain: Plan, seed: int, experts: int = EXPERTS, where: str = "") -> None:
    values = feed(seed, experts)
    want = plain.run(values)["y"]
    assert np.isfinite(want).all()
    np.testing.assert_array_equal(plan.run(values)["y"], want, err_msg=where)


def test_results_are_those_without_reading_ahead(gpu: Any) -> None:
    """In the first run, which starts every launch, and in graphs; also if few experts are sent."""
    plan, plain = planned(), planned(read_ahead=False)
    assert [step.ahead for step in loads(plan)].count(True) == 7
    assert not any(step.ahead for step in loads(plain))
    for turn, n in enumerate((EXPERTS, EXPERTS - 1, 2, EXPERTS, 1)):
        check(plan, plain, turn, n)
    numpy = gg.compile(experts(3)).run(feed(9))["y"]
    assert nmse(plan.run(feed(9))["y"], numpy) < 1e-4


def test_loads_run_on_a_stream_of_their_own(gpu: Any) -> None:
    """On few multiprocessors. What waits for them, or begins beside them, does not overlap."""
    plan = planned()
    plan.bind()
    assert plan._execution is not None
    (runner,) = (r for r in plan._execution.runners if isinstance(r, CudaRunner))
    assert runner._ahead is not None and len(runner._ahead.events) == 7
    for step, records in zip(runner.steps, runner.records):
        if step in runner._ahead.readers:
            assert not records[0].overlap
    context = gpu.context
    before = len(context.loads.queue)
    runner.run()
    assert len(context.loads.queue) > before  # it is late, and nothing has waited yet
    gpu.synchronize()
    assert not len(context.loads.queue)


@pytest.mark.parametrize("why", ["debugging", "not registered"])
def test_where_loads_cannot_run_beside(why: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, or through the ring."""
    plain = planned(read_ahead=False).bind()
    if why == "debugging":
        monkeypatch.setenv("PYGGML_CUDA_DEBUG", "1")
    else:
        monkeypatch.setattr(Registry, "cover", lambda *_, **__: None)
    plan = planned().bind()
    monkeypatch.delenv("PYGGML_CUDA_DEBUG", raising=False)
    for turn in range(3):
        check(plan, plain, turn)
    assert "loads" not in vars(gpu.context) or not len(gpu.context.loads.queue)


@pytest.mark.parametrize("warm", [0, 1, 2], ids=["launches", "capture", "replay"])
def test_interrupts_leave_the_plan_usable(gpu: Any, warm: int) -> None:
    """A load that no step has waited for must not write over what the next run computes."""
    plain = planned(1, read_ahead=False)
    check(plan := planned(1), plain, 0)

    def begin() -> Callable[[], object]:
        new = planned(1) if warm < 2 else plan
        for turn in range(warm if new is not plan else 0):
            new.run(feed(turn))
        latest.append(new)
        return lambda: new.run(feed(5))

    latest: list[Plan] = []
    for where in everywhere(begin, 25):
        check(latest[-1], plain, 6, where=where)
        check(latest[-1], plain, 7, where=where)


@pytest.mark.parametrize("launch", [2, 5, 8])
def test_an_error_in_a_run_waits_for_its_loads(gpu: Any, kernels: Kernels, launch: int) -> None:
    plan, plain = planned().bind(), planned(read_ahead=False)
    kernels.fails_in = launch
    with pytest.raises(ValueError, match="a test"):
        plan.run(feed(0))
    assert not len(gpu.context.loads.queue) and not len(gpu.context.stream.queue)
    for turn in range(3):
        check(plan, plain, turn)


def test_a_token_of_experts_that_only_numpy_multiplies(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay in the file. The GPU reads those of the token, and computes."""
    rng = np.random.default_rng(4)

    def weight(name: str) -> gg.Node:
        rows = random_blocks("iq2_xs", EXPERTS * 256, 256, rng)
        (path := tmp_path / f"{name}.bin").write_bytes(rows.tobytes())
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(memory, np.uint8).reshape(EXPERTS, 256, -1)
        return gg.constant(data, dtype="iq2_xs", name=f"{name}_exps")

    ids, x = gg.input("ids", "i32", ne=(USED, 1)), gg.input("x", "f32", ne=(256, 1, 1))
    up, gate, down = (weight(name) for name in ("up", "gate", "down"))
    y = {"y": gg.multi_add(gg.mul_mat_id(down, gg.moe_up_gate(up, gate, x, ids), ids))}
    plan = gg.compile(y, backends=["cuda", "cpu"], pins={"exps": "cpu"})
    assert [split.backend.name for split in plan.splits] == ["cuda"]
    assert all(step.ids is not None for step in loads(plan))
    want = gg.compile(y)
    for turn in range(4):
        chosen = np.array([[turn % EXPERTS, (turn * 3 + 1) % EXPERTS]], np.int32)
        values = {"x": rng.standard_normal((1, 1, 256), np.float32) * 0.01, "ids": chosen}
        assert nmse(plan.run(values)["y"], want.run(values)["y"]) < 1e-4
