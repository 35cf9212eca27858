"""Which budgets are legal, which cut an attention, and which are refused."""

from __future__ import annotations

from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
from attentions import Latent, Leaves, Scores
from checks import MIB, Case, compiled, counts, least_of, loops

import pyggml as gg
from pyggml import backends, passes
from pyggml.graph import Graph
from pyggml.passes.cut import cut
from pyggml.passes.regions import regions
from pyggml.passes.work import Work

KINDS = [Scores(6, 2, 9, 61, mask=(3, 1)), Latent(4, 9, 211, cache="f16")]


@pytest.mark.parametrize("what", KINDS)
def test_what_the_graph_needs_leaves_it_whole_and_a_byte_less_does_not(what: Any) -> None:
    case = Case(what)
    whole = compiled(case.outputs, case.need)
    assert not loops(whole)
    assert str(whole.graph) == str(gg.compile(case.outputs).graph)
    assert loops(compiled(case.outputs, case.need - 1))


@pytest.mark.parametrize("what", KINDS)
def test_a_refusal_names_the_least_budget_that_works(what: Any) -> None:
    case = Case(what)
    least = least_of(case.outputs)
    case.check(least)
    for amb in (least - 1, least // 2, 1):
        with pytest.raises(gg.BudgetError, match=f"{least} bytes") as refusal:
            compiled(case.outputs, amb)
        assert refusal.value.least == least / MIB
        assert isinstance(refusal.value, MemoryError)


@pytest.mark.parametrize("amb", [0, -1, 0.0, -0.5, float("nan"), float("inf"), -float("inf")])
def test_budgets_that_are_not_above_zero_and_finite_are_refused(amb: float) -> None:
    with pytest.raises(gg.PyggmlError, match="amb="):
        gg.compile({"y": KINDS[0].build(Leaves())}, amb=amb)


@pytest.mark.parametrize("amb", [True, False, "64", b"1", [64], np.True_, 1j])
def test_budgets_that_are_not_numbers_are_refused(amb: Any) -> None:
    with pytest.raises(gg.PyggmlError, match="amb="):
        gg.compile({"y": KINDS[0].build(Leaves())}, amb=amb)


@pytest.mark.parametrize("number", [np.float64, np.float32, Fraction, float])
def test_fractions_of_a_mib_of_any_number_type(number: Any) -> None:
    case = Case(KINDS[0])
    amb = Fraction(case.need - 8, MIB)
    plan = gg.compile(case.outputs, amb=number(amb))
    assert plan.memory.amb == amb * MIB
    assert loops(plan)


def test_none_is_no_budget() -> None:
    case = Case(KINDS[0])
    plan = gg.compile(case.outputs, amb=None)
    assert not loops(plan)
    assert plan.memory.amb is None
    assert plan.memory.score_peak == case.need


def _need(work: Work, steps: tuple[tuple[Any, int], ...]) -> int | None:
    """What the only attention of a graph needs, cut like this."""
    (region,) = regions(work.graph)
    loop = cut(region, steps)
    if loop is None:
        return None
    graph = Graph({"y": loop.node})
    done = passes.finish(Work(graph, work.backends, scores=loop.counted))
    return done.placed.score_peak


@pytest.mark.parametrize(
    "what",
    [
        Scores(6, 2, 5, 61, mask=(3, 1), sinks=True),
        Scores(12, 3, 4, 31, mask=(4, 1), value="q8_0"),
        Scores(1, 1, 12, 97),
        Scores(4, 4, 6, 31, form="decode"),
        Scores(6, 6, 3, 31, form="add"),
    ],
)
def test_the_fewest_pieces_that_fit_and_no_smaller_least(what: Scores) -> None:
    """Compared with every way to cut: groups of heads first, rows only for single heads."""
    case = Case(what)
    work = Work(gg.compile(case.outputs).graph, (backends.get("numpy"),))
    (region,) = regions(work.graph)
    axes = region.ways[-1]
    sizes = {}
    first = [((axes[0], n),) for n in range(1, region.extent(axes[0]))]
    second = [((axes[0], 1), (axes[1], n)) for n in range(1, what.n_q)] if len(axes) > 1 else []
    for steps in first + second:
        need = _need(work, steps)
        if need is not None:
            sizes[steps] = need
    least = least_of(case.outputs)
    assert least == min(sizes.values())
    for amb in np.linspace(least, case.need - 1, 9).astype(int):
        (loop,) = loops(compiled(case.outputs, int(amb)))
        division = tuple(dim.count for dim in loop.dims)
        pieces = [
            tuple(-(-region.extent(axis) // n) for axis, n in steps)
            for steps, need in sizes.items()
            if need <= amb
        ]
        assert division == min(pieces, key=lambda p: (len(p), p)), (amb, pieces)


def test_pieces_are_even() -> None:
    """13 heads in three pieces are 5 + 4 + 4, never 6 + 6 + 1."""
    case = Case(Scores(13, 1, 9, 97))
    least = least_of(case.outputs)
    for amb in range(least, case.need, (case.need - least) // 12):
        (loop,) = loops(compiled(case.outputs, amb))
        dim = loop.dims[-1]
        assert dim.step == -(-dim.total // dim.count)


def test_the_bodies_are_at_most_two() -> None:
    for n_q, heads in product((1, 9, 40), (1, 7, 13)):
        case = Case(Scores(heads, 1, n_q, 31, mask=(heads, 1), max_bias=8.0))
        for amb in range(least_of(case.outputs), case.need, 1 + case.need // 9):
            plan = case.check(amb)
            assert all(len(loop.bodies()) <= 2 for loop in loops(plan))
            assert counts(plan)
