"""The mutation test: for every wrong kernel, at least one test case must fail.

Each mutant replaces a correct function of the NumPy backend or of an op. Then cases of its op run
until one fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pyggml import backends, ops
from pyggml.parity.case import Case
from pyggml.parity.cases import cases
from pyggml.parity.running import restored, tested
from tests.mutants import layers, meanings, sparse, values
from tests.mutants.mutant import Mutant

MUTANTS = (*values.MUTANTS, *layers.MUTANTS, *meanings.MUTANTS, *sparse.MUTANTS)


@dataclass(frozen=True, slots=True)
class Fate:
    """A mutant, the case that killed it (empty if none did), and why that case failed."""

    op: str
    what: str
    killed: str
    why: str


def in_grid(op: str) -> Iterator[Case]:
    """The cases of an op in the small grid."""
    return (case for case in cases() if case.op == op)


def hunt(
    mutants: Iterable[Mutant] = MUTANTS, cases_of: Callable[[str], Iterable[Case]] = in_grid
) -> Iterator[Fate]:
    """Run each mutant with the cases of its op until one fails."""
    for mutant in mutants:
        with installed(mutant):
            outcomes = (tested(case, "numpy") for case in cases_of(mutant.op))
            failure = next((outcome for outcome in outcomes if outcome.status == "fail"), None)
        case, why = (failure.case, failure.why) if failure else ("", "")
        yield Fate(mutant.op, mutant.what, case, why)


@contextmanager
def installed(mutant: Mutant) -> Iterator[None]:
    """Inside the context, the mutant runs in place of the correct function."""
    op: Any = getattr(ops, mutant.op)
    device: Any = backends.get("numpy")
    with restored("numpy") as table:
        kernel, meaning = table.KERNELS[op], op.meaning
        try:
            if mutant.of == "kernel":
                table.KERNELS[op] = replace(kernel, run=partial(mutant.run, kernel.run))
            elif mutant.of == "meaning":
                op.meaning = partial(mutant.run, meaning)
            else:
                device.weight = partial(mutant.run, device.weight)
            yield
        finally:
            op.meaning = meaning
            vars(device).pop("weight", None)
