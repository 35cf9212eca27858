"""Compile the plans of a graph under any budget, and check what budgets promise."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from math import prod

from pyggml.errors import BudgetError
from pyggml.loop import loop_of
from pyggml.parity.graph_case import Builder, PlanText, graph_of
from pyggml.runtime.compile import compile
from pyggml.runtime.plan import Plan
from pyggml.runtime.store import Store

MIB = 2**20
#: Budgets tried between the least and what the graph needs without one.
LADDER = 6


class Compiler:
    """Compiles a plan under any budget, and checks what budgets promise."""

    def __init__(self, builder: Builder, text: PlanText, backend: str, store: Store) -> None:
        self.graph = graph_of(builder, text)
        pins = dict(pin.split("=") for pin in text.words("pins"))
        self.pins = {f"^{name}$": place for name, place in pins.items()}
        self.places = list(text.words("on")) or [backend]
        self.share, self.store = text.attrs.get("amb"), store
        self.need = self._compile(None, Store()).memory.score_peak
        self.least = 0
        self.exempt = False  # whether an attention is outside the budget, with a warning

    def _compile(self, amb: float | None, store: Store) -> Plan:
        graph = self.graph
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            plan = compile(
                graph.outputs, updates=graph.updates, backends=self.places, pins=self.pins,
                amb=amb, store=store,
            )  # fmt: skip
        self.exempt = any("outside the budget" in str(w.message) for w in caught)
        return plan

    def under(self, nbytes: int) -> Plan | None:
        """The plan under a budget, in a new store; None if the budget is refused."""
        try:
            return self._compile(nbytes / MIB, Store())
        except BudgetError:
            return None

    def plan(self) -> Plan:
        """The plan to run."""
        if self.share is None:
            return self._compile(None, self.store)
        least = self.least or 1
        amb = least + int(self.share * max(0, self.need - least))
        return self._compile(amb / MIB, self.store)

    def promises(self) -> Iterator[str]:
        """Check that the least budget is the least, that plans keep to their budgets, and that
        larger budgets never give more pieces.
        """
        if self.share is None:
            return
        try:
            peak = self._compile(1 / MIB, Store()).memory.score_peak
            if peak > 1 and not self.exempt:
                yield f"a budget of 1 byte gives a peak of {peak}"
            return  # no scores for the budget to bound
        except BudgetError as error:
            self.least = round(error.least * MIB)
        for below in (self.least - 1, int(0.98 * self.least), int(0.9 * self.least)):
            if 0 < below < self.least and self.under(below) is not None:
                yield f"BudgetError.least is {self.least} bytes, but {below} bytes compile"
        steps = range(LADDER + 1)
        ladder = sorted({self.least + (self.need - self.least) * i // LADDER for i in steps})
        fewest, at = 0, 0
        for nbytes in ladder:
            plan = self.under(nbytes)
            if plan is None:
                yield f"{nbytes} bytes are refused, although BudgetError.least is {self.least}"
                return
            if plan.memory.score_peak > nbytes and not self.exempt:
                yield f"a budget of {nbytes} bytes gives a peak of {plan.memory.score_peak}"
            count = pieces(plan)
            if fewest and count > fewest:
                yield f"{fewest} pieces at {at} bytes, {count} at {nbytes}"
            if not fewest or count < fewest:
                fewest, at = count, nbytes


def pieces(plan: Plan) -> int:
    """The number of pieces of all loops of a plan; 1 for a plan without loops."""
    loops = [loop_of(node) for node in plan.graph.nodes]
    return sum(prod(dim.count for dim in loop.dims) for loop in loops if loop is not None) or 1
