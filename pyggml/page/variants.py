"""What other attention budgets would change in a plan's memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from math import floor, log2
from typing import TYPE_CHECKING

from pyggml.errors import BudgetError
from pyggml.page.document import Variant
from pyggml.runtime.memory import Memory

if TYPE_CHECKING:
    from pyggml.runtime.plan import Plan

#: How many budgets a page compares.
MOST = 3


def budgets(memory: Memory) -> list[float | None]:
    """Budgets in MiB worth comparing: powers of two below the scores' peak without a budget, and
    none. Without those that `memory` already has."""
    plain = memory.score_peak_plain / 2**20
    if not plain:
        return []
    largest = floor(log2(plain * 0.75))
    sizes = [2.0 ** (largest - i) for i in range(MOST)]
    now = None if memory.amb is None else memory.amb / 2**20
    return [size for size in (None, *sizes) if size != now]


def text_of_budget(amb: float | None) -> str:
    """As the command line has it."""
    return "without -amb" if amb is None else f"-amb {amb:g}"


def by_budget(plan: Plan) -> Iterator[Variant]:
    """The plan's memory now, then with other budgets."""
    request, memory = plan._request, plan.memory
    now = None if memory.amb is None else memory.amb / 2**20
    yield Variant(text_of_budget(now), memory)
    for amb in budgets(memory):
        work = replace(request.work, amb=None if amb is None else amb * 2**20)
        try:
            with warnings.catch_warnings(action="ignore"):
                other = replace(request, work=work).plan(plan.store).memory
        except BudgetError as error:
            yield Variant(text_of_budget(amb), None, str(error))
        else:
            yield Variant(text_of_budget(amb), other)
