"""The float64 oracle against what real ggml computed (tests/fixtures/ggml_*.npz)."""

from __future__ import annotations

import numpy as np
import pytest
from gguf.quants import quantize

from pyggml.parity.oracle import ORACLE, run
from pyggml.parity.tolerance import within
from tests.fixtures.case import HERE, Case, gguf_type, load

FAMILIES = sorted(path.stem for path in HERE.glob("ggml_*.npz"))
CASES = [case for family in FAMILIES for case in load(family)]

#: Ops that ggml does not have, or not under a form that it can be asked for: tested by hand in
#: test_oracle_hand.py.
WITHOUT_FIXTURE = {"reshape", "view", "permute", "transpose", "soft_max", "fill"} | {
    "causal_mask",
    "merge_lse",
    "grouped_topk",
}


@pytest.mark.parametrize("case", [c for c in CASES if c.op in ORACLE], ids=str)
def test_oracle_agrees_with_ggml(case: Case) -> None:
    assert case.out is not None and case.why
    result = within(case.out.values(), run(case.op, case.values(), **case.attrs), case.bound)
    assert result, f"{case}: {result}; ggml may differ because: {case.why}"


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "decode"], ids=str)
def test_blocks_are_decoded_as_ggml_does(case: Case) -> None:
    source = case.sources[0]
    assert source is not None and case.out is not None
    np.testing.assert_array_equal(source.values(), case.out.array)


@pytest.mark.parametrize("case", [c for c in CASES if c.op == "encode"], ids=str)
def test_gguf_encodes_the_same_bytes(case: Case) -> None:
    source = case.sources[0]
    assert source is not None and case.out is not None
    raw = quantize(source.array.reshape(-1, source.ne[0]), gguf_type(case.attrs["dtype"]))
    want = np.ascontiguousarray(case.out.array)
    np.testing.assert_array_equal(raw.reshape(-1).view(np.uint8), want.reshape(-1).view(np.uint8))


def test_every_op_has_a_fixture_or_stands_among_those_tested_by_hand() -> None:
    assert set(ORACLE) - {case.op for case in CASES} == WITHOUT_FIXTURE
