"""Stores that plans share on several devices, and the places of states."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from stacks import WIDTH, places, same, weight, where

import pyggml as gg


def step(tokens: int, store: gg.Store, **options: Any) -> Any:
    """Rows of one product go into a cache; a second one reads the whole cache."""
    x = gg.input("x", "f32", ne=(WIDTH, tokens))
    at = gg.input("at", "i32", ne=(tokens,))
    cache = gg.state("cache", "f32", ne=(WIDTH, 32))
    rows = gg.mul_mat(weight("blk.0.w", WIDTH, WIDTH), x)
    handle = gg.set_rows(cache, rows, at)
    y = gg.mul_mat(weight("blk.1.w", WIDTH, 4), handle)
    return gg.compile({"y": gg.cont(y)}, store=store, **options)


def test_plans_share_a_store_over_two_devices() -> None:
    store, alone = gg.Store(), gg.Store()
    options = {"backends": ["null:0", "null:1"], "pins": {r"blk\.1": "null:1"}}
    plans = [step(n, store, **options) for n in (1, 7)]
    expected = [step(n, alone) for n in (1, 7)]
    rng = np.random.default_rng(0)
    for which, at in ((0, [0]), (1, range(1, 8)), (0, [8]), (1, range(9, 16)), (0, [3])):
        feed = {"x": rng.standard_normal((len(at), WIDTH)), "at": list(at)}
        same(plans[which].run(feed), expected[which].run(feed))
        np.testing.assert_array_equal(store.read("cache"), alone.read("cache"))
    assert store.homes["cache"].place == "null:0"
    assert len(store._leaves.weights) == 2 and len(store._leaves.states) == 1
    assert store.arena_bytes == sum(r.compute for r in plans[1].memory.devices)


def test_a_state_stays_where_the_first_plan_that_was_bound_has_it() -> None:
    """In any order of compiling: a plan compiled for another place is planned again."""
    store, feed = gg.Store(), {"x": np.ones((7, WIDTH)), "at": range(7)}
    prefill = step(7, store, backends=["null:0", "null:1"])
    decode = step(1, store, backends=["null:1", "null:0"])
    assert (where(prefill, "cache"), where(decode, "cache")) == ("null:0", "null:1")
    want = step(7, gg.Store()).run(feed)
    same(prefill.run(feed), want)
    decode.run(x=np.ones((1, WIDTH)), at=[7])
    assert where(decode, "cache") == "null:0" == store.homes["cache"].place
    assert "null:0" in str(decode) and {r.device for r in decode.memory.devices} >= {"null:0"}
    assert store.read("cache")[:8].all() and not store.read("cache")[8:].any()
    later = step(1, store, backends=["null:1", "null:0"])
    assert where(later, "cache") == "null:0"  # the store has the state there


def test_compile_changes_nothing() -> None:
    """A plan that was compiled but never bound does not decide where a state is."""
    store, alone = gg.Store(), gg.Store()
    step(1, store, backends=["null:1", "null:0"])
    plan, fresh = (step(7, s, backends=["null:0", "null:1"]) for s in (store, alone))
    assert str(plan) == str(fresh) and plan.memory == fresh.memory
    assert where(plan.bind(), "cache") == where(fresh.bind(), "cache") == "null:0"


def test_a_plan_that_cannot_take_the_state_s_place_says_so() -> None:
    store = gg.Store()
    pinned = step(1, store, backends=["null:1", "numpy"], pins={"cache": "null:1"})
    elsewhere = step(1, store, backends=["null:1"])
    free = step(1, store, backends=["null:1", "numpy"])
    step(1, store, backends=["numpy"]).bind()
    with pytest.raises(gg.GraphError, match=r"'cache' is pinned to null:1.*has it on numpy"):
        pinned.bind()
    with pytest.raises(gg.GraphError, match=r"'cache' on numpy.*not among the places null:1"):
        elsewhere.bind()
    feed = {"x": np.ones((1, WIDTH)), "at": [3]}
    same(free.run(feed), step(1, gg.Store()).run(feed))
    assert where(free, "cache") == "numpy" and store.read("cache")[3].all()


def test_writing_a_state_away_from_it_is_a_named_error() -> None:
    store = gg.Store()
    step(1, store, backends=["null:1", "numpy"]).bind()
    with pytest.raises(gg.GraphError, match=r"'cache' is pinned to numpy.*null:1"):
        step(1, store, backends=["null:1", "numpy"], pins={"cache": "numpy"})
    x = gg.input("x", "f32", ne=(4,))
    new = gg.label(gg.cpy(x, gg.state("s", "f32", ne=(4,))), "written")
    pins = {"^written$": "null:1", "^s$": "null:0"}
    with pytest.raises(gg.GraphError, match=r"written.*null:1.*state s.*null:0.*pin the state"):
        gg.compile({"y": new}, backends=["null:0", "null:1"], pins=pins)
    pins["^s$"] = "null:1"
    assert places(gg.compile({"y": new}, backends=["null:0", "null:1"], pins=pins)) == ["null:1"]


def test_conflicting_writes_and_reads_are_named_on_several_devices_too() -> None:
    x = gg.label(gg.input("x", "f32", ne=(4,)), "x")
    s = gg.state("s", "f32", ne=(4,))
    first, second = gg.cpy(x, s), gg.cpy(gg.label(gg.relu(x), "far"), s)
    options: Any = {"backends": ["null:0", "null:1"], "pins": {"^far": "null:1", "^s$": "null:0"}}
    with pytest.raises(gg.GraphError, match="write the same handle"):
        gg.compile({"a": first, "b": second}, **options)
    stale = gg.label(
        gg.add(first, s), "far sum"
    )  # reads the handle that a write replaces, and needs that write
    with pytest.raises(gg.GraphError, match=r"far sum.*must run before.*read the handle"):
        gg.compile({"a": stale}, **options)


# A state of the store that is where a later plan does not look.


def settled(place: str) -> gg.Store:
    """A store whose state "s" is on `place` and holds 1, 2, 3, 4."""
    store = gg.Store()
    new = gg.cpy(gg.input("x", "f32", ne=(4,)), gg.state("s", "f32", ne=(4,)))
    gg.compile({"y": new}, backends=[place], store=store).run(x=[1, 2, 3, 4])
    return store


@pytest.mark.parametrize(
    "first, then", [("null:1", ["numpy"]), ("numpy", ["null:0"]), ("null:1", ["null:0", "numpy"])]
)
@pytest.mark.parametrize("write", [False, True])
def test_a_plan_whose_places_lack_the_states_device(
    first: str, then: list[str], write: bool
) -> None:
    """It works there all the same, or the error names the state and its place."""
    store = settled(first)
    s = gg.state("s", "f32", ne=(4,))
    y = gg.cpy(gg.input("x", "f32", ne=(4,)), s) if write else gg.scale(s, s=2.0)
    feed = {"x": [2, 4, 6, 8]} if write else {}
    want = [1, 2, 3, 4]
    try:
        got = gg.compile({"y": y}, backends=then, store=store).run(feed)["y"]
    except (gg.GraphError, gg.DeviceError) as error:
        assert re.search(rf"'s'.*{first}", str(error))
    else:
        np.testing.assert_array_equal(got, [2, 4, 6, 8])
        want = [2, 4, 6, 8] if write else want
    np.testing.assert_array_equal(store.read("s"), want)


@pytest.mark.parametrize("read", ["computed", "pinned", "output"])
def test_reading_a_state_that_is_pinned_away_from_it_is_a_named_error(read: str) -> None:
    store = settled("null:0")
    s = gg.state("s", "f32", ne=(4,))
    y = s if read == "output" else gg.label(gg.relu(s), "y")
    pins = {"^s$": "numpy", **({"^y$": "numpy"} if read == "pinned" else {})}
    with pytest.raises(gg.GraphError, match=r"'s' is pinned to numpy.*null:0"):
        gg.compile({"y": y}, backends=["null:0", "numpy"], pins=pins, store=store)
