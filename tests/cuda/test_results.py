"""Results in pinned memory: the caller's arrays are views of it, and their parts are used again."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda.device import results
from tests.cuda.conftest import Machine

#: Float32 values of a result that takes one unit.
COUNT = results.GRAIN // 4
MOST = results.ROOM // results.GRAIN


@pytest.fixture
def plan(machine: Machine) -> gg.Plan:
    """A plan that returns its input."""
    machine("gpu")
    return gg.compile({"x": gg.input("x", ne=(COUNT,))}, backends=["cuda"])


def values(number: int) -> NDArray[np.float32]:
    return np.arange(COUNT, dtype=np.float32) + number


def is_pinned(array: NDArray[np.float32]) -> bool:
    staging = backends.get("cuda").staging  # type: ignore[attr-defined]
    return np.may_share_memory(array, staging.results.parts.memory)


def test_results_are_the_callers(plan: gg.Plan) -> None:
    """Later runs do not change them, and they may be written to."""
    first = plan.run(x=values(0))["x"]
    second = plan.run(x=values(1))["x"]
    assert is_pinned(first) and is_pinned(second)
    first[:] = -1
    assert (plan.run(x=values(2))["x"] == values(2)).all() and (second == values(1)).all()


def test_a_part_is_free_once_no_array_refers_to_it(plan: gg.Plan) -> None:
    views = [plan.run(x=values(i))["x"][1:][::2] for i in range(MOST)]
    assert all(map(is_pinned, views))
    other = plan.run(x=values(-1))["x"]
    assert not is_pinned(other) and (other == values(-1)).all()
    assert all((view == values(i)[1:][::2]).all() for i, view in enumerate(views))
    del views[3]
    assert is_pinned(plan.run(x=values(0))["x"])


def test_results_that_nobody_waits_for_free_their_parts(plan: gg.Plan) -> None:
    for i in range(2 * MOST):
        plan.submit(x=values(i))
    assert is_pinned(plan.submit(x=values(5)).result()["x"])
    waiting = [plan.submit(x=values(i)) for i in range(4)]
    assert all((w.result()["x"] == values(i)).all() for i, w in enumerate(waiting))


@pytest.mark.parametrize("nbytes", [results.LEAST - 4, results.MOST + 4])
def test_other_sizes_are_copied(machine: Machine, nbytes: int) -> None:
    machine("gpu")
    x = np.arange(nbytes // 4, dtype=np.float32)
    plan = gg.compile({"x": gg.input("x", ne=(len(x),))}, backends=["cuda"])
    result = plan.run(x=x)["x"]
    assert not is_pinned(result) and (result == x).all()
