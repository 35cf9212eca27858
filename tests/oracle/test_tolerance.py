"""The comparison behind every parity test must find each kind of error."""

from __future__ import annotations

import numpy as np
import pytest

from pyggml.parity.oracle import ORACLE
from pyggml.parity.tolerance import CLASSES, OPS, bound, nmse, relative_error, within

REF = np.array([[3.0, 4.0], [0.0, -12.0]])


def test_nmse_and_relative_error_by_hand() -> None:
    assert nmse(REF + [[0, 0], [1.3, 0]], REF) == pytest.approx(1.3**2 / 169)
    assert relative_error(REF * 1.1, REF) == pytest.approx(0.1)
    zeros = np.zeros(3)
    assert nmse(zeros, zeros) == 0.0 and nmse(zeros + 1e-30, zeros) > 0.0
    assert nmse(np.ones(3), zeros) == np.inf


def test_the_worst_element_is_named() -> None:
    got = REF.copy()
    got[1, 0] = 0.5
    result = within(got, REF, 1e-3)
    assert not result and result.at == (1, 0) and (result.got, result.want) == (0.5, 0.0)
    assert "(1, 0)" in str(result) and "NOT within" in str(result)
    assert within(got, REF, 2e-3)


@pytest.mark.parametrize(
    ("got", "want"), [(np.nan, 1.0), (1.0, np.nan), (np.inf, 1.0), (np.inf, -np.inf), (0.0, np.inf)]
)
def test_a_nan_or_infinity_in_the_wrong_place_fails(got: float, want: float) -> None:
    a, ref = REF.copy(), REF.copy()
    a[0, 1], ref[0, 1] = got, want
    result = within(a, ref, 1e9)
    assert not result and result.at == (0, 1) and result.error == np.inf


def test_equal_nan_and_infinities_do_not_count() -> None:
    ref = np.array([np.nan, np.inf, -np.inf, 2.0])
    assert within(ref, ref, 0.0)
    assert not within(np.array([np.nan, np.inf, -np.inf, 2.1]), ref, 1e-3)


def test_another_shape_fails_and_empty_arrays_are_equal() -> None:
    assert not within(REF.T[:1], REF, 1e9)
    assert within(np.zeros((2, 0)), np.zeros((2, 0)), 0.0)


def test_bounds_are_for_ops_and_classes_that_exist() -> None:
    assert {op for op, _ in OPS} <= set(ORACLE)
    assert {numeric for _, numeric in OPS} <= {*CLASSES, "far"}
    assert bound("mul_mat") == CLASSES["f32"]
    assert bound("get_rows") == 0.0 and bound("get_rows", "f16") == CLASSES["f16"]
    with pytest.raises(KeyError):
        bound("mul_mat", "far")
