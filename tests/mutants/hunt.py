"""The mutation test: a grid that lets a wrong kernel live cannot be trusted.

Each mutant takes its place in the NumPy backend, or in an op, and the small grid's cases of its op
run until one fails.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pyggml import backends, ops
from pyggml.parity.cases import cases
from pyggml.parity.running import restored, tested
from tests.mutants import layers, meanings, values
from tests.mutants.mutant import Mutant

MUTANTS = (*values.MUTANTS, *layers.MUTANTS, *meanings.MUTANTS)


@dataclass(frozen=True, slots=True)
class Hunted:
    """A mutant and the case that killed it (empty: it lives), and how that case failed."""

    op: str
    what: str
    killed: str
    why: str


def hunt(only: Collection[str] | None = None) -> Iterator[Hunted]:
    """What becomes of each mutant (of these ops) in the small grid."""
    for mutant in MUTANTS:
        if only is not None and mutant.op not in only:
            continue
        with _instead(mutant):
            mine = (tested(case, "numpy") for case in cases() if case.op == mutant.op)
            found = next((outcome for outcome in mine if outcome.status == "fail"), None)
        case, why = (found.case, found.why) if found else ("", "")
        yield Hunted(mutant.op, mutant.what, case, why)


@contextmanager
def _instead(mutant: Mutant) -> Iterator[None]:
    """Inside the context the mutant is what runs."""
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
