"""The constants of rope kernels: rotating back negates the angle of every pair."""

from __future__ import annotations

from typing import Any

import pytest

import pyggml as gg
from pyggml.backends.cuda.rope import constants


def scales(**attrs: Any) -> list[float]:
    """The factor on each pair's angle, by the formula of rope.cuh."""
    pos = gg.input("pos", "i32", ne=(3,))
    node = gg.rope_ext(gg.input("a", ne=(64, 2, 3)), pos, n_dims=64, **attrs)
    r = constants(node.attrs)
    result = []
    for pair in range(32):
        kept = (1 - min(max((pair - r.low) / r.width, 0.0), 1.0)) * r.ext_factor
        scale = r.freq_scale
        result.append(scale * (1 - kept) + kept if r.ext_factor else scale)
    return result


@pytest.mark.parametrize("freq_scale", (1.0, 0.025, 1.4))
@pytest.mark.parametrize("ext_factor", (0.0, 0.75, 1.0))
def test_back_negates_every_angle(freq_scale: float, ext_factor: float) -> None:
    attrs = {"freq_scale": freq_scale, "ext_factor": ext_factor, "n_ctx_orig": 4096}
    forward, back = scales(**attrs), scales(**attrs, back=True)
    assert back == pytest.approx([-x for x in forward], rel=1e-14)
    varies = ext_factor != 0 and freq_scale != 1
    assert (len({round(x, 9) for x in forward}) > 2) == varies
