"""The planner on random graphs: no live memory is overwritten, and results equal the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyggml as gg
from pyggml import backends
from pyggml.node import Node
from pyggml.passes.arena import Interval, live_bytes, pack
from pyggml.runtime.plan import Plan
from tests.plan.graphs import Reference, graphs, inputs_of

# Random graphs read and write states in every order.
pytestmark = pytest.mark.filterwarnings("ignore::pyggml.errors.StateWarning")


def _bytes(plan: Plan, node: Node) -> np.ndarray:
    """The bytes of the arena that `node` occupies."""
    at = plan.addresses[node]
    where = np.full((), at.offset)
    for n, b in zip((node.ne[0] // node.dtype.block, *node.ne[1:]), at.nb):
        where = where[..., None] + b * np.arange(n)
    return (where[..., None] + np.arange(node.dtype.nbytes)).reshape(-1)


def _meets(where: set[int], taken: range) -> bool:
    offsets = np.fromiter(where, int)
    return bool(((offsets >= taken.start) & (offsets < taken.stop)).any())


def check_memory(plan: Plan) -> None:
    """Follow the last writer of each byte of the arena, and check that each step reads what it
    should."""
    plan.bind()
    writer = np.full(plan.memory.compute, -1)
    number: dict[Node, int] = {}
    same: dict[int, set[int]] = {}  # a concat keeps the values of its parts

    def expect(node: Node, reader: str) -> None:
        root = node.root
        if root.op.leaf:
            return
        allowed = {number[root]} | same.get(number[root], set())
        assert set(writer[_bytes(plan, node)]) <= allowed, f"{node!r} is lost before {reader}"

    for i, step in enumerate(plan.steps):
        node, offset = step.node, plan._work.placed.scratch_at[i]
        scratch = range(offset, offset + step.scratch)
        number[node] = i
        own = set() if node.root.op.leaf else set(_bytes(plan, node))
        assert not _meets(own, scratch)
        for read in step.reads:
            expect(read, str(node))
            if read.root.op.leaf:
                continue
            taken = set(_bytes(plan, read))
            assert not _meets(taken, scratch)
            if taken & own and node.op.parts is not None:
                same.setdefault(number[read.root], set()).add(i)
            elif taken & own:
                assert read in step.inplace and plan.addresses[read] == plan.addresses[node]
        writer[scratch.start : scratch.stop] = -2
        writer[list(own)] = i
    for output in plan.graph.outputs.values():
        expect(output, "the end")


def _close(got: np.ndarray, want: np.ndarray) -> None:
    want = want.reshape(got.shape)
    largest = np.max(np.abs(want), initial=1.0, where=np.isfinite(want))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5 * largest)


@settings(max_examples=300)
@given(graphs())
def test_random_graphs(graph: tuple[dict[str, Node], list[Node]]) -> None:
    outputs, _ = graph
    plan = gg.compile(outputs)
    check_memory(plan)
    inputs = {k: v for k, v in inputs_of(plan.graph.nodes).items() if k in plan.inputs}
    reference = Reference(inputs)
    first = plan.run(inputs)
    for key, node in outputs.items():
        _close(first[key], reference.value(node))
    again = plan.run(inputs)  # inputs survive, and old values in the arena do not matter
    for key in outputs:
        np.testing.assert_array_equal(first[key], again[key])


@settings(max_examples=100)
@given(graphs(states=True))
def test_random_graphs_with_states(graph: tuple[dict[str, Node], list[Node]]) -> None:
    outputs, updates = graph
    plan = gg.compile(outputs, updates=updates)
    check_memory(plan)
    inputs = {k: v for k, v in inputs_of(plan.graph.nodes).items() if k in plan.inputs}
    reference = Reference(inputs)
    got = plan.run(inputs)
    for key, node in outputs.items():
        _close(got[key], reference.value(node))
    if updates:
        _close(plan.store.read("s"), reference.content(updates[-1]))


def run_checked(outputs: dict[str, Node], **inputs: Any) -> dict[str, np.ndarray]:
    plan = gg.compile(outputs)
    check_memory(plan)
    return plan.run(inputs)


def test_not_in_place_where_the_source_is_also_read_another_way() -> None:
    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    y = gg.scale(gg.input("x", "f32", ne=(4, 4)), s=1.0)
    got = run_checked({"y": gg.sub(y, gg.transpose(y))}, x=x)["y"]
    np.testing.assert_array_equal(got, x - x.T)


def test_in_place_where_nobody_needs_the_source() -> None:
    y = gg.input("x", "f32", ne=(64, 64))
    for _ in range(10):
        y = gg.relu(gg.scale(y, s=2.0))
    assert gg.compile({"y": y}).memory.compute == 64 * 64 * 4


def test_parts_of_a_concat_live_as_long_as_they_are_read() -> None:
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    node = gg.input("x", "f32", ne=(8, 4))
    part = gg.scale(node, s=2.0)
    both = gg.concat(part, gg.scale(node, s=3.0), dim=1)
    over = gg.scale(
        both, s=0.5
    )  # could take over the memory of `both` if no later step read a part
    total = gg.sum_rows(gg.transpose(over))
    late = gg.mul(gg.repeat(gg.cont(gg.transpose(total)), ne=(8, 16)), gg.repeat(part, ne=(8, 16)))
    got = run_checked({"y": gg.add(late, gg.repeat(part, ne=(8, 16)))}, x=x)["y"]
    want = np.tile(2 * x, (4, 1)) * (2.5 * x.sum(0)) + np.tile(2 * x, (4, 1))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_parts_stand_in_their_parent_and_may_be_read_before_it_is_made() -> None:
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    node = gg.input("x", "f32", ne=(8, 4))
    a, b = gg.scale(node, s=2.0), gg.scale(node, s=3.0)
    early = gg.add(gg.sqr(node), a)
    plan = gg.compile({"early": early, "both": gg.concat(a, b, dim=0)})
    assert plan._work.placed.copied_parts == 0
    got = run_checked({"early": early, "both": gg.concat(a, b, dim=0)}, x=x)
    np.testing.assert_array_equal(got["both"], np.concatenate([2 * x, 3 * x], axis=1))
    np.testing.assert_allclose(got["early"], x * x + 2 * x, rtol=1e-6)


def test_a_part_whose_views_need_its_own_strides_is_copied() -> None:
    x = np.arange(32, dtype=np.float32).reshape(4, 8)
    a = gg.scale(gg.input("x", "f32", ne=(8, 4)), s=1.0)
    flat = gg.relu(gg.reshape(a, ne=(32,)))
    outputs = {"flat": flat, "both": gg.concat(a, gg.scale(a, s=2.0), dim=0)}
    assert gg.compile(outputs)._work.placed.copied_parts == 1
    got = run_checked(outputs, x=x)
    np.testing.assert_array_equal(got["flat"], x.reshape(-1))
    np.testing.assert_array_equal(got["both"], np.concatenate([x, 2 * x], axis=1))


# -- packing alone ------------------------------------------------------------------------------

_interval = st.tuples(st.integers(0, 30), st.integers(0, 12), st.integers(0, 5000)).map(
    lambda t: Interval(t[0], t[0] + t[1], t[2])
)


@settings(max_examples=200)
@given(st.lists(_interval, max_size=40), st.sampled_from([1, 64, 256]))
def test_pack(intervals: list[Interval], alignment: int) -> None:
    offsets, size = pack(intervals, alignment)
    assert len(offsets) == len(intervals)
    for i, (a, at) in enumerate(zip(intervals, offsets)):
        assert at % alignment == 0 and at >= 0 and at + a.nbytes <= size
        for b, other in zip(intervals[:i], offsets):
            together = a.start <= b.end and b.start <= a.end and a.nbytes and b.nbytes
            assert not together or at + a.nbytes <= other or other + b.nbytes <= at
    lower = max(live_bytes(intervals, 50), default=0)
    assert lower <= size <= sum(-(-i.nbytes // alignment) * alignment for i in intervals)


def test_pack_reuses_what_is_over() -> None:
    chain = [Interval(i, i + 1, 1000) for i in range(100)]
    assert pack(chain, 8)[1] == 2000


def test_live_bytes_by_hand() -> None:
    live = live_bytes([Interval(0, 1, 10), Interval(1, 2, 5), Interval(3, 3, 7)], 5)
    assert live == [10, 15, 5, 7, 0]


# -- compile allocates nothing, and says exactly what will be ------------------------------------


def test_compile_of_a_large_plan_allocates_nothing() -> None:
    import tracemalloc

    x = gg.input("x", "f32", ne=(1 << 20, 64))
    cache = gg.state("cache", "f16", ne=(1 << 20, 128))
    y = gg.add(gg.silu(x), gg.tanh(x))
    h = gg.cpy(gg.cast(x, dtype="f16"), gg.view(cache, ne=(1 << 20, 64)))
    gg.compile({"y": y}, updates=[h])  # imports, tables
    tracemalloc.start()
    plan = gg.compile({"y": y}, updates=[h])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.memory.total > 2**30 * 0.9
    assert peak < 1 << 20


@settings(max_examples=40)
@given(graphs(states=True))
def test_memory_is_what_the_store_allocates(graph: tuple[dict[str, Node], list[Node]]) -> None:
    outputs, updates = graph
    plan = gg.compile(outputs, updates=updates)
    asked: list[int] = []
    backend: Any = backends.get("numpy")
    alloc = backend.alloc
    try:
        backend.alloc = lambda nbytes: asked.append(nbytes) or alloc(nbytes)
        plan.bind()
    finally:
        del backend.alloc
    memory, store = plan.memory, plan.store
    assert sum(leaf.at.buffer.nbytes for leaf in store._leaves.weights.values()) == memory.weights
    assert sum(leaf.at.buffer.nbytes for leaf in store._leaves.states.values()) == memory.states
    assert sum(leaf.at.buffer.nbytes for leaf in store._leaves.inputs.values()) == memory.inputs
    assert store.arena_bytes == memory.compute
    assert sum(asked) == memory.total - memory.weights
    assert max(memory.live, default=0) == memory.peak_live <= memory.compute
