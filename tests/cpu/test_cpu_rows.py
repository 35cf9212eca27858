"""Small ops: the bytes that NumPy's kernels give, for numbers that are not finite, ties, any sizes
and strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml.backends.cpu.sort import MOST_K, SORTED_ROWS
from pyggml.backends.cpu.table import CpuStep
from pyggml.node import Node

Array = NDArray[Any]
Build = Callable[..., Node]


def numbers(*shape: int, type_: str = "f32") -> Array:
    """Random numbers, some of them equal, with both zeros, infinities and NaN."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal(shape).astype(np.float32).round(1)
    for value in (0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan):
        x[rng.random(shape) < 0.02] = value
    return x.astype(np.float16 if type_ == "f16" else np.float32)


def outputs(backend: str, build: Build, arrays: dict[str, Array]) -> Array:
    types = {"float32": "f32", "float16": "f16", "int32": "i32", "int64": "i64"}
    nodes = [gg.input(name, types[x.dtype.name], ne=x.shape[::-1]) for name, x in arrays.items()]
    plan = gg.compile({"y": build(*nodes)}, backends=[backend])
    assert backend == "numpy" or all(isinstance(step, CpuStep) for step in plan.steps)
    with np.errstate(all="ignore"):
        result: Array = plan.run(arrays)["y"]
    return result


def check(build: Build, *arrays: Array, signs: bool = False) -> None:
    """Both backends give equal numbers, NaN where the other has NaN; with `signs`, those of 0
    too."""
    inputs = {f"x{i}": array for i, array in enumerate(arrays)}
    got, want = (outputs(backend, build, inputs) for backend in ("cpu", "numpy"))
    np.testing.assert_array_equal(got, want)
    if signs:
        zeros = want == 0
        np.testing.assert_array_equal(np.signbit(got[zeros]), np.signbit(want[zeros]))


BINARY: list[Build] = [gg.add, gg.sub, gg.mul, gg.div]


@pytest.mark.parametrize("type_", ["f32", "f16"])
@pytest.mark.parametrize("ne", [(33, 4, 6, 2), (1, 2, 3, 2), (11, 4, 2, 1), (33, 1, 3, 1)])
def test_b_repeats_into_a(type_: str, ne: tuple[int, ...]) -> None:
    for op in BINARY:
        check(op, numbers(2, 6, 4, 33, type_=type_), numbers(*ne[::-1], type_=type_))


@pytest.mark.parametrize("type_", ["f32", "f16"])
def test_rows_longer_than_a_piece(type_: str) -> None:
    """A thread takes 4096 elements; a row of b that repeats may be longer."""
    check(gg.add, numbers(3, 10001, type_=type_), numbers(3, 10001, type_=type_))
    check(gg.mul, numbers(3, 10002, type_=type_), numbers(1, 5001, type_=type_))
    check(gg.div, numbers(3, 10001, type_=type_), numbers(3, 1, type_=type_))


@pytest.mark.parametrize("type_", ["f32", "f16"])
def test_functions_of_one_number(type_: str) -> None:
    x = numbers(7, 301, type_=type_)
    check(lambda a: gg.scale(a, s=-1.7), x, signs=True)
    check(lambda a: gg.scale(a, s=0.3, b=0.1), x)
    check(lambda a: gg.clamp(a, min=-0.5, max=np.inf), x)
    check(lambda a: gg.clamp(a, min=-np.inf, max=0.25), x)
    check(lambda a: gg.fill(a, value=-3.5), x)
    check(gg.sqr, x)
    check(gg.sqrt, x)
    check(gg.relu, x)


def test_functions_of_libraries() -> None:
    """Within a few units of the last place, also where 1 - 2 / (e^2x + 1) would cancel."""
    x = np.concatenate([np.float32(10.0) ** np.linspace(-30, 1.5, 999, dtype=np.float32), [0, 90]])
    x = np.stack([x, -x]).astype(np.float32)
    for op, function in (gg.tanh, np.tanh), (gg.log, np.log), (gg.exp, np.exp):
        got = outputs("cpu", op, {"x": x})
        with np.errstate(all="ignore"):
            want = function(x.astype(np.float64)).astype(np.float32)
        np.testing.assert_allclose(got, want, rtol=6e-7, atol=1e-37)


@pytest.mark.parametrize("type_", ["f32", "f16", "i32", "i64"])
def test_copies(type_: str) -> None:
    """Rows of odd numbers of bytes, and elements that are not adjacent."""
    kind = {"i32": np.int32, "i64": np.int64}.get(type_)
    x = numbers(2, 3, 5, 37, type_=type_)
    x = np.arange(x.size, dtype=kind).reshape(x.shape) - 99 if kind else x
    check(gg.cont, x, signs=x.dtype.kind == "f")
    check(lambda a: gg.cont(gg.transpose(a)), x)
    check(lambda a: gg.cont(gg.permute(a, axes=(3, 1, 0, 2))), x)
    check(lambda a: gg.repeat(a, ne=(74, 15, 3, 4)), x)
    for dim in range(4):
        check(lambda a, b, dim=dim: gg.concat(a, b, dim=dim), x, x[::-1].copy())
    check(lambda a: gg.concat(gg.transpose(a), gg.transpose(a), dim=0), x)


@pytest.mark.parametrize("target", ["i32", "i64", "f32"])
def test_integers_are_converted(target: str) -> None:
    check(lambda a: gg.cast(a, dtype=target), np.arange(-50, 49, dtype=np.int32).reshape(9, 11))
    check(lambda a: gg.cast(a, dtype=target), np.array([1 << 40, -(1 << 24) - 1, 7]))
    check(lambda a: gg.cast(a, dtype=target), np.array([-1.9, 1.9, -0.0, 3e8], np.float32))


def test_rows_of_integers_by_id() -> None:
    x, ids = np.arange(60, dtype=np.int32).reshape(4, 15), np.array([3, -1, 0], np.int32)
    check(gg.get_rows, x, ids)


SIZES = [(1, 7), (2, 64), (3, 1000), (SORTED_ROWS + 5, 129)]


@pytest.mark.parametrize(("rows", "n"), SIZES)
def test_the_order_of_a_row(rows: int, n: int) -> None:
    x = numbers(rows, n)
    check(gg.argmax, x)
    for order in ("asc", "desc"):
        check(lambda a, order=order: gg.argsort(a, order=order), x)
    for k in {1, min(n, 6), min(n, MOST_K), min(n, MOST_K + 1), n}:
        check(lambda a, k=k: gg.top_k(a, k=k), x)
    for x in (np.arange(float(n)), np.arange(float(n))[::-1], np.zeros(n)):
        check(lambda a: gg.top_k(a, k=min(n, 40)), x.astype(np.float32)[None])


@pytest.mark.parametrize(("n_group", "used", "n_top"), [(1, 1, 1), (8, 3, 2), (8, 8, 1), (4, 1, 2)])
def test_grouped_experts(n_group: int, used: int, n_top: int) -> None:
    for x in (numbers(9, 64), np.zeros((2, 64), np.float32)):
        check(
            lambda a: gg.grouped_topk(
                a, n_group=n_group, n_group_used=used, n_top=n_top, k=min(8, 64 // n_group * used)
            ),
            x,
        )


def test_biases_of_experts_and_sums() -> None:
    x, b = numbers(4, 3, 37), numbers(5, 37)
    ids = np.array([[0, 4, -1], [1, 1, 2], [-1, -1, -1], [3, 2, 0]], np.int32)
    check(gg.add_id, x, b, ids)
    check(lambda a, b, ids: gg.add_id(a * a, b, ids), x, b, ids)  # in the place of a
    finite = np.random.default_rng(6).integers(-99, 99, (4, 3, 37)).astype(np.float32)
    check(gg.multi_add, finite)
    check(gg.sum_rows, finite)
    long = np.full((2, 1 << 20), 0.1, np.float32)
    total = outputs("cpu", gg.sum_rows, {"x": long})
    assert np.array_equal(total[:, 0], np.float32(long.astype(np.float64).sum(1)))


@pytest.mark.parametrize("swapped", [False, True])
def test_gated_units(swapped: bool) -> None:
    x = np.random.default_rng(7).standard_normal((3, 5, 74)).astype(np.float32)
    got, want = (
        outputs(b, lambda a: gg.glu(a, act="relu", swapped=swapped), {"x": x})
        for b in ("cpu", "numpy")
    )
    np.testing.assert_array_equal(got, want)
