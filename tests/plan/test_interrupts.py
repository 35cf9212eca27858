"""Ctrl-C at every point of bind and run: all locks are free afterwards, nothing is half done, and
the next results are right."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from tests.interrupts import everywhere

# An interrupt in the callback of a weak reference ends that callback and nothing else.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PLACES = [("numpy",), ("null:3",), ("null:3", "null:4"), ("null:3", "numpy")]
WEIGHT = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def accumulating(store: gg.Store, places: tuple[str, ...], rows: int = 2) -> gg.Plan:
    """s := s + W x, and y = 2 s; the last product on the second place if there is one."""
    x, s = gg.input("x", "f32", ne=(4, rows)), gg.state("s", "f32", ne=(4, 2))
    product = gg.mul_mat(gg.constant(WEIGHT, name="w"), x)
    if rows != 2:
        product = gg.view(product, ne=(4, 2))
    total = gg.cpy(gg.add(s, product), s)
    y = gg.label(gg.scale(total, s=2.0), "there")
    pins = {"there": places[-1], "^s$": places[0]}
    return gg.compile({"y": y}, backends=list(places), pins=pins, store=store)


def check_free(store: gg.Store, places: tuple[str, ...]) -> None:
    """Another thread can take the locks, and the queues are empty."""
    locks = [store.lock, *(backends.get(*split(p)).lock for p in places)]
    free: list[bool] = []

    def take() -> None:
        for lock in locks:
            if hasattr(lock, "acquire"):  # the host has no real lock
                free.append(lock.acquire(timeout=30))
                if free[-1]:
                    lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert all(free), "a lock stayed taken"


def split(place: str) -> tuple[str, int]:
    name, _, index = place.partition(":")
    return name, int(index or 0)


def check_whole(plan: gg.Plan, where: str) -> None:
    """The plan and its store work as if nothing had happened."""
    before = plan.bind().store.read("s")
    got = plan.run(x=X)["y"]
    want = before + X @ WEIGHT.T
    np.testing.assert_allclose(got, 2 * want, rtol=1e-5, atol=1e-5, err_msg=where)
    np.testing.assert_allclose(plan.store.read("s"), want, rtol=1e-5, atol=1e-5, err_msg=where)


@pytest.fixture(autouse=True)
def settings_of_numpy() -> Iterator[None]:
    before = np.geterr(), np.getbufsize()
    yield
    assert (np.geterr(), np.getbufsize()) == before


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_interrupts_while_a_plan_runs(places: tuple[str, ...]) -> None:
    plan = accumulating(gg.Store(), places).bind()
    product = X @ WEIGHT.T

    def begin() -> Callable[[], object]:
        plan.store.clear()
        return lambda: plan.run(x=X)

    points = list[str]()
    for where in everywhere(begin, 3):
        points.append(where)
        check_free(plan.store, places)
        s = plan.store.read("s")  # the write happened or it did not
        assert np.allclose(s, 0) or np.allclose(s, product, rtol=1e-5, atol=1e-5), where
        check_whole(plan, where)
    assert len(points) > 30


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_interrupts_while_a_plan_is_bound(places: tuple[str, ...]) -> None:
    """The first plan of a store: weights, states, slots and arenas appear together or not."""
    plans: list[gg.Plan] = []

    def begin() -> Callable[[], object]:
        plans[:] = [accumulating(gg.Store(), places)]
        return plans[0].bind

    for where in everywhere(begin, 11):
        check_free(plans[0].store, places)
        check_whole(plans[0], where)
        check_whole(accumulating(plans[0].store, places), where)


@pytest.mark.parametrize("places", PLACES[:3], ids=str)
def test_interrupts_while_an_arena_grows(places: tuple[str, ...]) -> None:
    """Two plans share a store, and the larger one is bound second."""
    plans: list[gg.Plan] = []

    def begin() -> Callable[[], object]:
        store = gg.Store()
        plans[:] = [accumulating(store, places), accumulating(store, places, 64)]
        plans[0].run(x=X)
        return plans[1].bind

    for where in everywhere(begin, 17):
        check_free(plans[0].store, places)
        check_whole(plans[0], where)
        plans[1].run(x=np.zeros((64, 4)))
        check_whole(plans[0], where)


@pytest.mark.parametrize("place", ["numpy", "null:3"])
def test_interrupts_while_an_input_is_bound(place: str) -> None:
    """Afterwards either the array is the input's memory, or runs take an array as before."""
    plan = accumulating(gg.Store(), (place,))
    source = gg.compile({"x": gg.input("x", ne=(4, 2))}, backends=[place])
    array = X + 1 if place == "numpy" else source.views(x=X + 1)["x"]

    def begin() -> Callable[[], object]:
        plan.bind(x=None).store.clear()
        return lambda: plan.bind(x=array)

    for where in everywhere(begin, 13):
        check_free(plan.store, (place,))
        before = plan.store.read("s")
        try:
            plan.run(x=X)
            x = X
        except gg.GraphError:
            plan.run()
            x = X + 1
        want = before + x @ WEIGHT.T
        np.testing.assert_allclose(plan.store.read("s"), want, rtol=1e-5, atol=1e-5, err_msg=where)


@pytest.mark.parametrize("place", ["numpy", "null:3"])
def test_interrupts_while_a_state_is_read_or_written(place: str) -> None:
    plan = accumulating(gg.Store(), (place,)).bind()
    store = plan.store

    def begin() -> Callable[[], object]:
        store.write("s", X)
        return lambda: (store.read("s"), store.write("s", -X))

    for where in everywhere(begin):
        check_free(store, (place,))
        s = store.read("s")
        assert (s == X).all() or (s == -X).all(), where
        check_whole(plan, where)


@pytest.mark.parametrize("places", PLACES[:3], ids=str)
def test_interrupts_from_outside_while_a_plan_runs(places: tuple[str, ...]) -> None:
    """Real signals at arbitrary times.

    Python drops an exception that is raised in a callback of its garbage collector (hypothesis has
    one), so a signal does not always interrupt.
    """
    plan = accumulating(gg.Store(), places).bind()
    rng = np.random.default_rng(0)
    signals = interrupts = 0

    def stop(*_: Any) -> None:
        nonlocal signals
        signals += 1
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        for number in range(150):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))
                while signals == number:
                    plan.run(x=X)
            except KeyboardInterrupt:
                interrupts += 1
            check_free(plan.store, places)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert signals == 150
    assert interrupts >= 100
    plan.store.clear()
    check_whole(plan, "signals")


def test_the_injector_finds_what_an_interrupt_breaks() -> None:
    """A lock taken through an ExitStack, two counts that must agree; a `with` is left alone."""
    store = gg.Store()

    def stacked() -> None:
        with ExitStack() as stack:
            stack.enter_context(store.lock)

    def taken(action: Callable[[], object]) -> bool:
        for _ in everywhere(lambda: action):
            try:
                check_free(store, ())
            except AssertionError:
                store.lock.release()
                return True
        return False

    assert taken(stacked)
    assert not taken(lambda: store.alone((), lambda: None))
