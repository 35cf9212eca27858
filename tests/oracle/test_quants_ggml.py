"""Encoders against ggml itself (needs ggml-python: `make test-oracle`)."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml import quants

pytest.importorskip("ggml", reason="needs ggml-python (the extra 'oracle')")

from tests.fixtures.make_iq4_nl import quantize, samples


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["iq4_nl", "q8_0"])
def test_blocks_equal_ggml(name: str) -> None:
    x = samples(seed=5, ne0=32768)
    theirs, ours = quantize(name, x), quants.encode(name, x)
    equal = (theirs == ours).all(axis=-1)
    assert equal.mean() >= 0.999
    for row, a, b in zip(x, theirs, ours, strict=True):
        error_a, error_b = (np.linalg.norm(quants.decode(name, raw) - row) for raw in (a, b))
        assert error_b <= 1.001 * error_a
