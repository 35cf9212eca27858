"""Results that a product writes into pinned memory, in graphs whose kernels run as C++."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml.backends.cuda.device import prepared
from pyggml.backends.cuda.direct import PLACES, Direct
from pyggml.backends.cuda.whole import Whole
from pyggml.errors import DeviceError
from pyggml.models.model import load
from pyggml.models.presets import TINY
from pyggml.models.synth import synth
from pyggml.runtime.fixed import Fixed
from tests.cuda.conftest import Machine
from tests.cuda.working import Kernels, working_gpu
from tests.interrupts import everywhere

#: The last tile of rows is not full.
K, M = 64, 75

Array = NDArray[np.float32]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Any:
    """Small results stay in pinned memory, too."""
    monkeypatch.setattr(prepared, "LEAST", 4 * M)
    return working_gpu(machine, monkeypatch, kernels)


def head(dtype: str = "q8_0", columns: int = 1) -> gg.Node:
    """Logits of columns of x, to which a number is added."""
    weights = np.random.default_rng(1).standard_normal((M, K), np.float32)
    x = gg.add(gg.input("x", ne=(K, columns)), gg.input("one", ne=(1,)))
    return gg.mul_mat(gg.constant(weights, dtype=dtype, name="output"), x)


class Runs:
    """A plan and what NumPy's kernels compute, for contents that differ from run to run."""

    def __init__(self, outputs: dict[str, gg.Node]) -> None:
        self.plan = gg.compile(outputs, backends=["cuda"])
        self.numpy = gg.compile(outputs, backends=["numpy"])
        self.turn = 0

    def inputs(self) -> dict[str, Array]:
        self.turn += 1
        rng, inputs = np.random.default_rng(self.turn), self.plan.inputs
        return {name: rng.standard_normal(inputs[name].shape, np.float32) for name in inputs}

    def wanted(self, inputs: dict[str, Array]) -> dict[str, Array]:
        return self.numpy.run(inputs)

    def check(self, why: str = "") -> dict[str, Array]:
        """Run it, and compare."""
        inputs = self.inputs()
        values = self.plan.run(inputs)
        compare(values, self.wanted(inputs), why)
        return values


def compare(values: dict[str, Array], wanted: dict[str, Array], why: str = "") -> None:
    for name, array in wanted.items():
        np.testing.assert_allclose(values[name], array, rtol=1e-3, atol=1e-3, err_msg=why)


def copies() -> int:
    """How many copies to the host were queued."""
    calls: list[str] = sys.modules["pycuda.driver"].CALLS
    return calls.count("dtoh")


def direct_of(plan: gg.Plan) -> Direct | None:
    """That of its one kind of runs."""
    assert plan.execution is not None
    (whole,) = plan.execution._wholes.values()
    assert isinstance(whole, Whole)
    return whole._direct


def graphs(plan: gg.Plan) -> dict[int, Any]:
    """The graphs for places in pinned memory."""
    direct = direct_of(plan)
    assert direct is not None
    return direct._graphs


@pytest.mark.parametrize("dtype", ["q8_0", "f32", "q4_0"])
def test_results_need_no_copies(gpu: Any, dtype: str) -> None:
    """From the second run on, whether or not the caller still has the one before."""
    runs = Runs({"y": head(dtype)})
    runs.check()
    before = copies()
    values = None
    for _ in range(5):
        values = runs.check()
    del values
    for _ in range(2):
        runs.check()
    assert copies() == before and len(graphs(runs.plan)) == PLACES


def test_kept_results_do_not_change(gpu: Any) -> None:
    """Also views of them, and when all places are taken."""
    runs, kept = Runs({"y": head()}), list[tuple[Array, Array]]()
    for i in range(2 * PLACES + 2):
        inputs = runs.inputs()
        view, wanted = runs.plan.run(inputs)["y"][:, i::2], runs.wanted(inputs)["y"][:, i::2]
        kept.append((view, wanted))
        if i == PLACES:
            del kept[1]
    assert len(graphs(runs.plan)) == PLACES
    for view, wanted in kept:
        np.testing.assert_allclose(view, wanted, rtol=1e-3, atol=1e-3)
    before = copies()
    runs.check()
    assert copies() == before + 1
    del view
    kept.clear()
    runs.check()
    assert copies() == before + 1


def test_the_same_bits(gpu: Any) -> None:
    """As those of copies, in graphs and started one by one."""
    runs = Runs({"y": head()})
    inputs = runs.inputs()
    values = [runs.plan.run(inputs)["y"].copy() for _ in range(3)]
    values.append(runs.plan.submit(inputs).result()["y"])
    assert all((each == values[0]).all() for each in values)


def test_other_ways_to_run_read_the_devices_memory(gpu: Any) -> None:
    runs = Runs({"y": head()})
    fixed_inputs = runs.inputs()
    fixed = Fixed(runs.plan, fixed_inputs)
    for _ in range(3):
        compare(fixed.run(), runs.wanted(fixed_inputs))
        inputs = runs.inputs()
        compare({"y": np.asarray(runs.plan.views(inputs)["y"])}, runs.wanted(inputs))
        inputs = runs.inputs()
        compare(runs.plan.submit(inputs).result(), runs.wanted(inputs))
        inputs = runs.inputs()
        compare(runs.plan.repeat(3, inputs), runs.wanted(inputs))
        assert runs.plan.run(runs.inputs(), []) == {}


def test_a_reshaped_result_and_several_columns(gpu: Any) -> None:
    runs = Runs({"y": gg.reshape(head(columns=2), ne=(2 * M,))})
    for _ in range(3):
        runs.check()
    assert graphs(runs.plan)


@pytest.mark.parametrize("why", ["read", "two", "no product", "a part", "large input"])
def test_what_is_copied(gpu: Any, why: str) -> None:
    """Results that a step reads, too, or that no product writes as a whole, and inputs that one
    launch does not bring."""
    y = head()
    large = gg.view(gg.input("large", ne=(9000,)), ne=(K,))
    outputs = {
        "read": {"y": y, "sum": gg.sum_rows(y)},
        "two": {"y": y, "z": y},
        "no product": {"y": gg.silu(y)},
        "a part": {"y": gg.view(y, ne=(M - 3,), start=(3,))},
        "large input": {"y": gg.mul_mat(y["a"], gg.add(y["b"], large))},
    }
    runs = Runs(outputs[why])
    for _ in range(3):
        runs.check(why)
    assert direct_of(runs.plan) is None


def test_parts_are_free_without_results(gpu: Any) -> None:
    runs = Runs({"y": head()})
    values = [runs.check() for _ in range(4)]
    free = gpu.staging.results.parts.free
    assert free.count(0) == 4
    del values
    assert free.count(0) == 0


def test_a_plan_that_is_gone_leaves_its_results(gpu: Any) -> None:
    runs = Runs({"y": head()})
    runs.check()
    inputs = runs.inputs()
    values, wanted = runs.plan.run(inputs), runs.wanted(inputs)
    assert graphs(runs.plan)
    del runs.plan
    gc.collect()
    compare(values, wanted)


def test_a_failed_gpu_is_an_error(gpu: Any) -> None:
    runs = Runs({"y": head()})
    for _ in range(3):
        runs.check()
    driver: Any = sys.modules["pycuda.driver"]
    driver.FAILED.add(0)
    try:
        with pytest.raises(DeviceError, match="illegal memory access"):
            runs.plan.run(runs.inputs())
    finally:
        driver.FAILED.clear()
    runs.check()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_leaves_results_alone(gpu: Any) -> None:
    """Those that the caller has, and those of later runs."""
    runs = Runs({"y": head()})
    runs.check()
    inputs = runs.inputs()
    kept, wanted = runs.plan.run(inputs), runs.wanted(inputs)

    def begin() -> Callable[[], object]:
        inputs = runs.inputs()
        return lambda: runs.plan.run(inputs)

    for where in everywhere(begin):
        runs.check(where)
        compare(kept, wanted, where)


def test_logits_of_a_session(
    gpu: Any, kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The head's product writes them. No kernel runs here."""
    monkeypatch.setattr(kernels, "run", lambda launch: None)
    synth(tmp_path / "tiny.gguf", TINY, dtype="iq4_nl")
    with load(tmp_path / "tiny.gguf", backends=["cuda"]) as model:
        session = model.session(64)
        logits = [session.forward([token]) for token in range(4)]
        assert session._step is not None and len(graphs(session._step.plan)) == PLACES
    assert all(each.shape == (1, TINY.n_vocab) for each in logits)
