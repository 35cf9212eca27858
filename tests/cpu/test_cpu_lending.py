"""The cpu backend lends weights to a GPU from fewer rows on than NumPy."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as gg


@pytest.mark.parametrize(
    ("host", "tokens", "place"),
    [("cpu", 7, "cpu"), ("cpu", 8, "cuda:0"), ("numpy", 31, "numpy"), ("numpy", 32, "cuda:0")],
)
def test_from_how_many_rows_a_gpu_borrows(host: str, tokens: int, place: str) -> None:
    w = gg.constant(np.zeros((24, 64), np.float32), dtype="q8_0", name="w")
    y = gg.mul_mat(w, gg.input("x", ne=(64, tokens)))
    plan = gg.compile({"y": y}, backends=["cuda:0", host], pins={"^w$": host})
    assert plan.place_of(plan.graph.outputs["y"]) == place
