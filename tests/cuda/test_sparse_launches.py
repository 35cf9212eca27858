"""The launches of a layer with sparse attention: a change that adds one shows here."""

from __future__ import annotations

from collections import Counter

import pytest

from pyggml.backends.cuda.launch import Launch
from tools.launches import KINDS, layer_launches

#: Launches of a token at 8192 rows.
LAUNCHES = {"window": 36, "ratio_4": 51, "ratio_128": 41, "v32": 33, "glm_5": 33}


def names(kind: str) -> list[str]:
    records = [record for _, record in layer_launches(KINDS[kind])]
    return [r.name.split("<")[0] if isinstance(r, Launch) else type(r).__name__ for r in records]


@pytest.mark.parametrize("kind", LAUNCHES)
def test_launches_of_a_decode_step(kind: str) -> None:
    assert len(names(kind)) == LAUNCHES[kind]


def test_a_compressor_is_one_launch_besides_its_products() -> None:
    rest = {kind: Counter(names(kind)) for kind in ("window", "ratio_128")}
    more = rest["ratio_128"] - rest["window"]
    assert (more["compressed_row"], more["vec"]) == (1, 2)
    assert not {"softmax", "sum_rows", "binary", "unary"} & more.keys()
