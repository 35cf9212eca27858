"""Results of real ggml (tests/fixtures/ggml_*.npz) against the same ops run by plans."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import ops
from pyggml.dtypes import dtype
from pyggml.node import Node
from pyggml.parity.tolerance import within
from tests.fixtures.case import HERE, Case, Source, load

CASES = [
    case
    for path in sorted(HERE.glob("ggml_*.npz"))
    for case in load(path.stem)
    if hasattr(ops, case.op)
]


def leaf(source: Source, name: str, state: bool, values: dict[str, Any]) -> Node:
    """The source in the fixture's layout: contiguous, rows inside wider rows, or permuted."""
    type_, ne, array = dtype(source.type), source.ne, source.array
    make = gg.state if state else gg.input
    if source.axes is not None:
        axes = source.axes
        values[name] = np.ascontiguousarray(array.transpose([3 - axes[3 - i] for i in range(4)]))
        return gg.permute(make(name, type_, ne=[ne[a] for a in axes]), axes=axes)
    if source.wide:
        wide = np.zeros((*array.shape[:-1], source.wide * array.shape[-1] // ne[0]), array.dtype)
        wide[..., : array.shape[-1]] = array
        values[name] = wide
        return gg.view(make(name, type_, ne=(source.wide, *ne[1:])), ne=ne)
    values[name] = array
    return make(name, type_, ne=ne)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_ggml(case: Case) -> None:
    assert case.out is not None
    op: Any = getattr(ops, case.op)
    values: dict[str, Any] = {}
    sources: list[Node | None] = []
    for number, source in enumerate(case.sources):
        if source is None:
            sources.append(None)
        elif source.of is not None:
            whole = sources[source.of]
            assert whole is not None
            sources.append(gg.view(whole, ne=source.ne, start=(source.start,)))
        else:
            is_state = number == getattr(op, "writes", None)
            sources.append(leaf(source, f"s{number}", is_state, values))
    node = op(*sources, **case.attrs)
    plan = gg.compile({"y": node}).bind()
    for state in set(values) - set(plan.inputs):
        plan.store.write(state, values.pop(state))
    y = plan.run(values)["y"]
    want = case.out.values()
    assert math.prod(y.shape) == want.size
    # ggml's gelu and f16 sums are less accurate than ours.
    result = within(y.reshape(want.shape), want, case.bound)
    assert result, f"{result}; ggml may differ because: {case.why}"


def test_there_are_many() -> None:
    assert len(CASES) > 150 and len({case.op for case in CASES}) > 30
