"""The null device: private memory, a queue that runs late, a private layout of weights."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
from stacks import FEED, ops, row, same, stack, weight

import pyggml as gg
from pyggml import backends
from pyggml.backends.null.queue import Queue
from pyggml.backends.step import Address

MIB = 2**20


@pytest.fixture
def device() -> Iterator[Any]:
    """A device that no other test uses."""
    null: Any = backends.get("null", 9)
    yield null
    null.limit = null.queue.pace = None


def products() -> dict[str, Any]:
    x = gg.input("x", "f32", ne=(16, 5))
    return {"y": gg.relu(gg.mul_mat(weight("w", 16, 16), x))}


# -- the queue ----------------------------------------------------------------------------------


def test_a_queue_runs_late_and_in_order() -> None:
    queue, seen = Queue(), []
    for i in range(3):
        queue.add(lambda i=i: seen.append(i))
        if i == 1:
            mark = queue.mark()
    assert seen == []
    mark.wait()
    assert seen == [0, 1]
    mark.wait()
    queue.run_all()
    assert seen == [0, 1, 2]


def test_a_paced_queue_runs_some_at_once() -> None:
    behind = set()
    queue, seen = Queue(), []
    queue.pace = Random(0)
    for i in range(50):
        queue.add(lambda i=i: seen.append(i))
        behind.add(i + 1 - len(seen))
    assert {0, 1, 2} <= behind
    queue.run_all()
    assert seen == list(range(50))


def test_an_error_drops_what_waits_and_the_queue_goes_on() -> None:
    queue, seen = Queue(), []
    for task in (lambda: seen.append(0), lambda: 1 / 0, lambda: seen.append(2)):
        queue.add(task)
    mark = queue.mark()
    for _ in range(2):  # it never runs: everyone who waits for it gets the error
        with pytest.raises(ZeroDivisionError):
            mark.wait()
    queue.mark().wait()
    queue.add(lambda: seen.append(3))
    queue.run_all()
    assert seen == [0, 3]


def test_a_run_waits_for_what_no_output_needs(device: Any) -> None:
    x = gg.input("x", "f32", ne=(4,))
    kept = gg.cpy(gg.scale(x, s=2.0), gg.label(gg.state("s", "f32", ne=(4,)), "there"))
    plan = gg.compile(
        {"y": gg.relu(x)}, updates=[kept], backends=["numpy"], pins={"^there$": "null:9"}
    )
    plan.run(x=[1, 2, 3, 4])
    assert not len(device.queue)
    np.testing.assert_array_equal(plan.store.read("s"), [2, 4, 6, 8])


# -- memory -------------------------------------------------------------------------------------


def test_memory_of_another_device_is_refused(device: Any) -> None:
    other: Any = backends.get("null", 8)
    spec = weight(None, 4).spec
    theirs, mine = (Address(d.alloc(16), 0, spec.nb) for d in (other, device))
    host = Address(np.zeros(16, np.uint8), 0, spec.nb)
    for wrong in (theirs, host):
        with pytest.raises(gg.DeviceError, match="null:9 cannot use memory of another device"):
            device.upload(wrong, spec, np.zeros(4, np.float32))
        with pytest.raises(gg.DeviceError, match="memory of another device"):
            device.download(wrong, spec)
        with pytest.raises(gg.DeviceError, match="memory of another device"):
            device.send(wrong, host, spec)
        with pytest.raises(gg.DeviceError, match="memory of another device"):
            device.fetch(mine, other, wrong, spec)
    with pytest.raises(TypeError):  # and the host's kernels cannot read it
        backends.get("numpy").download(mine, spec)


def test_kernels_of_a_device_get_its_own_memory_only(device: Any) -> None:
    plan = gg.compile(products(), backends=["null:9"]).bind()
    at = {n: Address(np.zeros(4096, np.uint8), a.offset, a.nb) for n, a in plan.addresses.items()}
    steps = plan.splits[0].steps
    with pytest.raises(gg.DeviceError, match="memory of another device"):
        device.bind(steps, at, plan.store.arenas["null:9"].buffer, [0] * len(steps))


def test_weights_are_kept_in_a_layout_that_is_not_plain_bytes() -> None:
    w = weight("w", 16, 16)
    x = gg.input("x", "f32", ne=(16, 5))
    plan = gg.compile({"y": gg.mul_mat(w, x)}, backends=["null:9"]).bind()
    at = next(a for n, a in plan.addresses.items() if "w" in gg.labels(n))
    raw = gg.ops.leaf.data_of(w).tobytes()
    stored = at.buffer.data.tobytes()
    assert at.layout != "plain" and len(stored) == row(plan, "null:9").weights > len(raw)
    assert not any(stored[i : i + 64] in raw for i in range(0, len(stored) - 64, 16))
    (step,) = plan.splits[0].steps
    assert step.scratch >= len(raw)  # for the plain weight while the product runs


def test_a_weight_of_which_a_part_is_read_is_plain() -> None:
    w = weight("w", 16, 16)
    x = gg.input("x", "f32", ne=(16, 5))
    outputs = {"y": gg.mul_mat(gg.view(w, ne=(16, 4), start=(0, 8)), x), "w": w}
    plan = gg.compile(outputs, backends=["null:9"])
    assert row(plan, "null:9").weights == w.spec.nbytes
    same(plan.run(x=FEED["x"]), gg.compile(outputs).run(x=FEED["x"]))


def test_loops_over_weights_work() -> None:
    """Scores of a constant K and V, cut by the budget: the loop reads parts of the weights."""
    k, v = weight("k", 8, 64, 2), weight("v", 64, 8, 2)
    q = gg.input("q", "f32", ne=(8, 32, 2))
    y = gg.mul_mat(v, gg.soft_max(gg.mul_mat(k, q)))
    feed = {"q": np.random.default_rng(2).standard_normal((2, 32, 8))}
    plain = gg.compile({"y": y}, backends=["null:9"])
    amb = plain.memory.score_peak / 3 / MIB
    plan = gg.compile({"y": y}, backends=["null:9"], amb=amb)
    assert ops(plan.splits[0]) == ["loop"]
    assert plan.memory.score_peak <= amb * MIB
    same(plan.run(feed), gg.compile({"y": y}, amb=amb).run(feed))
    np.testing.assert_allclose(plan.run(feed)["y"], plain.run(feed)["y"], rtol=1e-4, atol=1e-6)


# -- errors in the middle -----------------------------------------------------------------------


@pytest.mark.parametrize("pace", [None, 0, 1, 2])
@pytest.mark.parametrize("layer, on", [(0, "null:0"), (1, "null:1"), (2, "numpy")])
def test_an_error_in_a_kernel_leaves_every_device_idle(
    pace: int | None, layer: int, on: str
) -> None:
    """An id past the end of one layer's cache; each layer is on another device."""
    pins = {r"blk\.0\.": "null:0", r"blk\.1\.": "null:1", r"blk\.2\.": "numpy"}
    y, queues = stack(3), [backends.get("null", i).queue for i in range(2)]
    bad = gg.state("bad", "f32", ne=(16, 2))
    ids = gg.input("ids", "i32", ne=(5,))
    extra = gg.set_rows(bad, gg.mul_mat(weight(f"blk.{layer}.extra", 16, 16), y_in(y)), ids)
    plan = gg.compile({"y": y}, updates=[extra], backends=["null:0", "null:1", "numpy"], pins=pins)
    good = {**FEED, "ids": [0, 1, -1, -1, -1]}
    assert on in {s.backend.place for s in plan.splits if "set_rows" in ops(s)}
    want = plan.run(good)
    plan.store.clear()
    for queue in queues:
        queue.pace = None if pace is None else Random(pace)
    try:
        with pytest.raises(gg.IdError, match=r"bad.*id 7 is past the end"):
            plan.run({**FEED, "ids": [0, 1, -1, 7, -1]})
        assert all(not len(queue) for queue in queues)
        plan.store.clear()
        same(plan.run(good), want)
    finally:
        for queue in queues:
            queue.pace = None


def y_in(y: Any) -> Any:
    """The input "x" of a graph."""
    return next(n for n in gg.Graph({"y": y}).nodes if n.attrs.get("name") == "x")


# -- out of memory ------------------------------------------------------------------------------


def refuse(device: Any, monkeypatch: pytest.MonkeyPatch, nth: int) -> list[int]:
    """Let the n-th allocation on the device fail; returns the sizes of those before."""
    sizes: list[int] = []
    alloc = device.alloc

    def counted(nbytes: int) -> Any:
        if len(sizes) == nth:
            raise gg.OutOfMemoryError(f"null:9 has no {nbytes} bytes")
        sizes.append(nbytes)
        return alloc(nbytes)

    monkeypatch.setattr(device, "alloc", counted)
    return sizes


def test_if_any_allocation_fails_no_memory_is_kept(
    device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = gg.compile(products()).run(x=FEED["x"])
    store = gg.Store()
    plan = gg.compile(products(), backends=["null:9"], store=store)
    for nth in range(3):  # a weight, an input, the arena
        with monkeypatch.context() as patch:
            refuse(device, patch, nth)
            with pytest.raises(gg.OutOfMemoryError, match=r"null:9 has no(?s:.)*the plan needs"):
                plan.bind()
        assert store.arena_bytes == 0
        assert not (store._leaves.weights or store._leaves.states or store._leaves.inputs)
    same(plan.run(x=FEED["x"]), want)


def test_a_limit_is_what_a_plan_may_take(device: Any) -> None:
    plan = gg.compile(products(), backends=["null:9"])
    before = device.allocated
    device.limit = before + plan.memory.total - 1
    with pytest.raises(gg.OutOfMemoryError, match="null:9 cannot allocate"):
        plan.bind()
    device.limit = None
    plan.bind()


def test_memory_that_is_let_go_is_free_again(device: Any) -> None:
    gc.collect()  # of other tests
    before = device.allocated
    plan = gg.compile(products(), backends=["null:9"])
    device.limit = before + plan.memory.total
    with pytest.raises(gg.OutOfMemoryError):
        gg.compile({"y": gg.relu(gg.input("z", "f32", ne=(16, 400)))}, backends=["null:9"]).bind()
    plan.bind()  # the failed bind kept no memory
    del plan
    gc.collect()  # free reference cycles
    assert device.allocated == before
    again = gg.compile(products(), backends=["null:9"])
    again.bind()
