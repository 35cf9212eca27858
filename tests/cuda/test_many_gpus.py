"""Graphs over two to four imitated GPUs that reach each other: sums by our own kernels, with the
norm behind them, give the bits of NCCL's sum and the norm's own kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda import lowering, peer_rows
from pyggml.backends.cuda.backend import CudaBackend
from pyggml.backends.cuda.patterns import PATTERNS
from pyggml.backends.cuda.peer_sum import joint_sum_norm
from pyggml.errors import DeviceError
from pyggml.parity.tolerance import nmse
from tests.cuda.collectives import Kernels, Nccl, imitate
from tests.cuda.conftest import Machine
from tests.spmd.threads import every, ranks_of

Imitate = Callable[[int], Nccl]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("kernels") / "all")


@pytest.fixture
def gpus(machine: Machine, monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Imitate:
    """`gpus(n)` imitates a machine with n GPUs that reach each other."""

    def start(count: int) -> Nccl:
        nccl = imitate(machine, monkeypatch, kernels, count)
        bindings: Any = __import__("cuda.bindings.driver").bindings.driver
        monkeypatch.setattr(bindings, "PEERS", [True])
        return nccl

    return start


def outputs(n: int, tokens: int, dtype: str = "f32") -> dict[str, gg.Node]:
    """Two feed-forward nets with norms and residuals: the second norm reads a sum that is also an
    output, the last one a sum that nobody else reads."""

    def weight(name: str, *shape: int) -> gg.Node:
        values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32) / 8
        return gg.constant(values, name=name, dtype=dtype if len(shape) > 1 else "f32")

    x = gg.input("x", ne=(n, tokens))
    result, hidden = {}, 96 if n * tokens > 1000 else 192
    for layer in ("a", "bb", "ccc"):
        y = gg.mul(gg.rms_norm(x, eps=1e-5), weight(f"norm-{layer}", n))
        up, gate = (weight(f"{part}-{layer}", hidden, n) for part in ("up", "gate"))
        y = gg.mul_mat(weight(f"down-{layer}", n, hidden), gg.fused_up_gate(up, gate, y))
        x = gg.add(x, y) if layer == "a" else gg.add(y, x)
        if layer == "a":
            result["sum"] = x
    return result | {"y": gg.mul(gg.rms_norm(x, eps=1e-5), weight("norm", n))}


def plan(count: int, store: gg.Store | None = None, **options: Any) -> gg.Plan:
    places = [f"cuda:{i}" for i in range(count)]
    return gg.compile(outputs(**options), backends=places, shard={"rows": count}, store=store)


def inputs(n: int, tokens: int) -> dict[str, Any]:
    x = np.random.default_rng(0).standard_normal((tokens, n)).astype(np.float32)
    x[-1, :] *= 1e-3
    return {"x": x}


def names(bound: gg.Plan) -> list[str]:
    """The kernels of joint steps."""
    runners = [runner for runner in bound.runners if hasattr(runner, "steps")]
    return [
        name
        for runner in runners
        for i, step in enumerate(runner.steps)
        if step.joint is not None
        for name in runner.kernels(i).names
    ]


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)


def by_nccl(count: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """The results with sums by NCCL, which is imitated in the order of the GPUs."""
    with monkeypatch.context() as patch:
        patch.setenv("PYGGML_PEER_SUM", "0")
        bound = plan(count, **options).bind()
        assert all(name.startswith(("NCCL", "rms_norm")) for name in names(bound))
        results = bound.run(inputs(options["n"], options["tokens"]))
    for i in range(count):
        backends.get("cuda", i).context.communicators.clear()
    return results


@pytest.mark.parametrize(
    ("count", "n", "tokens", "kernel"),
    [
        (2, 64, 1, "peer_sum_norm<4, 1, PLAIN>"),
        (3, 60, 5, "peer_sum_norm<4, 1, PLAIN>"),
        (4, 61, 16, "peer_sum_norm<1, 1, PLAIN>"),
        (2, 4100, 1, "peer_sum_norm<4, 2, PLAIN>"),
        (2, 2500, 1, "peer_sum_norm<4, 1, PLAIN>"),
        (2, 64, 17, "peer_sum"),
    ],
)
def test_sums_and_norms(
    gpus: Imitate, monkeypatch: pytest.MonkeyPatch, count: int, n: int, tokens: int, kernel: str
) -> None:
    """Kernel by kernel, captured, replayed, and in processes."""
    gpus(count)
    options = {"n": n, "tokens": tokens}
    wanted = by_nccl(count, monkeypatch, **options)
    one, x = plan(count, **options).bind(), inputs(n, tokens)
    assert kernel in names(one) and set(names(one)) <= {kernel, "peer_sum", "end_of_run"}
    for _ in range(3):
        same(one.run(x), wanted)
    whole = gg.compile(outputs(**options)).run(x)
    for name, values in whole.items():
        np.testing.assert_allclose(wanted[name], values, rtol=1e-3, atol=1e-3)
    parts = [plan(count, gg.Store(ranks=ranks), **options) for ranks in ranks_of(count)]
    for found in every([lambda part=part: part.run(x) for part in parts]):
        same(found, wanted)


def test_rows_of_f16(gpus: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large parts that may be rounded: kernel by kernel, captured, replayed, and in processes, of
    which one does not read the last sum. Without boxes they are not rounded."""
    gpus(2)
    monkeypatch.setattr(peer_rows, "FEW", 1000)
    options = {"n": 256, "tokens": 20, "dtype": "q8_0"}
    exact = by_nccl(2, monkeypatch, **options)
    one, x = plan(2, **options).bind(), inputs(256, 20)
    assert set(names(one)) == {"peer_rows_norm<256>", "peer_rows", "rms_norm<4, 1, true, PLAIN>"}
    wanted = one.run(x)
    for name, values in exact.items():
        assert 0 < nmse(wanted[name], values) < 1e-6
    for _ in range(3):
        same(one.run(x), wanted)
    parts = [plan(2, gg.Store(ranks=ranks), **options) for ranks in ranks_of(2)]
    for found in every([lambda part=part: part.run(x) for part in parts]):
        same(found, wanted)


def experts(n: int, tokens: int) -> dict[str, gg.Node]:
    """Routed and shared experts, the residual, the norm and a product behind it."""
    rng = np.random.default_rng(3)

    def weight(name: str, *shape: int, dtype: str = "q8_0") -> gg.Node:
        values = rng.standard_normal(shape).astype(np.float32) / 8
        return gg.constant(values, name=name, dtype=dtype)

    x, residual = gg.input("x", ne=(n, tokens)), gg.input("residual", ne=(n, tokens))
    ids, shares = gg.input("ids", "i32", ne=(2, tokens)), gg.input("shares", ne=(1, 2, tokens))
    up, gate = (weight(name, 4, 64, n) for name in ("up", "gate"))
    hidden = gg.moe_up_gate(up, gate, gg.reshape(x, ne=(n, 1, tokens)), ids)
    y = gg.mul_multi_add(gg.mul_mat_id(weight("down", 4, n, 64), hidden, ids), shares)
    up, gate = (weight(f"shared {name}", 64, n) for name in ("up", "gate"))
    y = gg.add(y, gg.mul_mat(weight("shared down", n, 64), gg.fused_up_gate(up, gate, x)))
    x = gg.add(y, residual)
    y = gg.mul(gg.rms_norm(x, eps=1e-5), weight("norm", n, dtype="f32"))
    return {"x": x, "y": gg.mul_mat(weight("next", 32, n), y)}


def test_sums_of_experts(gpus: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts and the sum over the GPUs are one step on the GPU that reads the sum."""
    gpus(2)
    monkeypatch.setattr(peer_rows, "FEW", 1000)
    n, tokens, rng = 256, 70, np.random.default_rng(0)
    x = {name: rng.standard_normal((tokens, n), np.float32) for name in ("x", "residual")}
    x |= {"ids": rng.integers(0, 4, (tokens, 2)), "shares": rng.random((tokens, 2, 1), np.float32)}
    x["ids"] = x["ids"].astype(np.int32)
    cuts = {"experts": 2, "rows": 2}
    bound = gg.compile(experts(n, tokens), backends=["cuda:0", "cuda:1"], shard=cuts).bind()
    *before, norm, alone = names(bound)
    assert (norm, alone) == ("peer_rows_norm<256>", "peer_rows") and len(before) == 5
    whole, results = gg.compile(experts(n, tokens)).run(x), bound.run(x)
    for name, values in whole.items():
        assert nmse(results[name], values) < 1e-5
    for _ in range(2):
        same(bound.run(x), results)


def test_fixed_point_for_the_next_product(gpus: Imitate, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(2)
    options = {"n": 256, "tokens": 1, "dtype": "q8_0"}
    wanted = by_nccl(2, monkeypatch, **options)
    bound = plan(2, **options).bind()
    assert "peer_sum_norm<4, 1, FIXED>" in names(bound)
    same(bound.run(inputs(256, 1)), wanted)


def test_one_gpu_adds_where_another_one_normalizes(
    gpus: Imitate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows and blocks are cut in other ways, and every launch moves on all rounds."""
    gpus(2)
    options = {"n": 1600, "tokens": 3}
    wanted = by_nccl(2, monkeypatch, **options)
    lower, without = CudaBackend.lower, tuple(p for p in PATTERNS if p[0] is not joint_sum_norm)

    def lowered(self: CudaBackend, *args: Any, **named: Any) -> Any:
        with monkeypatch.context() as patch:
            if self.index == 0:
                patch.setattr(lowering, "PATTERNS", without)
            return lower(self, *args, **named)

    monkeypatch.setattr(CudaBackend, "lower", lowered)
    bound = plan(2, **options).bind()
    assert {"peer_sum", "peer_sum_norm<4, 1, PLAIN>"} <= set(names(bound))
    for _ in range(3):
        same(bound.run(inputs(1600, 3)), wanted)


@pytest.mark.parametrize("failed", [0, 2])
def test_a_gpu_that_fails_ends_the_waits_of_the_others(gpus: Imitate, failed: int) -> None:
    """One error, whichever GPU the host waits for; nothing is left waiting, later runs end."""
    nccl = gpus(3)
    bound = plan(3, n=64, tokens=1).bind()
    bound.run(inputs(64, 1))
    pycuda: Any = __import__("pycuda.driver").driver
    ends = [backends.get("cuda", i).context.communicators for i in range(3)]
    boxes = [end.box for each in ends for end in each.values()]
    pycuda.FAILED.add(failed)
    with pytest.raises(DeviceError, match="illegal memory access"):
        backends.get("cuda", 1).context.wait(_Spinning(boxes[1]))
    assert sorted(nccl.aborted) == [0, 1, 2]
    assert all(box._words[0] == 1 for box in boxes)
    with pytest.raises(DeviceError, match="open the model again"):
        bound.run(inputs(64, 1))


@pytest.mark.parametrize("count", [2, 3])
def test_memory(gpus: Imitate, count: int) -> None:
    """The boxes are those of the plan, to the byte, and part of the total; NCCL's are a line."""
    gpus(count)
    planned = plan(count, n=64, tokens=1)
    rows = planned.memory.devices
    planned.bind()
    for i, row in enumerate(rows):
        (end,) = backends.get("cuda", i).context.communicators.values()
        assert end.box.memory.nbytes == row.boxes > 2**20
        parts = row.weights, row.states, row.inputs, row.compute, row.workspace, row.boxes
        assert row.total == sum(parts)
        assert f"MiB on cuda:{i}, part of its total" in str(planned.memory)
        assert f"To connect cuda:{i} with others" in str(planned.memory)
    alone = gg.compile(outputs(64, 1), backends=["cuda:0"]).memory
    assert alone.devices[0].boxes == alone.devices[0].connections == 0
    assert "Sums with other devices" not in str(alone)


class _Spinning:
    """A point behind a kernel that waits for another GPU until the host ends that."""

    def __init__(self, box: Any) -> None:
        self._box = box

    def query(self) -> bool:
        return bool(self._box._words[0])
