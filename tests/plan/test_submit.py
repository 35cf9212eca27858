"""Runs that are submitted: queued without a wait, their outputs fetched later."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from tests.interrupts import everywhere
from tests.plan.test_interrupts import PLACES, WEIGHT, X, accumulating, check_free, check_whole

# An interrupt in the callback of a weak reference ends that callback and nothing else.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("pace", [None, 0, 1, 2])
@pytest.mark.parametrize("places", PLACES, ids=str)
def test_many_runs_of_two_plans_in_a_row(places: tuple[str, ...], pace: int | None) -> None:
    """Each sees the states of those before it, and inputs may change at once. The results are
    fetched in any order."""
    store = gg.Store()
    plans = [accumulating(store, places), accumulating(store, places, 64)]
    queues: list[Any] = [backends.get("null", i).queue for i in (3, 4)]
    for i, queue in enumerate(queues):
        queue.pace = None if pace is None else Random(10 * pace + i)
    try:
        array, runs, want = np.zeros((64, 4), np.float32), [], np.zeros((2, 4))
        expected = []
        for i in range(12):
            array[:2] = X + i
            rows = 2 if i % 3 else 64
            runs.append(plans[rows == 64].submit(x=array[:rows]))
            want = want + (X + i) @ WEIGHT.T
            expected.append(2 * want)
        for i in Random(pace).sample(range(12), 12):
            np.testing.assert_allclose(runs[i].result()["y"], expected[i], rtol=1e-4, atol=1e-4)
            assert runs[i].result() is runs[i].result()
        np.testing.assert_allclose(store.read("s"), want, rtol=1e-4, atol=1e-4)
    finally:
        for queue in queues:
            queue.pace = None


def test_it_does_not_wait() -> None:
    plan = accumulating(gg.Store(), ("null:3", "null:4")).bind()
    queues: list[Any] = [backends.get("null", i).queue for i in (3, 4)]
    run = plan.submit(x=X)
    assert all(len(queue) for queue in queues) and repr(run) == "<queued run of y>"
    run.result()
    assert repr(run) == "<finished run of y>"
    assert repr(plan.submit({"x": X}, [])) == "<queued run of no outputs>"
    plan.run(x=X)  # waits for all
    assert not any(len(queue) for queue in queues) and not plan.store.shared.queued


@pytest.mark.parametrize(
    "action",
    [
        lambda plan: plan.store.read("s"),
        lambda plan: plan.store.clear(),
        lambda plan: plan.store.write("s", X),
        lambda plan: accumulating(plan.store, ("null:3",), 64).bind(),
        lambda plan: plan.run(x=X),
        lambda plan: plan.time(x=X),
    ],
)
def test_what_follows_waits(action: Callable[[gg.Plan], object]) -> None:
    """All devices are done before the host touches states, or memory is freed."""
    plan = accumulating(gg.Store(), ("null:3", "null:4"))
    run = plan.submit(x=X)
    action(plan)
    queues: list[Any] = [backends.get("null", i).queue for i in (3, 4)]
    assert not any(len(queue) for queue in queues)
    np.testing.assert_allclose(run.result()["y"], 2 * X @ WEIGHT.T, rtol=1e-5, atol=1e-5)


def test_another_device_does_not_overwrite_what_a_queued_run_still_reads() -> None:
    """The second run's copy of x overwrites the first's slot on null:3 while null:4 is late."""
    x = gg.input("x", ne=(64, 16))
    a = gg.label(gg.sqr(x), "a")
    z = gg.label(gg.scale(a, s=2.0), "z")
    plan = gg.compile(
        {"z": z}, backends=["null:3", "null:4"], pins={"^a$": "null:3", "^z$": "null:4"}
    )
    arrays = [np.full((16, 64), i, np.float32) for i in range(1, 4)]
    runs = [plan.submit(x=array) for array in arrays]
    queue: Any = backends.get("null", 3).queue
    queue.run_all()  # null:3 runs ahead as far as it may
    for run, array in zip(runs, arrays):
        assert (run.result()["z"] == 2 * array**2).all()


def failing(place: str) -> gg.Plan:
    """y = the row of a table that an input names; a device finds a wrong one late."""
    ids = gg.input("ids", "i32", ne=(1,))
    table = gg.constant(np.eye(4, dtype=np.float32), name="table")
    return gg.compile({"y": gg.get_rows(table, ids)}, backends=[place])


def test_an_error_reaches_every_run_behind_it() -> None:
    plan = failing("null:3").bind()
    first, wrong, behind = (plan.submit(ids=[i]) for i in (1, 9, 2))
    assert first.result()["y"][0, 1] == 1
    for _ in range(2):
        for run in (wrong, behind):
            with pytest.raises(gg.IdError):
                run.result()
    assert plan.run(ids=[3])["y"][0, 3] == 1


def test_an_error_is_raised_by_the_first_call_that_waits() -> None:
    plan = failing("null:3").bind()
    other = accumulating(plan.store, ("null:3",)).bind()
    for action in (lambda: plan.run(ids=[1]), lambda: other.store.read("s"), other.store.clear):
        first, wrong = plan.submit(ids=[1]), plan.submit(ids=[9])
        with pytest.raises(gg.IdError):
            action()
        assert first.result()["y"][0, 1] == 1
        with pytest.raises(gg.IdError):
            wrong.result()
        assert plan.run(ids=[3])["y"][0, 3] == 1


def test_on_the_host_an_error_is_raised_at_once() -> None:
    plan = failing("numpy").bind()
    with pytest.raises(gg.IdError):
        plan.submit(ids=[9])
    assert plan.submit(ids=[1]).result()["y"][0, 1] == 1


def test_a_run_that_is_dropped_still_runs() -> None:
    plan = accumulating(gg.Store(), ("null:3",))
    plan.submit(x=X)
    np.testing.assert_allclose(plan.store.read("s"), X @ WEIGHT.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_interrupts(places: tuple[str, ...]) -> None:
    """A submitted run happened or it did not, and the run before it keeps its outputs."""
    plan = accumulating(gg.Store(), places).bind()
    runs: list[Any] = []

    def begin() -> Callable[[], object]:
        plan.store.clear()
        runs[:] = [plan.submit(x=X)]
        return lambda: runs.append(plan.submit(x=X))

    product = X @ WEIGHT.T
    for where in everywhere(begin, 5):
        check_free(plan.store, places)
        try:
            got = runs[0].result()["y"]
        except gg.DeviceError:  # a null device runs in this thread, so Ctrl-C can stop its work
            assert "null" in str(places), where
        else:
            np.testing.assert_allclose(got, 2 * product, rtol=1e-5, atol=1e-5, err_msg=where)
        check_whole(plan, where)


@pytest.mark.parametrize("places", PLACES, ids=str)
def test_interrupts_of_a_result(places: tuple[str, ...]) -> None:
    plan = accumulating(gg.Store(), places).bind()
    runs: list[Any] = []

    def begin() -> Callable[[], object]:
        plan.store.clear()
        runs[:] = [plan.submit(x=X), plan.submit(x=X)]
        return runs[0].result

    product = X @ WEIGHT.T
    for where in everywhere(begin, 2):
        check_free(plan.store, places)
        for i, run in enumerate(runs):
            try:
                got = run.result()["y"]
            except gg.DeviceError:
                assert "null" in str(places), where
                continue
            want = 2 * product * (i + 1)
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=where)
        check_whole(plan, where)


# -- outputs that are asked for -------------------------------------------------------------------


@pytest.mark.parametrize("place", ["numpy", "null:3"])
def test_the_outputs_that_are_asked_for(place: str) -> None:
    x = gg.input("x", ne=(4, 2))
    outputs = {"y": gg.sqr(x), "z": gg.scale(x, s=2.0), "one": gg.constant(np.ones(4), name="o")}
    plan = gg.compile(outputs, backends=[place])
    want = {"y": X**2, "z": 2 * X, "one": np.ones(4)}
    for names in (["y"], ("z", "one"), ["z", "y"], [], None):
        for got in (
            plan.run({"x": X}, names),
            plan.repeat(2, {"x": X}, names),
            plan.views({"x": X}, names),
            plan.submit({"x": X}, names).result(),
        ):
            assert list(got) == list(want if names is None else names)
            assert all((np.asarray(got[name]) == want[name]).all() for name in got)


def test_wrong_names_of_outputs() -> None:
    x = gg.input("x", ne=(4, 2))
    plan = gg.compile({"y": gg.sqr(x)})
    for call in (plan.run, plan.views, plan.submit):
        with pytest.raises(gg.UnknownNameError, match="no output 'z'; its outputs are: y"):
            call({"x": X}, ["y", "z"])
        with pytest.raises(gg.DTypeError, match="outputs must be a list of names"):
            call({"x": X}, "y")
        with pytest.raises(gg.DTypeError, match="not 3"):
            call({"x": X}, 3)
    with pytest.raises(gg.UnknownNameError, match=r"call submit\(\)"):
        plan.run(x=X, wait=False)
    with pytest.raises(gg.GraphError, match="missing inputs: x"):
        plan.submit()


def test_inputs_may_have_the_names_of_options() -> None:
    names = ["outputs", "inputs", "n", "wait"]
    nodes = {name: gg.input(name, ne=(4, 2)) for name in names}
    plan = gg.compile({"y": gg.add(gg.add(nodes["outputs"], nodes["inputs"]), nodes["n"])},
                      updates=[gg.cpy(nodes["wait"], gg.state("s", ne=(4, 2)))])  # fmt: skip
    arrays = {name: X for name in names}
    for got in (plan.run(**arrays), plan.repeat(2, **arrays), plan.submit(**arrays).result()):
        assert (got["y"] == 3 * X).all()
