"""States: which values a reader sees, which graphs are errors, what survives a run."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as gg
from pyggml.errors import DTypeError, GraphError, ShapeError, UnknownNameError
from pyggml.node import Node

ROW = np.arange(4, dtype=np.float32)


def written(cache: Node, row: int = 1) -> Node:
    """`cache` with the input x in a row."""
    x = gg.input("x", "f32", ne=(4, 1))
    return gg.set_rows(cache, x, gg.constant(np.array([row], np.int32)))


def test_a_reader_of_the_old_handle_runs_before_the_write() -> None:
    cache = gg.state("cache", "f32", ne=(4, 3))
    new = written(cache)
    # The order of building and the order of outputs do not matter: only the handles do.
    plan = gg.compile({"new": gg.scale(new, s=1.0), "old": gg.scale(cache, s=1.0)})
    first = plan.run(x=ROW[None])
    assert not first["old"].any()
    np.testing.assert_array_equal(first["new"][1], ROW)
    second = plan.run(x=2 * ROW[None])
    np.testing.assert_array_equal(second["old"], first["new"])
    np.testing.assert_array_equal(second["new"][1], 2 * ROW)


def test_a_reader_of_the_old_handle_that_needs_the_write_is_an_error() -> None:
    cache = gg.state("cache", "f32", ne=(4, 3))
    both = gg.add(written(cache), cache)
    with pytest.raises(GraphError, match="read the handle that the write returned") as error:
        gg.compile({"both": both})
    assert str(error.value).count(__file__) == 2


def test_two_writes_of_one_handle_are_an_error() -> None:
    cache = gg.state("cache", "f32", ne=(4, 3))
    one = written(cache)
    two = gg.cpy(gg.scale(cache, s=2.0), cache)
    with pytest.raises(GraphError, match="write the same handle") as error:
        gg.compile({}, updates=[one, two])
    assert str(error.value).count(__file__) == 2


def test_a_write_that_reads_what_it_writes_is_an_error() -> None:
    cache = gg.state("cache", "f32", ne=(4, 4))
    with pytest.raises(GraphError, match="copy what it reads with cont"):
        gg.compile({}, updates=[gg.cpy(gg.transpose(cache), cache)])
    turned = gg.cpy(gg.cont(gg.transpose(cache)), cache)
    plan = gg.compile({}, updates=[turned]).bind()
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    plan.store.write("cache", values)
    assert plan.run() == {}
    np.testing.assert_array_equal(plan.store.read("cache"), values.T)


def test_writes_in_a_chain() -> None:
    cache = gg.state("cache", "f32", ne=(4, 3))
    x = gg.input("x", "f32", ne=(4, 1))
    handle, seen = cache, {}
    for row in range(3):
        part = gg.view(handle, ne=(4, 1), start=(0, row))
        handle = gg.state_of(gg.cpy(gg.scale(x, s=row + 1.0), part))
        seen[f"after{row}"] = handle
    plan = gg.compile(seen)
    got = plan.run(x=ROW[None])
    for row in range(3):
        want = np.zeros((3, 4), np.float32)
        want[: row + 1] = np.outer(np.arange(1, row + 2), ROW)
        # Handles that a later step replaces are still valid outputs: they are copied in time.
        np.testing.assert_array_equal(got[f"after{row}"], want)


def test_whole_is_for_states_only() -> None:
    x = gg.input("x", "f32", ne=(4, 3))
    with pytest.raises(ShapeError, match="must be in the memory of a state"):
        gg.state_of(gg.view(x, ne=(2, 2)))


@pytest.mark.parametrize("build", [lambda x: gg.cpy(x, x), lambda x: gg.set_rows(x, x, x)])
def test_only_states_are_written(build: object) -> None:
    with pytest.raises((ShapeError, DTypeError), match=r"state"):
        build(gg.input("x", "f32", ne=(4, 3)))  # type: ignore[operator]


def test_updates_must_be_writes() -> None:
    with pytest.raises(GraphError, match="handles that set_rows or cpy returned"):
        gg.compile({}, updates=[gg.input("x", "f32", ne=(4,))])


def test_a_counter_needs_no_input() -> None:
    count = gg.state("count", "i32", ne=(1,))
    one = gg.constant(np.array([1], np.int32))
    plan = gg.compile({"before": count}, updates=[gg.cpy(gg.add(count, one), count)])
    assert [int(plan.run()["before"][0]) for _ in range(4)] == [0, 1, 2, 3]
    assert plan.store.read("count") == [4]


def test_store_reads_writes_and_clears() -> None:
    store = gg.Store()
    for dtype in ("f32", "f16", "bf16", "i32", "i64", "q8_0"):
        cache = gg.state(f"s_{dtype}", dtype, ne=(32, 3))
        gg.compile({"y": gg.cont(cache)}, store=store).bind()
        assert not store.read(f"s_{dtype}").any()
        values = np.arange(96).reshape(3, 32) % 17
        store.write(f"s_{dtype}", values if dtype[0] == "i" else values.astype(np.float32))
        np.testing.assert_allclose(store.read(f"s_{dtype}"), values, atol=0.07)
        raw = store.read(f"s_{dtype}", raw=True)
        store.clear(f"s_{dtype}")
        assert not store.read(f"s_{dtype}").any()
        store.write(f"s_{dtype}", raw)
        np.testing.assert_array_equal(store.read(f"s_{dtype}", raw=True), raw)
    store.clear()
    assert not any(store.read(f"s_{dtype}").any() for dtype in ("f32", "bf16", "q8_0"))


def test_store_errors() -> None:
    store = gg.Store()
    for call in (store.read, store.clear, lambda name: store.write(name, 0)):
        with pytest.raises(UnknownNameError, match="no state 'k'; its states are: none"):
            call("k")
    gg.compile({"y": gg.cont(gg.state("k", "f32", ne=(4, 2)))}, store=store).bind()
    with pytest.raises(UnknownNameError, match="its states are: k"):
        store.clear("k", "v")
    with pytest.raises(ShapeError, match=r"NumPy shape \(2, 4\), got NumPy shape \(4, 2\)"):
        store.write("k", np.zeros((4, 2)))
    with pytest.raises(DTypeError, match="complex128"):
        store.write("k", np.zeros((2, 4), complex))


def test_the_copy_that_read_returns_is_ones_own() -> None:
    store = gg.Store()
    gg.compile({"y": gg.cont(gg.state("k", "f32", ne=(4,)))}, store=store).bind()
    store.read("k")[:] = 7
    assert not store.read("k").any()


def test_a_thousand_chained_writes_compile_at_once() -> None:
    """Each `state_of` views the one before it; no pass may walk all of them each time."""
    handle = gg.state("s", "f32", ne=(4, 8))
    x = gg.input("x", "f32", ne=(4,))
    for i in range(1000):
        row = gg.view(handle, ne=(4,), start=(0, i % 8))
        handle = gg.state_of(gg.cpy(gg.scale(x, s=float(i)), row))
    got = gg.compile({"s": handle}).run(x=np.ones(4))["s"]
    np.testing.assert_array_equal(got[:, 0], [992 + i for i in range(8)])
