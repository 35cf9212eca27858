"""The float64 oracle against stored results of ggml (tests/fixtures/ggml_*.npz)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from gguf.quants import quantize

from pyggml import ops
from pyggml.parity.oracle import ORACLE, run
from pyggml.parity.tolerance import within
from tests.fixtures.case import HERE, Case, gguf_type, load

FAMILIES = sorted(path.stem for path in HERE.glob("ggml_*.npz"))
CASES = [case for family in FAMILIES for case in load(family)]


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


def test_every_op_has_a_fixture_or_a_test_by_hand() -> None:
    """Unary ops need neither: in the oracle each is one line of NumPy."""
    unary = {op.name for op in ops.elementwise.UNARY}
    by_hand = set(
        re.findall(r'run\("(\w+)"', Path(__file__).with_name("test_oracle_hand.py").read_text())
    )
    assert set(ORACLE) <= {case.op for case in CASES} | by_hand | unary
