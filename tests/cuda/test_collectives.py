"""Collectives by NCCL on two imitated GPUs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda.device import boxes
from pyggml.backends.cuda.device import nccl as device_nccl
from pyggml.backends.cuda.device.nccl import Watch
from pyggml.errors import DeviceError
from tests.cuda.collectives import Kernels, Nccl, imitate
from tests.cuda.conftest import Machine
from tests.spmd.threads import every, ranks_of, results

PLACES = ["cuda:0", "cuda:1"]
RNG = np.random.default_rng(0)
X = {"x": RNG.standard_normal((3, 64), np.float32)}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(tmp_path_factory.mktemp("kernels") / "all")


@pytest.fixture
def nccl(machine: Machine, monkeypatch: pytest.MonkeyPatch, kernels: Kernels) -> Nccl:
    return imitate(machine, monkeypatch, kernels)


def weight(name: str, *shape: int) -> gg.Node:
    values = np.random.default_rng(len(name)).standard_normal(shape).astype(np.float32) / 8
    return gg.constant(values, name=name)


def outputs() -> dict[str, gg.Node]:
    """A feed-forward net and logits: a sum, and a gather of parts that are not side by side."""
    x = gg.input("x", ne=(64, 3))
    up = gg.fused_up_gate(weight("up", 96, 64), weight("gate", 96, 64), x)
    y = gg.mul_mat(weight("down", 64, 96), up)
    z = gg.mul_mat(weight("output", 512, 64), gg.add(x, y))
    return {"y": y, "z": z}


def plan(store: gg.Store | None = None, **options: Any) -> gg.Plan:
    options = {"shard": {"rows": 2}} | options
    return gg.compile(outputs(), backends=PLACES, store=store, **options)


def test_one_process(nccl: Nccl) -> None:
    """First kernel by kernel, then captured, then replayed: the same bits, near the whole graph."""
    wanted = gg.compile(outputs()).run(X)
    sharded = plan()
    runs = [sharded.run(X) for _ in range(3)]
    for name, values in wanted.items():
        np.testing.assert_allclose(runs[0][name], values, rtol=1e-4, atol=1e-4)
        for again in runs[1:]:
            np.testing.assert_array_equal(again[name], runs[0][name])
    each = ["joint_reduce"] * 2 + ["joint_gather"] * 2
    assert nccl.calls == 2 * each  # the third run replays


def test_processes(nccl: Nccl) -> None:
    """The same bits with a process for each GPU."""
    wanted = plan().run(X)
    parts = [plan(gg.Store(ranks=ranks)) for ranks in ranks_of(2)]
    for _ in range(3):
        for found in every([lambda part=part: part.run(X) for part in parts]):
            for name, values in wanted.items():
                np.testing.assert_array_equal(found[name], values)


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("shard", [{"rows": (3, 1)}, {"layers": 2}])
def test_parts_of_different_sizes_and_stages(nccl: Nccl, shard: dict[str, Any]) -> None:
    """Logits of which a device has three quarters; a copy from stage to stage."""
    wanted = gg.compile(outputs()).run(X)
    one = plan(shard=shard)
    assert not any(split.copies for split in one.splits)
    runs = [one.run(X) for _ in range(3)]
    for name, values in wanted.items():
        np.testing.assert_allclose(runs[0][name], values, rtol=1e-4, atol=1e-4)
    for again in runs[1:]:
        same(again, runs[0])
    parts = [plan(gg.Store(ranks=ranks), shard=shard) for ranks in ranks_of(2)]
    for _ in range(3):
        for found in every([lambda part=part: part.run(X) for part in parts]):
            same(found, runs[0])


@pytest.mark.parametrize(
    "shard",
    [{"experts": 2, "rows": 2}, {"experts": (5, 1), "rows": (5, 1)}, {"experts": 2}],
    ids=("both", "uneven", "experts"),
)
def test_experts_of_a_token(nccl: Nccl, shard: dict[str, Any]) -> None:
    """A step on each GPU, of the experts that it has. Tokens that chose experts of one GPU only, of
    the other only, and of both."""
    k, n, used = 64, 12, 4
    rng = np.random.default_rng(1)

    def weight(name: str, *shape: int) -> gg.Node:
        values = rng.standard_normal(shape).astype(np.float32) / 8
        return gg.constant(values, dtype="q8_0", name=name)

    router = np.zeros((n, k), np.float32)
    router[:, 0] = np.arange(n) / 8
    router[::3, 1] = 2
    x = gg.input("x", ne=(k, 1))
    rows = gg.mul(gg.rms_norm(x, eps=1e-6), gg.constant(np.ones(k, np.float32), name="norm"))
    scores = gg.mul_mat(gg.constant(router, name="router"), rows)
    probs = gg.sigmoid(scores)
    ids = gg.top_k(probs, k=used)
    shares = gg.get_rows(gg.reshape(probs, ne=(1, n, 1)), ids)
    up, gate = (weight(name, n, 64, k) for name in ("up", "gate"))
    hidden = gg.moe_up_gate(up, gate, gg.reshape(rows, ne=(k, 1, 1)), ids)
    routed = gg.mul_multi_add(gg.mul_mat_id(weight("down", n, k, 64), hidden, ids), shares)
    shared = gg.fused_up_gate(weight("up_s", 128, k), weight("gate_s", 128, k), rows)
    y = gg.add(x, gg.add(routed, gg.mul_mat(weight("down_s", k, 128), shared)))
    wanted, one = gg.compile({"y": y}), gg.compile({"y": y}, backends=PLACES, shard=shard)
    ops = [{n.op for n in step.nodes} for split in one.splits for step in split.steps]
    assert [gg.top_k in each for each in ops if gg.moe_up_gate in each] == [True, True]
    parts = [
        gg.compile({"y": y}, backends=PLACES, shard=shard, store=gg.Store(ranks=ranks))
        for ranks in ranks_of(2)
    ]
    for first, second in ((4.0, 0.0), (-4.0, 0.0), (0.0, 4.0)):
        inputs = {"x": rng.standard_normal((1, k), np.float32)}
        inputs["x"][0, :2] = first, second
        results = one.run(inputs)
        np.testing.assert_allclose(results["y"], wanted.run(inputs)["y"], rtol=1e-3, atol=1e-2)
        same(one.run(inputs), results)
        for found in every([lambda part=part, inputs=inputs: part.run(inputs) for part in parts]):
            same(found, results)


def test_multicast_stays_off(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.delenv("NCCL_RUNTIME_CONNECT", raising=False)
    plan().bind()
    assert device_nccl.os.environ["NCCL_NVLS_ENABLE"] == "0"
    assert device_nccl.os.environ["NCCL_RUNTIME_CONNECT"] == "0"


def test_without_nccl(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that says what to install; or copies and sums, with the same results."""
    wanted = plan().run(X)
    monkeypatch.setattr(nccl, "available", False)
    for device in (backends.get("cuda", i) for i in range(2)):
        device.context.communicators.clear()
    with pytest.raises(DeviceError, match=r"need NCCL.*pip install .*cuda"):
        plan().run(X)
    parts = [plan(gg.Store(ranks=ranks)) for ranks in ranks_of(2)]
    for error in results([lambda part=part: part.run(X) for part in parts]):
        assert "need NCCL" in str(error)
    monkeypatch.setenv("PYGGML_NCCL", "0")
    calls = len(nccl.calls)
    for name, values in plan().run(X).items():
        np.testing.assert_allclose(values, wanted[name], rtol=1e-5, atol=1e-5)
    assert len(nccl.calls) == calls


def test_small_sums_by_the_own_kernel(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where GPUs reach each other; in processes only if all do."""
    driver: Any = __import__("cuda.bindings.driver").bindings.driver
    monkeypatch.setattr(driver, "PEERS", [True])

    def kernels(bound: gg.Plan) -> list[str]:
        runners = [r for r in bound.runners if hasattr(r, "steps")]
        steps = [(r, i) for r in runners for i, s in enumerate(r.steps) if s.node.op.joint]
        return [str(r.kernels(i)) for r, i in steps]

    gather = "NCCL all_gather of 3072 (bytes)"
    assert kernels(plan().bind()) == 2 * ["peer_sum + end_of_run", gather]
    parts = [plan(gg.Store(ranks=ranks)) for ranks in ranks_of(2)]
    every([lambda part=part: part.bind() for part in parts])
    for part in parts:
        assert kernels(part) == ["peer_sum + end_of_run", gather]
    monkeypatch.setenv("PYGGML_PEER_SUM", "0")
    parts = [plan(gg.Store(ranks=ranks)) for ranks in ranks_of(2)]
    every([lambda part=part: part.bind() for part in parts])
    for part in parts:
        assert kernels(part) == ["NCCL all_reduce of 192 (f32)", gather]


def test_boxes_that_not_all_can_open(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three processes have opened those of the others: they close them."""
    driver: Any = __import__("cuda.bindings.driver").bindings.driver
    monkeypatch.setattr(driver, "PEERS", [True])
    context = backends.get("cuda", 0).context
    host = boxes.socket.gethostname()
    others = [f"{i} {host} {(i << 20).to_bytes(64, 'little').hex()}" for i in (1, 2)]
    seen: list[list[int]] = []

    class Processes:
        def gather(self, text: str) -> list[str]:
            seen.append(driver.OPENED[:])
            return [text, *others] if len(seen) == 1 else [text, boxes.OPEN, boxes.NONE]

    assert boxes.box_of_process(context, 0, 3, Processes()) is None
    assert seen == [[], [1 << 20, 2 << 20], []]  # closed before the boxes may be freed


def test_debugging_does_not_wait_within_a_turn(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU in a joint step waits for the others, whose work has not been queued yet."""
    wanted = plan().run(X)
    stream: Any = __import__("pycuda.driver").driver.Stream
    is_done, waits = stream.is_done, []

    def checked(self: Any) -> bool:
        waits.append(nccl.depth)
        done: bool = is_done(self)
        return done

    monkeypatch.setattr(stream, "is_done", checked)
    monkeypatch.setenv("PYGGML_CUDA_DEBUG", "1")
    same(plan().run(X), wanted)
    assert len(waits) > 5 and not any(waits)


def test_a_replay_that_fails(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    """The context of the GPU whose graph was not launched does not stay current."""
    sharded = plan().bind()
    for _ in range(2):
        sharded.run(X)

    def fails(*_: object) -> None:
        raise __import__("pycuda.driver").driver.LogicError("cuGraphLaunch failed")

    execution = sharded._execution
    assert execution is not None
    (together,) = execution.together.values()
    graphs = list(together._graphs)  # type: ignore[attr-defined]
    monkeypatch.setattr(together, "_graphs", [*graphs[:4], fails, *graphs[5:]])
    stack = __import__("pycuda.driver").driver.Context.stack
    depth = len(stack)
    with pytest.raises(DeviceError, match="cuGraphLaunch failed"):
        sharded.run(X)
    assert len(stack) == depth and sorted(nccl.aborted) == [0, 1]


def test_an_interrupt_of_the_first_run(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one GPU waits for would never come: that ends, and later runs are errors."""
    sharded = plan().bind()
    second = sharded.runners[1]

    def interrupted(index: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(second, "run_joint", interrupted)
    monkeypatch.setattr(nccl, "groupEnd", nccl.dropped)
    with pytest.raises(KeyboardInterrupt):
        sharded.run(X)
    assert sorted(nccl.aborted) == [0, 1]
    monkeypatch.undo()
    with pytest.raises(DeviceError, match="open the model again"):
        sharded.run(X)


class Peers:
    """Other processes, of which one fails at the third look."""

    looks = 0

    def gather(self, text: str) -> list[str]:
        return [text]

    def look(self) -> None:
        self.looks += 1
        if self.looks == 3:
            raise DeviceError("rank 1: out of memory")


class Never:
    """A point in a queue that is never reached."""

    def query(self) -> bool:
        return False


def test_a_wait_for_a_process_that_failed(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    plan().bind()
    context = backends.get("cuda", 0).context
    (end,) = context.communicators.values()
    monkeypatch.setattr(context, "peers", Peers())
    with pytest.raises(DeviceError, match="rank 1: out of memory"):
        context.wait(Never())
    assert nccl.aborted == [0, 1] and end.lost
    with pytest.raises(DeviceError, match="open the model again"):
        end.check_usable()


def test_other_reasons_to_end_a_wait(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    plan().bind()
    context = backends.get("cuda", 0).context
    (end,) = context.communicators.values()
    end.raw.error = 3
    with pytest.raises(DeviceError, match=r"NCCL has lost another device \(error 3\)"):
        Watch(Peers(), (end,)).look()
    monkeypatch.setattr(device_nccl, "PATIENCE", -1.0)
    with pytest.raises(DeviceError, match="do all make the same calls"):
        Watch(Peers(), ()).look()


def test_a_process_that_fails_while_others_connect(
    nccl: Nccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others, which wait for it in NCCL, end with its error."""
    connect = nccl.NcclCommunicator

    def fails(count: int, id: Any, index: int) -> Any:
        if index == 1:
            raise DeviceError("not today")
        device_nccl.time.sleep(3)  # NCCL would wait for ever
        return connect(count, id, index)

    monkeypatch.setattr(nccl, "NcclCommunicator", fails)
    parts = [plan(gg.Store(ranks=ranks)) for ranks in ranks_of(2)]
    found = results([lambda part=part: part.run(X) for part in parts])
    assert str(found[1]) == "not today" and str(found[0]) == "rank 1: not today"


def test_no_profile_in_one_process(nccl: Nccl) -> None:
    with pytest.raises(DeviceError, match="--nproc N"):
        plan().profile(X)
