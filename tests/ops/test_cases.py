"""Every op through a plan against the float64 oracle, over the table of cases."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml import compile, ops
from pyggml.parity.case import Case, build, check
from pyggml.parity.cases import cases
from pyggml.quants import ENCODABLE


@pytest.mark.parametrize("case", cases(), ids=str)
def test_case(case: Case) -> None:
    result = check(case)
    assert result, str(result)


def test_every_op_has_cases() -> None:
    without = {"whole", "lse_sum", "lse_finish"}  # test_states.py and test_lse.py
    assert set(ops.ALL) - {case.op for case in cases()} == without


def test_a_case_is_its_text() -> None:
    for case in cases():
        assert str(Case.parse(str(case))) == str(case)


@pytest.mark.parametrize("case", [c for c in cases() if c.op in ("set_rows", "cpy")], ids=str)
def test_a_write_leaves_the_rest_of_its_state(case: Case) -> None:
    built = build(case)
    plan = compile({"y": built.node}).bind()
    ((name, before),) = built.states.items()

    def after(start: np.ndarray) -> np.ndarray:
        plan.store.write(name, start)
        plan.run(built.inputs)
        return plan.store.read(name, raw=True).reshape(before.shape).view(np.uint8)

    # What the op writes is the same over two different contents; what it does not write stays.
    first, second = after(before), after((~before.view(np.uint8)).view(before.dtype))
    written = first == second
    untouched = before.view(np.uint8) == first
    assert written.any()
    assert (written | untouched).all()


def test_encodable_types_are_all_written() -> None:
    written = {
        case.sources[0].type for case in cases() if case.op == "set_rows" and case.sources[0]
    }
    written |= {str(case.attrs["type"]) for case in cases() if case.op == "cast"}
    assert written >= ENCODABLE
