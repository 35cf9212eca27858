"""Attention in blocks of keys: merge_lse, and the running sum lse_sum with lse_finish."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as gg
from pyggml.errors import DTypeError, ShapeError
from pyggml.ops import lse_finish, lse_sum
from pyggml.parity import oracle
from pyggml.parity.tolerance import within


@pytest.mark.parametrize("blocks", [1, 2, 40])
def test_parts_of_an_attention(blocks: int) -> None:
    rng = np.random.default_rng(blocks)
    parts = [rng.standard_normal((3, 2, 9)).astype(np.float32) for _ in range(blocks)]
    for i, part in enumerate(parts):
        part[..., -1] *= 30.0  # weights differ by many orders of magnitude
        part[0, 0, -1], part[0, 0, :-1] = -np.inf, 0.0  # a row without keys in all parts
        if i % 2 == 0:
            part[1, 1, -1], part[1, 1, :-1] = -np.inf, 0.0
    nodes = [gg.input(f"p{i}", "f32", ne=(9, 2, 3)) for i in range(blocks)]
    total, merged = lse_sum(nodes[0]), nodes[0]
    want = parts[0].astype(np.float64)[None]
    for node, part in zip(nodes[1:], parts[1:]):
        total, merged = lse_sum(node, total), gg.merge_lse(merged, node)
        want = oracle.run("merge_lse", [want, part.astype(np.float64)[None]])
    plan = gg.compile(
        {"sum": lse_finish(total, lse=True), "merged": merged, "y": lse_finish(total)}
    )
    got = plan.run({f"p{i}": part for i, part in enumerate(parts)})
    assert within(got["sum"], want[0], 1e-10)
    assert within(got["merged"], want[0], 1e-10)
    np.testing.assert_array_equal(got["y"], got["sum"][..., :-1])
    assert got["sum"][0, 0, -1] == -np.inf and not got["y"][0, 0].any()


def test_errors() -> None:
    a = gg.input("a", "f32", ne=(9, 2, 3))
    with pytest.raises(ShapeError, match="a's size with rows longer by one"):
        lse_sum(a, a)
    with pytest.raises(DTypeError, match="a has type f16"):
        lse_sum(gg.cast(a, dtype="f16"))
    with pytest.raises(ShapeError, match="d_v values of S"):
        lse_finish(gg.view(a, ne=(2, 2)))
