"""Time to decode 4096 x 4096 weights: pytest benchmarks/test_quants.py"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pyggml import quants
from pyggml.dtypes import dtype


@pytest.mark.parametrize("name", ["f16", "q8_0", "q4_0", "q4_K", "q6_K", "iq4_nl"])
def test_decode(benchmark: Any, name: str) -> None:
    t = dtype(name)
    # Bytes below 0x7B keep f16 scales finite.
    raw = np.random.default_rng(0).integers(0, 0x7B, 4096 * t.row_bytes(4096), np.uint8)
    raw = (
        raw.view(np.float16).reshape(4096, -1) if name == "f16" else raw.reshape(4096, -1, t.nbytes)
    )
    out = np.empty((4096, 4096), np.float32)
    work = np.empty(quants.WORK_BYTES, np.uint8)
    benchmark(quants.decode, name, raw, out, work=work)
