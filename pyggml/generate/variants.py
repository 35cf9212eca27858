"""What other options would change in the memory of a session."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from pyggml.errors import PyggmlError
from pyggml.generate.fit import Planner, Setup
from pyggml.page.document import Variant
from pyggml.page.variants import budgets, text_of_budget


@dataclass(frozen=True, slots=True)
class Change:
    """Other options, as the command line has them, and what plans a session with them."""

    text: str
    planner: Planner
    setup: Setup

    def plan(self) -> Variant:
        """Compile two plans. If that is impossible, the variant says why."""
        try:
            with warnings.catch_warnings(action="ignore"):
                return Variant(self.text, self.planner.memory(self.setup))
        except PyggmlError as error:
            return Variant(self.text, None, str(error))


def changes(planner: Planner, setup: Setup) -> Iterator[Change]:
    """The options as they are, then each that changes the memory: -amb, -ub, -mla and -fa."""
    options, forms = planner.model.options, planner.model.arch.mla_forms
    mla = f" -mla {options.mla}" if forms else ""
    amb, flash = text_of_budget(setup.amb), _on_off(options.flash)
    yield Change(f"{amb} -ub {setup.n_batch}{mla} -fa {flash}", planner, setup)
    for budget in budgets(planner.memory(setup)):
        yield Change(text_of_budget(budget), planner, replace(setup, amb=budget))
    for factor in (1 / 4, 1 / 2, 2, 4):
        n = int(setup.n_batch * factor)
        if 1 <= n <= setup.n_ctx:
            yield Change(f"-ub {n}", planner, replace(setup, n_batch=n))
    for form in forms:
        if form != options.mla:
            yield Change(f"-mla {form}", _with(planner, mla=form), setup)
    other = not options.flash
    yield Change(f"-fa {_on_off(other)}", _with(planner, flash=other), setup)


def variants(
    planner: Planner, setup: Setup, progress: Callable[[int, int], None] | None = None
) -> Iterator[Variant]:
    """The memory now, then that of each of `changes`.

    progress  called as progress(variants planned, all variants)
    """
    todo = list(changes(planner, setup))
    for done, change in enumerate(todo, 1):
        yield change.plan()
        if progress is not None:
            progress(done, len(todo))


def _with(planner: Planner, **options: Any) -> Planner:
    """A planner of the same model with other options."""
    model = copy.copy(planner.model)
    model.options = replace(model.options, **options)
    return Planner(model, planner.places, planner.pins, planner.host_layers)


def _on_off(value: bool) -> str:
    return "on" if value else "off"
