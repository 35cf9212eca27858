"""What every budget test compares: values, peaks and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from attentions import Latent, Leaves, Scores
from tracing import measured_peak

import pyggml as gg
from pyggml.backends.step import LoopStep
from pyggml.loop import Loop
from pyggml.node import Node

MIB = 2**20


def error(result: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """The relative error, or that relative to 1e-9 for smaller results: a sink that is 25 above all
    scores leaves 1e-10, and a score's rounding error counts 25 times in it. Equal infinities
    (log-sum-exp of rows without keys) do not count."""
    same = (result == expected) & ~np.isfinite(expected)
    a, b = (np.where(same, 0, x).astype(np.float64) for x in (result, expected))
    size = float(np.linalg.norm(b))
    return float(np.linalg.norm(a - b)) / (max(size, 1e-9) if size else 1.0)


def loops(plan: gg.Plan) -> list[Loop]:
    return [step.loop for step in plan.steps if isinstance(step, LoopStep)]


def counts(plan: gg.Plan) -> list[tuple[int, ...]]:
    """The number of pieces along each dimension, for each loop."""
    return [tuple(dim.count for dim in loop.dims) for loop in loops(plan)]


def pieces(plan: gg.Plan) -> int:
    """The pieces of all loops together."""
    return sum(int(np.prod(count)) for count in counts(plan))


def least_of(outputs: dict[str, Node]) -> int:
    """The least budget in bytes, from the error for a tiny one."""
    with pytest.raises(gg.BudgetError) as refusal:
        gg.compile(outputs, amb=1e-9)
    least = refusal.value.least * MIB
    assert least == int(least)
    assert repr(refusal.value.least) in str(refusal.value)
    return int(least)


def compiled(outputs: dict[str, Node], amb: int) -> gg.Plan:
    """The plan for a budget in bytes."""
    return gg.compile(outputs, amb=amb / MIB)


#: Relative error from another order of f32 sums: 5e-7 in most graphs, 1.4e-6 in one whose scores of
#: 30 are sums of 48 products. A piece in the wrong place causes 1e-2 and more.
ORDER = 3e-6


class Case:
    """An attention, its result without a budget, and its plans under budgets."""

    def __init__(self, what: Scores | Latent, seed: int = 0) -> None:
        self.at = Leaves(seed)
        self.outputs = {"y": what.build(self.at)}
        whole = gg.compile(self.outputs)
        self.need, out = measured_peak(whole, self.at)
        assert self.need == whole.memory.score_peak == whole.memory.score_peak_plain
        self.expected = out["y"]
        assert np.isfinite(np.where(self.expected == -np.inf, 0, self.expected)).all()

    def check(self, amb: int) -> gg.Plan:
        """Check values, and by addresses that the plan fits and reports what it needs."""
        plan = compiled(self.outputs, amb)
        peak, out = measured_peak(plan, self.at)
        assert peak <= amb
        assert peak == plan.memory.score_peak
        assert plan.memory.score_peak_plain == self.need
        assert error(out["y"], self.expected) <= ORDER, (amb, [str(x) for x in loops(plan)])
        return plan

    def check_all(self) -> None:
        """Check budgets from what the graph needs to the least, and a refusal below it."""
        least = least_of(self.outputs)
        assert least <= self.need
        assert not loops(self.check(self.need))
        for amb in {self.need - 1, least + (self.need - least) // 3, least + 600, least}:
            if least <= amb < self.need:
                assert loops(self.check(amb))
        with pytest.raises(gg.BudgetError) as refusal:
            compiled(self.outputs, least - 1)
        assert refusal.value.least * MIB == least


# -- several attentions -----------------------------------------------------------------------


def layers(*attentions: Scores | Latent) -> tuple[dict[str, Node], Leaves]:
    """Attentions that run one after another; the output is the sum of their squared results."""
    at = Leaves()
    total = None
    for i, attention in enumerate(attentions):
        at.prefix = f"l{i}."
        result = gg.sum_rows(gg.sqr(flat(attention.build(at))))
        total = result if total is None else gg.add(total, result)
    assert total is not None
    return {"y": total}, at


def flat(node: Node) -> Node:
    return gg.reshape(node, ne=(node.spec.elements,))


def check_together(outputs: dict[str, Node], at: Leaves, parts: int = 6) -> list[gg.Plan]:
    """Check budgets from the least to what the graph needs, and a refusal below the least."""
    whole = gg.compile(outputs)
    need, expected = measured_peak(whole, at)
    assert need == whole.memory.score_peak
    least = least_of(outputs)
    plans = []
    for amb in [*range(least, need, max(1, (need - least) // parts)), need]:
        plan = compiled(outputs, amb)
        peak, out = measured_peak(plan, at)
        assert peak == plan.memory.score_peak <= amb
        for key, value in expected.items():
            assert error(out[key], value) <= 1e-6
        plans.append(plan)
    with pytest.raises(gg.BudgetError) as refusal:
        compiled(outputs, least - 1)
    assert refusal.value.least * MIB == least
    assert not loops(plans[-1])
    return plans
