"""Causal masks of rows that stand for several positions each: which positions they take."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as gg

N_KV, STRIDE = 7, 4
#: The last position that sees all rows and no more.
LAST = STRIDE * (N_KV + 1) - 2


def plan(backend: str, computed: bool) -> gg.Plan:
    pos = gg.input("pos", "i32", ne=(2,))
    seen = gg.add(pos, pos) if computed else pos  # a check of the input, or in the kernel
    return gg.compile({"y": gg.causal_mask(seen, n_kv=N_KV, stride=STRIDE)}, backends=[backend])


@pytest.mark.parametrize("backend", ("numpy", "cpu", "null:0"))
@pytest.mark.parametrize("computed", (False, True))
def test_positions_past_the_last_row_are_errors(backend: str, computed: bool) -> None:
    if backend == "cpu":
        pytest.importorskip("numba")
    runs, factor = plan(backend, computed), 2 if computed else 1
    seen = (runs.run(pos=[2, LAST // factor])["y"] == 0).sum(axis=1)
    assert seen.tolist() == [(2 * factor + 1) // STRIDE, N_KV]
    with pytest.raises(gg.IdError):
        runs.run(pos=[2, LAST // factor + 1])


def test_a_strided_mask_is_that_of_the_rows_ends() -> None:
    pos = gg.input("pos", "i32", ne=(5,))
    ends = gg.input("ends", "i32", ne=(N_KV,))
    y = {
        "a": gg.causal_mask(pos, n_kv=N_KV, stride=STRIDE),
        "b": gg.causal_mask(pos, ends, n_kv=N_KV),
    }
    outputs = gg.compile(y).run(
        pos=[-1, 3, 4, 15, LAST], ends=STRIDE * np.arange(1, N_KV + 1, dtype="i4")
    )
    np.testing.assert_array_equal(outputs["a"], outputs["b"])
