"""What tests on a GPU compare and expect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import pyggml as gg


def refused(kind: type[Exception], call: Callable[[], object], *words: str) -> None:
    """The call raises this error, whose text has these words."""
    with pytest.raises(kind) as caught:
        call()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"nothing of {missing} in: {caught.value}"


def apart(values: Any, wanted: Any) -> float:
    """The relative error of all values together; infinity where others are not finite."""
    values, wanted = (np.asarray(x, np.float64) for x in (values, wanted))
    finite = np.isfinite(wanted)
    if not np.array_equal(finite, np.isfinite(values)):  # a mask has -inf
        return float("inf")
    norm = np.linalg.norm(wanted[finite])
    return float(np.linalg.norm(values[finite] - wanted[finite]) / max(norm, 1e-30))


def same_as_numpy(
    outputs: dict[str, gg.Node], given: dict[str, Any], most: float, **options: Any
) -> None:
    """The graph on CUDA against NumPy: by launches, captured, replayed."""
    host = gg.compile(outputs)
    plan = gg.compile(outputs, **{"backends": ["cuda", "numpy"], **options})
    for turn in range(3):  # each goes on from the states of the last
        wanted, values = host.run(given), plan.run(given)
        for key, want in wanted.items():
            error = apart(values[key], want)
            bound = 0 if want.dtype.kind == "i" else most
            assert error <= bound, f"{key}, run {turn}: relative error {error:.2e}\n{plan}"


def equal(values: Any, wanted: Any) -> None:
    """Bit by bit, and of the same shape."""
    values, wanted = np.asarray(values), np.asarray(wanted)
    assert values.shape == wanted.shape
    assert values.tobytes() == wanted.astype(values.dtype).tobytes(), (
        f"{values.ravel()[:3]} for {wanted.ravel()[:3]}"
    )


def rows_apart(what: str, values: Any, wanted: Any, most: float) -> None:
    """The relative error of each row."""
    wide = np.asarray(wanted, np.float64)
    errors: Sequence[float] = np.linalg.norm(values - wide, axis=-1) / np.linalg.norm(wide, axis=-1)
    assert (np.asarray(errors) <= most).all(), f"{what}: relative errors {errors}"
