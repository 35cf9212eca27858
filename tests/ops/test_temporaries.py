"""No step allocates a temporary of 64 KiB or more outside its declared scratch."""

from __future__ import annotations

import tracemalloc

import pytest

from pyggml import compile
from pyggml.node import Node
from pyggml.parity.case import Case, build
from pyggml.parity.cases import cases, large_cases

#: Most bytes allocated at once during a step: two of NumPy's 32 KiB cast buffers and a few small
#: objects. An array of an operand's size has more than 128 KiB in every case here.
LIMIT = 80 * 1024

CASES = large_cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_large_temporary(case: Case) -> None:
    built = build(case)
    plan = compile({"y": built.node}).bind()
    for name, array in built.states.items():
        plan.store.write(name, array)
    plan.run(built.inputs)  # fills tables that are computed on first use
    runners = plan.runners  # of one split, or of none
    peaks: dict[Node, int] = {}
    tracemalloc.start()
    try:
        for i, step in enumerate(plan.steps):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            runners[0].run_step(i)
            peaks[step.node] = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert max(peaks.values(), default=0) < LIMIT, peaks


def test_every_op_is_measured() -> None:
    assert {case.op for case in CASES} == {case.op for case in cases()}
