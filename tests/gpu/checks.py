"""Comparisons for the tests on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import pyggml as gg


def refused(error: type[Exception], call: Callable[[], object], *words: str) -> None:
    """Assert that the call raises this error, with these words in its message."""
    with pytest.raises(error) as raised:
        call()
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"no {missing} in: {raised.value}"


def apart(values: Any, expected: Any) -> float:
    """The relative error of all values together; infinity if not the same ones are finite."""
    values, expected = (np.asarray(x, np.float64) for x in (values, expected))
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(values)):  # a mask has -inf
        return float("inf")
    norm = np.linalg.norm(expected[finite])
    return float(np.linalg.norm(values[finite] - expected[finite]) / max(norm, 1e-30))


def same_as_numpy(
    outputs: dict[str, gg.Node], inputs: dict[str, Any], most: float, **options: Any
) -> None:
    """Assert that the graph gives NumPy's results on CUDA: launched, captured and replayed."""
    host = gg.compile(outputs)
    plan = gg.compile(outputs, **{"backends": ["cuda", "numpy"], **options})
    for turn in range(3):  # each run continues with the states of the last
        expected, values = host.run(inputs), plan.run(inputs)
        for key, array in expected.items():
            error = apart(values[key], array)
            bound = 0 if array.dtype.kind == "i" else most
            assert error <= bound, f"{key}, run {turn}: relative error {error:.2e}\n{plan}"


def equal(values: Any, expected: Any) -> None:
    """Assert equal bits and shapes."""
    values, expected = np.asarray(values), np.asarray(expected)
    assert values.shape == expected.shape
    assert values.tobytes() == expected.astype(values.dtype).tobytes(), (
        f"{values.ravel()[:3]}, expected {expected.ravel()[:3]}"
    )


def rows_apart(what: str, values: Any, expected: Any, most: float) -> None:
    """Assert that the relative error of each row is at most `most`."""
    wide = np.asarray(expected, np.float64)
    errors: Sequence[float] = np.linalg.norm(values - wide, axis=-1) / np.linalg.norm(wide, axis=-1)
    assert (np.asarray(errors) <= most).all(), f"{what}: relative errors {errors}"
