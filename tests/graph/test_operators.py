"""Arithmetic operators on nodes, and the element types that builders take."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.errors import DTypeError, ShapeError
from pyggml.node import line_of

X = gg.input("x", ne=(4, 3))
Y = gg.input("y", ne=(4,))
H = gg.input("h", np.float16, ne=(4, 3))
POS = gg.input("pos", np.dtype("int32"), ne=(3,))
VALUES = {
    "x": np.linspace(0.5, 2.0, 12, dtype=np.float32).reshape(3, 4),
    "y": np.array([1.0, -2.0, 4.0, 0.25], np.float32),
}
ARITHMETIC = (operator.add, operator.sub, operator.mul, operator.truediv)


@pytest.mark.parametrize("apply", ARITHMETIC, ids=lambda f: f.__name__)
@pytest.mark.parametrize("number", [3, 0.25, np.float32(1.5), np.int64(2), np.array(2.0)])
def test_operators_compute_what_numpy_computes(apply: Callable[..., Any], number: Any) -> None:
    nodes = {
        "both": apply(X, X),
        "large_small": apply(X, Y),
        "small_large": apply(Y, X),
        "number": apply(X, number),
        "reflected": apply(number, X),
        "minus": -X,
    }
    x, y = VALUES["x"], VALUES["y"]
    expected = {
        "both": apply(x, x),
        "large_small": apply(x, y),
        "small_large": apply(y, x),
        "number": apply(x, float(number)),
        "reflected": apply(float(number), x),
        "minus": -x,
    }
    results = gg.compile(nodes).run(VALUES)
    for key, values in expected.items():
        assert results[key].shape == values.shape
        np.testing.assert_allclose(results[key], values, rtol=1e-6, err_msg=key)


def test_operators_build_the_ops_of_ggml() -> None:
    assert X + Y is Y + X is gg.add(X, Y)
    assert X * Y is gg.mul(X, Y) and X - Y is gg.sub(X, Y) and X / Y is gg.div(X, Y)
    assert X * 2 is 2 * X is gg.scale(X, s=2.0)
    assert X + 1 is gg.scale(X, s=1.0, b=1.0) and 1 - X is gg.scale(X, s=-1.0, b=1.0)
    assert -X is gg.scale(X, s=-1.0) and X / 4 is gg.scale(X, s=0.25)
    assert (H * 2).dtype.name == "f16"
    assert line_of(X + 2.5).startswith(__file__)


def test_nodes_are_compared_by_identity() -> None:
    other = gg.input("x", ne=(4, 3))
    assert X == X and other != X and len({X, other}) == 2
    with pytest.raises(TypeError):
        X < Y  # type: ignore[operator]  # noqa: B015


@pytest.mark.parametrize("call", [lambda: X @ Y, lambda: X @ np.ones(3), lambda: np.ones(3) @ X])
def test_matmul_error_suggests_mul_mat(call: Callable[[], object]) -> None:
    hint = r"use mul_mat.*inner dimension is ne\[0\].*; at "
    with pytest.raises(TypeError, match=hint) as caught:
        call()
    assert __file__ in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: X + np.ones(3), DTypeError, "b must be a node, not ndarray; wrap arrays"),
        (lambda: np.ones(3) * X, DTypeError, "a must be a node, not ndarray; wrap arrays"),
        (lambda: X * True, DTypeError, "not bool"),
        (lambda: X - "1", DTypeError, "not str"),
        (lambda: X / 0, ShapeError, "division by zero"),
        (lambda: X * float("nan"), ShapeError, "NaN"),
        (lambda: X + gg.input("z", ne=(3,)), ShapeError, "b does not repeat into a"),
        (lambda: X + H, DTypeError, "cast one of them"),
        (lambda: POS * 2, DTypeError, "has type i32"),
    ],
)
def test_errors_of_operators(call: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value) and f"; at {__file__}:" in str(caught.value)


@pytest.mark.parametrize("dtype", ["f16", "F16", np.float16, np.dtype("f2"), H.dtype, H.dtype.name])
def test_builders_take_types_of_ggml_and_of_numpy(dtype: Any) -> None:
    assert gg.cast(X, dtype=dtype) is gg.cast(X, dtype="f16")
    assert gg.mul_mat(X, X, dtype=dtype) is gg.mul_mat(X, X, dtype="f16")
    for build in (gg.input, gg.state):
        assert build("n", dtype, ne=(4,)).dtype is H.dtype
    assert gg.constant([1.0, 2.0], dtype=dtype).dtype is H.dtype


@pytest.mark.parametrize("dtype", ["float16", "f17", np.complex64, bool, ">f4"])
def test_unknown_types_are_errors(dtype: Any) -> None:
    with pytest.raises(DTypeError, match="unknown type") as caught:
        gg.cast(X, dtype=dtype)
    assert ("did you mean 'f16'?" in str(caught.value)) == (dtype == "float16")


def test_composed_builders() -> None:
    q = gg.input("q", ne=(8, 2, 3))
    assert gg.swiglu(X, X) is gg.glu(X, X, act="silu")
    assert gg.swiglu(X) is gg.glu(X)
    assert gg.rope(q, POS) is gg.rope_ext(q, POS, n_dims=8)
    assert gg.rope(q, POS, n_dims=4, mode="neox", freq_base=1e6) is gg.rope_ext(
        q, POS, n_dims=4, mode="neox", freq_base=1e6
    )


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda x: x**2, r"sqr\(x\)"),
        (lambda x: 2**x, r"nodes have no powers"),
        (lambda x: x < x, r" < .*no op compares"),
        (lambda x: x >= 1, r" >= float|>= int"),
        (lambda x: x[0], r"view\(node, .*get_rows"),
        (lambda x: x[1:, :2], r"view\(node, .*get_rows"),
    ],
)
def test_what_numpy_has_and_nodes_have_not(build: Any, why: str) -> None:
    with pytest.raises((gg.DTypeError, gg.UnknownNameError), match=why):
        build(gg.input("x", ne=(4, 2)))
