"""The comparison that every budget test makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attentions import Latent, Leaves, Scores
from tracing import measured_peak

import pyggml as gg
from pyggml.loop import Loop
from pyggml.node import Node

MIB = 2**20


def error(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """Relative error; equal infinities (log-sum-exp of rows without keys) are no error."""
    same = found == wanted
    a, b = (np.where(same & ~np.isfinite(wanted), 0, x).astype(np.float64) for x in (found, wanted))
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def loops(plan: gg.Plan) -> list[Loop]:
    return [step.loop for step in plan.steps if step.loop is not None]


def counts(plan: gg.Plan) -> list[tuple[int, ...]]:
    """For each loop the number of pieces along its dimensions."""
    return [tuple(dim.count for dim in loop.dims) for loop in loops(plan)]


def pieces(plan: gg.Plan) -> int:
    """The pieces of all loops together."""
    return sum(int(np.prod(count)) for count in counts(plan))


def least_of(outputs: dict[str, Node]) -> int:
    """The least budget in bytes, as the refusal of a tiny one names it."""
    with pytest.raises(gg.BudgetError) as refused:
        gg.compile(outputs, amb=1e-9)
    least = refused.value.least * MIB
    assert least == int(least)
    assert repr(refused.value.least) in str(refused.value)
    return int(least)


def compiled(outputs: dict[str, Node], amb: int) -> gg.Plan:
    """Compiled for a budget of so many bytes."""
    return gg.compile(outputs, amb=amb / MIB)


#: Relative error that another order of f32 sums makes: 5e-7 in most graphs, 1.4e-6 in one, where
#: scores of 30 are sums of 48 products. A piece out of place makes 1e-2 and more.
ORDER = 3e-6


class Case:
    """An attention, its whole result, and plans of it under budgets."""

    def __init__(self, what: Scores | Latent, seed: int = 0) -> None:
        self.at = Leaves(seed)
        self.outputs = {"y": what.build(self.at)}
        whole = gg.compile(self.outputs)
        self.need, out = measured_peak(whole, self.at)
        assert self.need == whole.memory.score_peak == whole.memory.score_peak_plain
        self.wanted = out["y"]
        assert np.isfinite(np.where(self.wanted == -np.inf, 0, self.wanted)).all()

    def check(self, amb: int) -> gg.Plan:
        """Right numbers, within the budget by address, reported as measured."""
        plan = compiled(self.outputs, amb)
        peak, out = measured_peak(plan, self.at)
        assert peak <= amb
        assert peak == plan.memory.score_peak
        assert plan.memory.score_peak_plain == self.need
        assert error(out["y"], self.wanted) <= ORDER, (amb, [str(x) for x in loops(plan)])
        return plan

    def check_all(self) -> None:
        """Need, just below it, thirds, a bit above the least, the least; below it a refusal."""
        least = least_of(self.outputs)
        assert least <= self.need
        assert not loops(self.check(self.need))
        for amb in {self.need - 1, least + (self.need - least) // 3, least + 600, least}:
            if least <= amb < self.need:
                assert loops(self.check(amb))
        with pytest.raises(gg.BudgetError) as refused:
            compiled(self.outputs, least - 1)
        assert refused.value.least * MIB == least
